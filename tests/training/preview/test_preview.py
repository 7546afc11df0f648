import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fledge
from serving.errors import DataError
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from tests.hostile.images import png, progressive_jpeg
from tests.support.tiny_bundle import photo
from training.config import load
from training.config.sections import AugmentConfig
from training.data.dataset import load_dataset
from training.preview import figure, photo_hints, preview, scan
from training.preview.figure import draw


def save_photo(path, size=(40, 30), mode="RGB", colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if colour is None:
        path.write_bytes(photo(sum(path.name.encode()) + size[0], size))
    else:
        Image.new(mode, size, colour).save(path)
    return path


def stats(path, part="train", label="a"):
    return scan.photo_stats(path, part, label)


def hints(photos, classes, size):
    """The hints about the photos themselves: most tests have no second class and no validation."""
    found = photo_hints.hints(photos, classes, Preprocess(size=size))
    return [hint for hint in found if not hint.startswith("there is ") and " one photo" not in hint]


@pytest.fixture
def photos(tmp_path):
    """Two classes of 12 and 4 photos; the larger one has one unusual photo of each kind."""
    root = tmp_path / "photos"
    for i in range(6):
        save_photo(root / "a" / f"{i}.jpg", (100 + i, 90))
    for i in range(4):
        save_photo(root / "b" / f"{i}.jpg", (110 + i, 90))
    shutil.copyfile(root / "a" / "0.jpg", root / "a" / "copy.jpg")
    save_photo(root / "a" / "tiny.png", (20, 20))
    save_photo(root / "a" / "long.png", (700, 70))
    save_photo(root / "a" / "grey.png", (90, 90), "L", 77)
    save_photo(root / "a" / "cmyk.jpg", (90, 90), "CMYK", (9, 200, 30, 4))
    data = (root / "a" / "1.jpg").read_bytes()
    (root / "a" / "broken.jpg").write_bytes(data[: len(data) // 2])
    return root


def test_statistics_are_measured_on_the_upright_photo(tmp_path):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, :25] = (200, 10, 10)
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    one = stats(path)
    assert (one.width, one.height, one.short, one.mode) == (30, 50, 30, "RGB")
    assert one.stretch == pytest.approx(50 / 30)
    assert one.size == path.stat().st_size
    assert not one.grey
    assert not one.error


def test_grey_is_decided_by_the_pixels(tmp_path):
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None], 100, axis=0)
    Image.fromarray(ramp).save(tmp_path / "l.png")
    Image.fromarray(np.stack([ramp] * 3, axis=2)).save(tmp_path / "rgb.jpg")
    spot = np.stack([ramp] * 3, axis=2)
    spot[40:60, 40:60] = (255, 0, 0)
    Image.fromarray(spot).save(tmp_path / "spot.png")
    assert [stats(tmp_path / n).grey for n in ("l.png", "rgb.jpg", "spot.png")] == [
        True,
        True,
        False,
    ]


def test_duplicates_have_equal_pixels_in_any_file(tmp_path):
    first = save_photo(tmp_path / "a.png")
    with Image.open(first) as picture:
        pixels = np.asarray(picture)
    for name, changed in (
        ("b", pixels),
        ("c", pixels[::-1]),
        ("d", pixels.reshape(40, 30, 3)),  # the same bytes in another shape
    ):
        Image.fromarray(changed).save(tmp_path / f"{name}.png", compress_level=0)
    scanned = [stats(tmp_path / f"{name}.png") for name in "abcd"]
    assert [[one.path.name for one in group] for group in scan.duplicates(scanned)] == [
        ["a.png", "b.png"]
    ]
    (tmp_path / "e.jpg").write_bytes(b"")
    (tmp_path / "f.jpg").write_bytes(b"")
    assert scan.duplicates([stats(tmp_path / "e.jpg"), stats(tmp_path / "f.jpg")]) == []


def test_every_photo_is_scanned_and_unusual_ones_are_listed(photos):
    dataset = load_dataset(str(photos))
    scanned = scan.scan_photos(dataset)
    assert [one.path for one in scanned] == [s.path for s in dataset.train + dataset.valid]
    assert {one.label for one in scanned} == {"a", "b"}
    unusual = {
        name: [one.path.name for one in found] for name, found in scan.unusual_photos(scanned)
    }
    assert unusual == {
        "can't be read": ["broken.jpg"],
        "short side below 64 px": ["tiny.png"],
        "longer than 3 : 1": ["long.png"],
        "without colour": ["grey.png"],
        "not RGB": ["cmyk.jpg"],
    }


def test_unlabelled_photos_are_scanned(photos):
    save_photo(photos / "test" / "x.jpg")
    found = scan.scan_photos(load_dataset(str(photos)))
    assert [one.path.name for one in found if one.part == "unlabelled"] == ["x.jpg"]


def test_hints_report_duplicates_contradicting_labels_and_imbalance(tmp_path):
    paths = [save_photo(tmp_path / f"{i}.jpg", (60 + i, 50)) for i in range(12)]
    shutil.copyfile(paths[0], tmp_path / "same.jpg")
    same = tmp_path / "same.jpg"
    clean = [stats(path) for path in paths]
    text = "\n".join(hints([*clean, stats(same, "valid")], ["a"], 32))
    assert "1 exact duplicate across train and valid: accuracy will look better" in text
    assert "more than one class" not in text
    text = "\n".join(hints([*clean, stats(same, "test", "b")], ["a"], 32))
    assert "across train and test" in text
    assert "1 picture in more than one class, as in a and b" in text
    across = [stats(paths[0], "valid"), stats(same, "test"), *clean[1:]]
    text = "\n".join(hints(across, ["a"], 32))
    assert text == ("1 exact duplicate across valid and test: accuracy will look better than it is")
    text = "\n".join(hints([*clean, stats(same)], ["a"], 32))
    assert text == "1 exact duplicate within one part: they add nothing"
    assert list(hints(clean, ["a"], 32)) == []
    assert list(hints(clean, ["a"], 64)) == [
        "12 of 12 photos are smaller than 64 px: a smaller size may do"
    ]
    unbalanced = [*clean, stats(save_photo(tmp_path / "b.jpg", (99, 90)), label="b")]
    text = "\n".join(hints(unbalanced, ["a", "b"], 32))
    assert "a has 12.0 times as many photos to train on as b" in text
    assert "b has 1 photo to train on" in text


def scanned_sides(*sides):
    """Statistics of photos of these widths and heights."""
    return [
        scan.PhotoStats(Path(f"{i}.jpg"), "train", "a", 1000, *size) for i, size in enumerate(sides)
    ]


@pytest.mark.parametrize(
    ("sides", "counted"),
    [
        ((640, 640), False),
        ((4032, 3024), False),
        ((500, 333), False),  # 3 : 2, which loses a third, in whole pixels
        ((333, 500), False),
        ((500, 332), True),
        ((1920, 1080), True),
        ((1080, 1920), True),
        ((3000, 1000), True),
    ],
)
def test_photos_that_lose_over_a_third_to_the_crop_are_counted(sides, counted):
    found = photo_hints._cut_off(photo_hints.Scan(scanned_sides(sides), ["a"], Preprocess(), "c"))
    assert bool(list(found)) == counted


def test_a_hint_says_what_the_crop_cuts_off_and_what_trains_on_whole_photos():
    long, square = [(900, 300)] * 2, [(300, 300)] * 17
    assert hints(scanned_sides(*long, *square[:16]), ["a"], 224) == [
        "2 of 18 photos lose over a third of their area to the centre crop, 67% in the median: "
        "validation and service do not see it. See them in photos.png; `fledge train quick --data "
        "DATA preprocess.fit=pad` and preprocess.fit=squish train on whole photos"
    ]
    assert hints(scanned_sides(*long, *square, (300, 300)), ["a"], 224) == []  # a tenth
    for fit in ("squish", "pad"):
        preprocess = Preprocess(fit=fit)
        assert not any(
            "crop" in hint for hint in photo_hints.hints(scanned_sides(*long), ["a"], preprocess)
        )


@pytest.mark.parametrize("fit", ["crop", "squish", "pad"])
def test_the_command_of_the_hint_trains_on_the_same_photos(tmp_path, fit, capsys):
    """Objects near the ends of photos of 3 : 1: no pixel of them is in the centre crop."""
    root = tmp_path / "my photos"
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        for i in range(4):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (180 + i, 60), (90, 90, 90))
            image.paste(colour, (5, 10, 45, 50) if i % 2 else (135, 10, 175, 50))
            image.save(path)
    words = ["preview", str(root), "--out", str(tmp_path / "out"), "preprocess.size=64"]
    assert fledge.main([*words, f"preprocess.fit={fit}", "seed=3"]) == 0
    hint = [line for line in capsys.readouterr().out.splitlines() if "centre crop" in line]
    seen = [
        np.ptp(Preprocess(size=64, fit=fit)(decode.read(path).image), axis=(0, 1)).max()
        for path in root.rglob("*.png")
    ]
    if fit != "crop":
        assert hint == []
        assert min(seen) > 100
        return
    assert max(seen) == 0
    (line,) = hint
    command = line.split("`")[1]
    assert shlex.split(command) == [
        *("fledge", "train", "quick", "--data", str(root), "preprocess.size=64", "seed=3"),
        "preprocess.fit=pad",
    ]
    options = fledge._parser().parse_args(shlex.split(command)[1:])
    assert load.read(Path(options.recipe), options.overrides).preprocess.fit == "pad"


def noisy(path, size, seed=0, **options):
    """A large photo with noise of the camera."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_large_duplicates_are_found_whatever_their_metadata_and_format(tmp_path):
    """Photos of this size are decoded at a reduced size, a JPEG and a PNG not in the same way."""
    for name in "ab":
        (tmp_path / name).mkdir()
    size = (1500, 1100)
    photo = noisy(tmp_path / "a" / "0.jpg", size, quality=90)
    exif = Image.Exif()
    exif[0x010E] = "another description"
    data = photo.read_bytes()
    segment = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    marked = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    (tmp_path / "a" / "described.jpg").write_bytes(marked)
    with Image.open(photo) as image:
        pixels = np.asarray(image.convert("RGB")).copy()
    Image.fromarray(pixels).save(tmp_path / "a" / "same.png", compress_level=1)
    pixels[700, 900, 1] ^= 1  # nearly the same
    Image.fromarray(pixels).save(tmp_path / "b" / "changed.png", compress_level=1)
    noisy(tmp_path / "b" / "other.jpg", size, seed=1)
    noisy(tmp_path / "b" / "another.jpg", size, seed=2)
    scanned = scan.scan_photos(load_dataset(str(tmp_path), trainable=False))
    assert {(one.width, one.height) for one in scanned} == {size}
    (group,) = scan.duplicates(scanned)
    assert sorted(one.path.name for one in group) == ["0.jpg", "described.jpg", "same.png"]


def test_only_photos_that_look_alike_are_decoded_twice(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(scan, "read", lambda path, **_: decoded.append(path) or decode.read(path))
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            noisy(tmp_path / name / f"{i}.jpg", (1200, 1000), seed=i + 3 * (name == "b"))
    scan.scan_photos(load_dataset(str(tmp_path), trainable=False))
    assert decoded == []


def test_a_hint_reports_a_class_without_colour(tmp_path):
    colour = [stats(save_photo(tmp_path / f"{i}.jpg", (60 + i, 50))) for i in range(10)]
    grey = [
        stats(save_photo(tmp_path / f"{i}.png", (60, 50), "L", 9 + i), label="b") for i in range(10)
    ]
    (hint,) = hints(colour + grey, ["a", "b"], 32)
    assert hint.startswith("100% of b are without colour")


def test_the_report_counts_photos_by_class_and_part(photos):
    save_photo(photos / "test" / "x.jpg")
    dataset = load_dataset(str(photos))
    lines = list(preview.report(dataset, scan.scan_photos(dataset), Preprocess(size=32)))
    table = [line.split() for line in lines[2:7]]
    assert table == [
        ["class", "train", "valid", "unlabelled", "all"],
        ["a", "10", "2", "0", "12"],
        ["b", "3", "1", "0", "4"],
        ["(no", "label)", "0", "0", "1", "1"],
        ["all", "13", "3", "1", "17"],
    ]
    start = lines.index("short side in pixels") + 1
    bars = [line.split() for line in lines[start : lines.index("", start)]]
    assert bars[0][:2] == ["0-63", "2"]
    assert sum(int(bar[1]) for bar in bars) == 16  # all but the unreadable one
    longest = max(bars, key=lambda bar: int(bar[1]))
    assert len(longest[2]) == 40
    smallest = lines.index("smallest files")
    size = [float(line.split()[1]) for line in lines[smallest + 1 : smallest + 6]]
    assert size == sorted(size)


def test_the_picture_draws_any_class_names(tmp_path, photos):
    scanned = [stats(path) for path in sorted((photos / "b").iterdir())]
    names = ("$x_{$", "花", "new\nline", "long " * 30)
    scanned += [stats(photos / "a" / "long.png", label=name) for name in names]
    draw(scanned, ("a", *names), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > picture.height > 500
    draw([stats(photos / "a" / "broken.jpg")], ("a",), tmp_path / "q.png")  # none can be read
    assert (tmp_path / "q.png").exists()


def test_a_few_extreme_photos_do_not_decide_the_axes(photos):
    usual = [stats(photos / "a" / f"{i}.jpg") for i in range(6)] * 2
    assert figure._range(usual) == (90, 105)
    point = dataclasses.replace(usual[0], width=1, height=1)
    strip = dataclasses.replace(usual[0], width=4000, height=2)
    assert figure._range([*usual, point, strip]) == (90, 105)
    larger = dataclasses.replace(usual[0], width=200, height=90)
    assert figure._range([*usual, larger]) == (90, 200)
    assert figure._range([point, strip]) == (1, 4000)  # too few photos to leave any out
    assert figure._range([]) == (1, 1)


def test_names_without_glyphs_become_numbers():
    names = ("cat", "naïve", "зима", "花", "a花")
    assert [figure._short(name, i) for i, name in enumerate(names)] == [
        "cat", "naïve", "зима", "no. 4", "no. 5",
    ]  # fmt: skip


def test_count_axes_have_integer_ticks(photos, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda self, path, **_: seen.append(self) or path.write_bytes(b"x"),
    )
    draw([stats(photos / "a" / "0.jpg"), stats(photos / "b" / "0.jpg")], ("a", "b"), tmp_path / "p")
    bars, _, sides = seen[0].axes
    ticks = [*bars.xaxis.get_major_locator()(), *sides.yaxis.get_major_locator()()]
    assert all(tick == int(tick) for tick in ticks)


def test_empty_folders_are_listed(photos, capsys, tmp_path):
    (photos / "c" / "inner").mkdir(parents=True)
    assert fledge.main(["preview", str(photos), "--out", str(tmp_path / "out")]) == 0
    assert "hint: the folder c is empty: the model will have no such class" in (
        capsys.readouterr().out
    )
    parted = tmp_path / "parted"
    for part, name in (("train", "a"), ("train", "b"), ("valid", "a")):
        save_photo(parted / part / name / "0.jpg")
    for folder in (parted / "train" / "c", parted / "valid" / "b", parted / "elsewhere"):
        folder.mkdir()
    assert load_dataset(str(parted)).reading.empty == ("train/c",)


def test_small_classes_are_counted(photos):
    few = [stats(photos / "a" / "0.jpg", label=name) for name in "bccdd"]
    text = "\n".join(hints(few, ["b", "c", "d"], 32))
    assert "3 classes have fewer than 10 photos to train on, the fewest b: 10 are few" in text


def test_the_command_prints_the_report_and_writes_the_picture(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert fledge.main(["preview", str(photos), "--out", str(out), "data.valid=0.5"]) == 0
    output = capsys.readouterr().out
    assert "2 classes, 16 photos" in output
    assert "1 photo can't be read; training refuses more than 5%: repair or remove them" in output
    for name in ("photos.png", "preview.png"):
        assert f": {out / name}\n" in output
        with Image.open(out / name) as picture:
            picture.load()
    assert fledge.main(["preview", str(photos), "--out", str(out), "data.vald=0.5"]) == 2
    assert "data.vald is unknown; did you mean 'data.valid=0.5'?" in capsys.readouterr().err
    assert fledge.main(["preview", str(tmp_path / "nowhere")]) == 2


def test_the_command_draws_an_augmentation(photos, tmp_path, capsys, monkeypatch):
    calls = []

    def write(path, config, preprocess, presize, out, *, draws=24, seed=0):
        calls.append((path, config, preprocess.size, presize, out, seed))

    monkeypatch.setattr("training.preview.augmentation_sheet.write", write)
    words = ["preview", str(photos), "--augment", "--out", str(tmp_path / "out")]
    changes = ["augment.preset=top_down", "preprocess.size=64", "data.presize=2", "seed=5"]
    assert fledge.main([*words, *changes]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'augment.png'}\n"
    first = load_dataset(str(photos), seed=5).train[0].path
    quick = load.read(Path("quick")).augment  # what `make train` uses
    assert quick != AugmentConfig()
    config = load.read(Path("quick"), ["augment.preset=top_down"]).augment
    assert config.flip == "dihedral"
    assert calls.pop() == (first, config, 64, 2, tmp_path / "out" / "augment.png", 5)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'name = "x"\narch = "resnet18"\n[[stage]]\nname = "all"\n[augment]\nmax_rotate = 33.0\n'
    )
    mine = photos / "b" / "2.jpg"
    assert fledge.main([*words, "--photo", str(mine), "--recipe", str(recipe)]) == 0
    assert calls[0][:2] == (mine, AugmentConfig(max_rotate=33.0))


def test_hints_report_photos_that_training_refuses(tmp_path):
    fine = [stats(save_photo(tmp_path / f"{i}.jpg", (60 + i, 50))) for i in range(38)]
    (tmp_path / "x.jpg").write_bytes(b"no photo")
    valid = stats(save_photo(tmp_path / "valid.jpg", (99, 90)), "valid")
    broken, other = stats(tmp_path / "x.jpg"), stats(tmp_path / "x.jpg", "train", "b")

    def text_of(*scanned, classes=("a",)):
        return "\n".join(photo_hints.hints([*fine, *scanned], classes, Preprocess(size=32)))

    first = text_of(valid, broken).splitlines()[0]
    assert first == "1 photo can't be read; training leaves them out"
    assert "2 photos can't be read; training leaves them out" in text_of(
        valid, broken, stats(tmp_path / "x.jpg", "test")
    )  # training reads no test photos
    assert "3 photos can't be read; training refuses more than 5%" in text_of(valid, *[broken] * 3)
    assert "b has no photo to train on that can be read" in text_of(
        valid, other, classes=("a", "b")
    )
    assert "no photo to validate on that can be read" in text_of(stats(tmp_path / "x.jpg", "valid"))


def test_the_first_readable_photo_is_drawn(photos, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "training.preview.augmentation_sheet.write", lambda path, *_, **__: drawn.append(path)
    )
    recipe = load.read(Path("quick"), ["data.valid=0.01"])
    first, second, *_ = (s.path for s in load_dataset(str(photos), config=recipe.data).train)
    first.write_bytes(b"no photo")
    preview.augmented(str(photos), recipe, tmp_path / "out")
    assert drawn == [second]
    with pytest.raises(DataError, match=r"--photo .*: no image that Fledge reads"):
        preview.augmented(str(photos), recipe, tmp_path / "out", photo=first)
    with pytest.raises(DataError, match=r"^--photo .*missing\.jpg: No such file"):
        preview.augmented(str(photos), recipe, tmp_path / "out", photo=tmp_path / "missing.jpg")
    for path in photos.rglob("*.*"):
        path.write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"none of the \d+ photos to train on"):
        preview.augmented(str(photos), recipe, tmp_path / "out")


@pytest.mark.parametrize("more", [[], ["--augment"]])
def test_a_file_as_output_folder_is_refused(photos, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(preview, "scan_photos", None)  # refused before reading photos
    monkeypatch.setattr(preview, "load_dataset", None)
    out = tmp_path / "file"
    out.write_text("mine")
    assert fledge.main(["preview", str(photos), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert error == f"fledge: --out {out}: {out} can't be written to; choose another\n"


def test_the_option_photo_without_augment_is_refused(photos, capsys):
    words = ["preview", str(photos), "--photo", str(photos / "b" / "2.jpg")]
    assert fledge.main(words) == 2
    assert "has no effect without --augment" in capsys.readouterr().err


def test_a_pipe_among_the_photos_is_unreadable(photos):
    os.mkfifo(photos / "a" / "pipe.jpg")
    found = scan.scan_photos(load_dataset(str(photos)))
    assert [one.error for one in found if one.path.name == "pipe.jpg"] == ["no regular file"]


@pytest.mark.process
def test_an_image_above_the_limit_of_pillow_is_described(tmp_path):
    """Pillow alone refuses to open images of more than 178 megapixels."""
    code = """
import sys
from pathlib import Path
from pathlib import Path
from training.preview import scan
for name in sys.argv[1:]:
    one = scan.photo_stats(Path(name), "train", "a")
    print(one.width, one.height, one.mode, one.error)
"""
    huge = tmp_path / "huge.png"
    huge.write_bytes(png(20_000, 9000, 1, 0))
    grey = save_photo(tmp_path / "grey.png", (20, 10), "L", 9)
    avif = save_photo(tmp_path / "isolated.avif", (20, 10), "RGBA", (1, 2, 3, 4))
    gif = save_photo(tmp_path / "palette.gif", (20, 10), "P", 3)
    cmyk = tmp_path / "isolated.jpg"  # of many scans
    cmyk.write_bytes(progressive_jpeg(4000, 4000, scans=20))
    done = subprocess.run(
        [sys.executable, "-c", code, huge, grey, avif, gif, cmyk],
        env={**os.environ, "FLEDGE_MAX_PIXELS": "400000000"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "20000 9000 1 ",
        "20 10 L ",
        "20 10 RGBA ",
        "20 10 P ",
        "4000 4000 RGB ",
    ]


@pytest.mark.parametrize("limit", ["64", "1000"])
def test_an_image_above_the_limit_of_pixels_is_one_line(tmp_path, monkeypatch, limit):
    monkeypatch.setenv("FLEDGE_MAX_PIXELS", limit)
    one = stats(save_photo(tmp_path / "a.png", (90, 90), "L", 9))
    assert "90 x 90 pixels" in one.error
    assert (one.width, one.mode) == (0, "")


@pytest.mark.parametrize(
    ("counts", "hint"),
    [
        ({"a": 6, "b": 1}, "b has one photo: training refuses"),
        ({"a": 6, "b": 1, "c": 1}, "2 classes have one photo, such as b: training refuses"),
        ({"a": 6}, "there is one class, a: training refuses"),
        ({"a": 1}, "there is no photo to validate on that can be read: training refuses"),
    ],
)
def test_preview_shows_what_training_refuses(tmp_path, capsys, counts, hint):
    for label, count in counts.items():
        for i in range(count):
            save_photo(tmp_path / "data" / label / f"{i}.jpg", (80 + i, 60))
    with pytest.raises(DataError):
        load_dataset(str(tmp_path / "data"))
    assert fledge.main(["preview", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert f"hint: {hint}" in output
    assert "no problems found" not in output
    assert (tmp_path / "out" / "photos.png").exists()
