import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serving.errors import OptionError, WorkError
from serving.imaging import decode as images
from serving.imaging.preprocess import Preprocess
from tests.training.conftest import coloured
from training.config import load as config
from training.data import dataset
from training.engine import finetune as fine_tune
from training.engine import lr_find
from training.pixels import decoded
from training.pixels import store as pixel_pack
from training.pixels.rows import MemmapRows, StreamingRows, ahead
from training.pixels.store import PixelStore
from training.pixels.transform import PixelTransform
from training.run import checkpoint
from training.utils import disk_cache

ROOT = Path(__file__).parents[3]
SMALL = Preprocess(size=32)
PRESIZE = 1.5
SIDE = PixelTransform("train", SMALL, PRESIZE).side
ROW = 3 * SIDE**2  # bytes of a training photo
STAGES = """
[[stage]]
name = "head"
lr = 0.01
cycle_len = 2
views = 1
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.02
cycle_len = 2
augment = { mixup = 0.2 }
"""


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    return disk_cache.DiskCache(tmp_path / "cache", 10**9)


@pytest.fixture
def lines():
    return []


def as_decoded(sample, making):
    """What the pixels of a photo must be, by the decoder alone."""
    return making(images.read(sample.path, background=making.preprocess.background).image)


def assert_right(found, sets, preprocess=SMALL, presize=PRESIZE):
    for part, of in zip(("train", "valid"), sets, strict=True):
        samples = getattr(found, part)
        assert len(of) == len(of.pixels) == len(samples)
        making = PixelTransform(part, preprocess, presize)
        for sample, row, label in zip(samples, of.pixels[:], of.labels, strict=True):
            assert (row.numpy() == as_decoded(sample, making)).all()
            assert sample.label == label
        ratios = [np.float32(w / h) for w, h in (images.read(s.path).image.size for s in samples)]
        assert of.aspect.tolist() == ratios


def test_cold_warm_and_without_a_cache_give_the_same_weights(recipe, photos, tmp_path, room):
    path, said, weights = recipe(STAGES), [], []
    for number, cache_gb in enumerate((None, None, 0, 0.0001)):
        folder = fine_tune.run(
            config.read(path), str(photos), out=tmp_path / str(number), device="cpu",
            cache_gb=cache_gb, log=said.append,
        )  # fmt: skip
        weights += [(folder / checkpoint.BEST).read_bytes()]
    assert len(set(weights)) == 1
    told = [line.partition(";")[0] for line in said if line.startswith("pixels: ")]
    for line, pattern in zip(told, (
        r"45 photos, 45 decoded in \S+ s",
        r"45 photos, 45 from the cache, read in \S+ s",
        r"45 photos, read in \S+ s, 45 streamed: their \S+ MB are more than --cache-gb allows",
        # What is left of the budget is enough for the validation part.
        r"45 photos, 9 from the cache, read in \S+ s, 36 streamed: their \S+ MB .*",
    ), strict=True):  # fmt: skip
        assert re.fullmatch(f"pixels: {pattern}", line), line
    assert len(room.entries()) == 2


def test_folds_and_seeds_share_the_rows(photos, room, lines):
    for seed, fold in ((0, 0), (3, 0), (3, 2)):
        own = config.parse(
            {"name": "x", "arch": "resnet18", "stage": [{"name": "s"}],
             "data": {"folds": 3, "fold": fold}}, "x"
        )  # fmt: skip
        found = dataset.load(str(photos), config=own.data, seed=seed)
        _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
        assert_right(found, sets)
    rows = {entry.what: entry.size for entry in room.entries()}
    assert len(rows) == 2
    assert rows[str(PixelTransform("train", SMALL, PRESIZE))] < 45 * ROW + 2000  # every photo once


def test_equal_photos_share_a_row_and_a_name_decides_nothing(photos, room, lines):
    data_of = (photos / "red" / "0.jpg").read_bytes()
    (photos / "red" / "copy.jpg").write_bytes(data_of)
    (photos / "red" / "1.jpg").write_bytes(data_of)
    found = dataset.load(str(photos))
    _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)
    moved = photos.rename(photos.with_name("moved"))
    again = dataset.load(str(moved))
    _, *sets = decoded.decode(again, SMALL, PRESIZE, lines.append)
    assert_right(again, sets)
    assert f"{len(again.train) + len(again.valid)} from the cache" in lines[-1]


@pytest.mark.parametrize("cache_gb", [None, 0])
def test_a_photo_changed_in_place_is_seen_whatever_its_size_and_time_say(tmp_path, lines, cache_gb):
    root = tmp_path / "bmp"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 30), (i * 20, 0, 90)).save(root / label / f"{i}.bmp")
    found = dataset.load(str(root))
    decoded.decode(found, SMALL, PRESIZE, lines.append, cache_gb)
    changed = root / "a" / "2.bmp"
    before = changed.stat()
    Image.new("RGB", (40, 30), (1, 250, 3)).save(changed)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = changed.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append, cache_gb)
    assert_right(found, sets)


def test_all_that_decides_pixels_is_in_the_name_and_nothing_else():
    def names(presize=PRESIZE, **changes):
        preprocess = Preprocess(**{"size": 64, **changes})
        return tuple(PixelTransform(part, preprocess, presize).name for part in ("train", "valid"))

    train, valid = names()
    assert train != valid
    assert disk_cache._NAME.fullmatch(train)
    for change in ({"size": 65}, {"background": (0, 0, 0)}):
        assert not {*names(**change)} & {train, valid}
    for change in ({"crop": 0.5}, {"interpolation": "bicubic"}):
        assert names(**change)[0] == train
        assert names(**change)[1] != valid
    assert names(mean=(0.5, 0.5, 0.5), std=(1, 1, 1)) == (train, valid)
    assert names(presize=2)[0] != train
    assert names(presize=2)[1] == valid
    assert names(presize=1, size=96)[0] == train  # the same pixels: 96 of them a side


def test_photos_are_kept_as_large_as_the_recipe_says_and_the_cache_keeps_both_sizes(
    recipe, photos, tmp_path, room, lines
):
    path, weights = recipe(), []
    for presize in (1.5, 2, 1.5):
        settings = config.read(path, [f"data.presize={presize}"])
        folder = fine_tune.run(
            settings, str(photos), out=tmp_path / f"run-{len(weights)}", device="cpu",
            log=lines.append,
        )  # fmt: skip
        weights.append((folder / checkpoint.BEST).read_bytes())
    assert weights[0] == weights[2] != weights[1]
    assert any(line.startswith("pixels: 45 photos, 45 from the cache") for line in lines)
    lr_find.lr_find(
        config.read(path, ["data.presize=1"]), str(photos), out=tmp_path / "curve.png",
        device="cpu", log=lines.append,
    )  # fmt: skip
    parts = sorted(entry.what for entry in room.entries())
    assert parts == [*(f"train photos at {side} px" for side in (32, 48, 64)),
                     "valid photos at 32 px"]  # fmt: skip
    for presize in (1, 1.5, 2):
        found = dataset.load(str(photos))
        _, *sets = decoded.decode(found, settings.preprocess, presize, lines.append)
        assert "45 from the cache" in lines[-1]
        assert_right(found, sets, settings.preprocess, presize)
        assert sets[0].pixels[:1].shape == (1, 32 * presize, 32 * presize, 3)


def test_any_order_and_any_slice_comes_as_it_is_asked_for(photos, lines):
    found = dataset.load(str(photos))
    _, kept, _ = decoded.decode(found, SMALL, PRESIZE, lines.append)
    _, streamed, _ = decoded.decode(found, SMALL, PRESIZE, lines.append, 0)
    assert isinstance(kept.pixels, MemmapRows)
    assert isinstance(streamed.pixels, StreamingRows)
    whole = kept.pixels[:]
    assert torch.equal(kept.aspect, streamed.aspect)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(1)).split(7)
    slices = [slice(start, start + 5) for start in range(0, len(kept), 5)]
    for indices in (order, slices, [torch.tensor([3, 3, 0])], []):
        expected = [whole[index] for index in indices]
        for rows in (kept.pixels, streamed.pixels):
            batches = list(rows.batches(indices))
            assert all(map(torch.equal, batches, expected))
            assert len(batches) == len(expected)
    whole[0] = 0  # the caller's own
    assert not torch.equal(kept.pixels[:1], whole[:1])
    threads = threading.active_count()
    batches = streamed.pixels.batches(order)
    next(batches)
    batches.close()
    assert threading.active_count() == threads


def test_what_is_decoded_ahead_is_bounded():
    begun = []
    results = ahead(lambda item: begun.append(item) or item, range(1000), 20)
    for number in range(100):
        assert next(results) == number
        assert len(begun) <= number + 1 + 20 + 2 * os.cpu_count()
    results.close()
    assert len(begun) < 1000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "can't be read any more"),
        (lambda path: path.unlink(), "can't be read any more"),
        (lambda path: path.write_bytes((path.parent / "0.jpg").read_bytes()), "was changed"),
    ],
)
def test_a_photo_that_changes_under_a_stream_is_named(photos, lines, damage, message):
    found = dataset.load(str(photos))
    _, train, _ = decoded.decode(found, SMALL, PRESIZE, lines.append, 0)
    victim = next(s.path for s in found.train if s.path.name != "0.jpg")
    damage(victim)
    with pytest.raises(WorkError, match=f"{re.escape(str(victim))} {message}"):
        list(train.pixels.batches([slice(0, 8), slice(8, len(train))]))


@pytest.mark.parametrize("cache_gb", [None, 0])
def test_broken_photos_are_named_and_left_out_every_time(photos, lines, cache_gb):
    broken = photos / "red" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    other, there = photos / "blue" / "4.jpg", dataset.load(str(photos))
    for number in range(2):
        if number:
            other.unlink()
        else:
            other.write_text("not a photo")
        found, *sets = decoded.decode(there, SMALL, PRESIZE, lines.append, cache_gb)
        assert len(found.train) + len(found.valid) == 43
        assert_right(found, sets)
        text = "\n".join(lines)
        assert f"skipped {broken}: the image is broken" in text
        why = ("no image that Fledge reads (JPEG", "No such file or directory")[number]
        assert f"skipped {other}: {why}" in text
        assert "warning: 2 of 45 photos can't be read" in text
        lines.clear()


def test_a_torn_or_damaged_index_never_gives_wrong_rows(photos, room, lines):
    found = dataset.load(str(photos))
    decoded.decode(found, SMALL, PRESIZE, lines.append)
    entry = next(e for e in room.entries() if "train" in e.what)
    index, (rows,) = entry.path / "index", entry.path.glob("rows-*.bin")
    whole, held = index.read_bytes(), rows.read_bytes()
    record, header = pixel_pack._RECORD.itemsize, pixel_pack._HEADER_BYTES
    flipped = bytearray(whole)
    flipped[header + 3 * record + 5] ^= 4
    kept = {
        whole + b"\0" * 7: 36, whole + whole[header : header + 11]: 36, whole[:-1]: 35,
        whole[: -record - 9]: 34, whole + bytes(record): 0, bytes(flipped): 0,
        whole[: header - 1]: 0, b"": 0, whole.replace(b"pixels 1", b"pixels 0"): 0,
    }  # fmt: skip
    for torn, left in kept.items():
        for old in entry.path.glob("rows-*.bin"):
            old.unlink()
        rows.write_bytes(held)
        index.write_bytes(torn)
        _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
        assert_right(found, sets)
        assert ("36 decoded" if not left else f"{left + 9} from the cache") in lines[-1]
    rows, *more = entry.path.glob("rows-*.bin")
    assert not more
    rows.write_bytes(rows.read_bytes()[:-1])  # rows that the index lists and the file lacks
    _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)


def test_the_budget_holds_and_the_oldest_goes(photos, room, lines):
    found = dataset.load(str(photos))
    first, last = Preprocess(size=24), Preprocess(size=64)
    largest = 36 * 3 * PixelTransform("train", last, PRESIZE).side ** 2 + 9 * 3 * last.size**2
    budget = 1.3 * largest / 1e9
    for preprocess in (first, Preprocess(size=48), SMALL, last):
        _, *sets = decoded.decode(found, preprocess, PRESIZE, lines.append, budget)
        assert_right(found, sets, preprocess)
        assert isinstance(sets[0].pixels, MemmapRows)
        assert room.size() <= budget * 1e9
        if preprocess is first:
            kept = sets[0]
    names = {entry.path.name for entry in room.entries()}
    assert PixelTransform("train", first, PRESIZE).name not in names
    assert PixelTransform("train", last, PRESIZE).name in names
    _, _, valid = decoded.decode(found, first, PRESIZE, lines.append)
    assert_right(found, (kept, valid), first)  # open still
    _, *sets = decoded.decode(found, Preprocess(size=256), PRESIZE, lines.append, budget)
    assert isinstance(sets[0].pixels, StreamingRows)


def test_a_pack_full_of_other_photos_is_begun_anew(tmp_path, photos, room, lines):
    other = coloured(tmp_path / "other", {"cyan": 20, "pink": 20})
    budget = 60 * ROW / 1e9  # enough for the rows of either, of both not
    for root in (photos, other, photos):
        found = dataset.load(str(root))
        _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append, budget)
        assert_right(found, sets)
        assert isinstance(sets[0].pixels, MemmapRows)
        assert room.size() <= budget * 1e9
    assert "45 decoded" in lines[-1] or "36 decoded" in lines[-1]


def test_a_cache_that_cant_be_used_is_a_warning(tmp_path, photos, monkeypatch, lines):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "file" / "cache"))
    found = dataset.load(str(photos))
    _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)
    assert isinstance(sets[0].pixels, MemmapRows)
    warning, done = lines
    assert warning.startswith(f"warning: the cache {tmp_path}/file/cache can't be used: ")
    assert warning.endswith("; decoded photos go to a temporary file")
    assert re.fullmatch(r"pixels: 45 photos, 45 decoded in \S+ s", done)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_others_fill_is_read(photos, room, lines):
    found = dataset.load(str(photos))
    decoded.decode(found, SMALL, PRESIZE, lines.append)
    files = [room.folder, *room.folder.rglob("*")]
    for path in files:
        path.chmod(0o555)
    try:
        _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
        assert "45 from the cache" in lines[-1]
        _, *sets = decoded.decode(found, Preprocess(size=24), PRESIZE, lines.append)
        assert_right(found, sets, Preprocess(size=24))
        assert "Permission denied" in lines[-2]
    finally:
        for path in files:
            path.chmod(0o755)


def test_a_wrong_budget_is_refused_before_anything_is_written(recipe, photos, tmp_path):
    settings = config.read(recipe())
    with pytest.raises(OptionError, match="--cache-gb -1: use gigabytes"):
        fine_tune.run(settings, str(photos), out=tmp_path / "run", cache_gb=-1)
    with pytest.raises(OptionError, match="--cache-gb -1: use gigabytes"):
        lr_find.lr_find(settings, str(photos), cache_gb=-1)
    assert not (tmp_path / "run").exists()


KILLS = """
import os, random, signal, sys, time
from serving.imaging.preprocess import Preprocess
from serving.utils.progress import progress_bar
from training.data import dataset
from training.pixels import decoded, store
from training.utils import disk_cache
store.FLUSH_BYTES = 20_000  # many flushes, so that kills fall everywhere
found, small = dataset.load(sys.argv[1]), Preprocess(size=32)
making = {name: decoded.Making(name, small, 1.5) for name in ("train", "valid")}
packs = {name: store.Pack(disk_cache.folder() / m.name, m.side) for name, m in making.items()}
progress_bar()  # what is loaded at the first use, here and not in every child

def begin():
    child = os.fork()
    if not child:
        decoded.decode(found, small, 1.5, lambda line: None)
        os._exit(0)
    return child

started = time.perf_counter()
os.waitpid(begin(), 0)
whole = time.perf_counter() - started
disk_cache.room().clear()
random.seed(0)
partial = 0
for _ in range(200):
    if partial == 8:  # kills that fell while it wrote are what counts
        break
    child = begin()
    time.sleep(random.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    for name, pack in packs.items():
        listed = pack.read()
        for digest, row in listed.rows.items():
            print("row", name, digest.hex(), listed.pixels[row].tobytes().hex())
        print("killed" if killed else "ended", name, len(listed.rows))
    partial += killed and 0 < len(packs["train"].read().rows) < len(found.train)
    if not killed:
        cache.room().clear()
"""


def test_a_kill_at_any_moment_leaves_only_whole_rows(tmp_path, room, lines):
    photos = coloured(tmp_path / "many", {"blue": 60, "green": 60}, side=120)
    found = dataset.load(str(photos))
    right = {
        (part, hashlib.sha256(sample.path.read_bytes()).hexdigest()[:32]): as_decoded(
            sample, PixelTransform(part, SMALL, PRESIZE)
        )
        .tobytes()
        .hex()
        for part in ("train", "valid")
        for sample in getattr(found, part)
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(photos)], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    killed, checked = [], 0
    for line in done.stdout.splitlines():
        word, *rest = line.split()
        if word == "row":
            assert right[rest[0], rest[1]] == rest[2]
            checked += 1
        elif word == "killed" and rest[0] == "train":
            killed.append(int(rest[1]))
    assert checked > 100
    assert sum(0 < rows < 96 for rows in killed) == 8, killed
    for _ in range(2):
        _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
        assert_right(found, sets)
    assert "120 from the cache" in lines[-1]
    assert room.size() < 96 * ROW + 24 * 3 * 32**2 + 120 * 24 + 1000  # no reserve is left


FILL = """
import hashlib, json, sys
from serving.imaging.preprocess import Preprocess
from training.data import dataset
from training.pixels import decoded
said = []
_, train, valid = decoded.decode(dataset.load(sys.argv[1]), Preprocess(size=32), 1.5, said.append)
sums = [hashlib.sha256(of.pixels[:].numpy().tobytes()).hexdigest() for of in (train, valid)]
print(json.dumps([sums, said[-1]]))
"""


def test_two_runs_that_fill_one_cache_at_once_find_the_same(tmp_path, room, lines):
    photos = coloured(tmp_path / "many", {"blue": 100, "green": 100}, side=100)
    command = [sys.executable, "-c", FILL, str(photos)]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    (sums, _), (others, _) = (json.loads(run.communicate()[0]) for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert sums == others
    found = dataset.load(str(photos))
    _, *sets = decoded.decode(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)
    assert [hashlib.sha256(s.pixels[:].numpy().tobytes()).hexdigest() for s in sets] == sums
    assert "200 from the cache" in lines[-1]
    entry = next(e for e in room.entries() if "train" in e.what)
    listed = PixelStore(entry.path, SIDE).read()
    assert len(listed.rows) == len(listed.pixels) == len({s.path.read_bytes() for s in found.train})


MEMORY = """
import re, sys
from pathlib import Path
import torch
from serving.imaging.preprocess import Preprocess
from training.data import dataset
from training.pixels import decoded
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
found = dataset.load(sys.argv[1])
small = Preprocess(size=32)
decoded.decode(found, small, 1.5, print, 0)[1].pixels[:4]  # what is loaded at the first use
Path("/proc/self/clear_refs").write_text("5")
before = peak()
_, train, _ = decoded.decode(found, Preprocess(size=512), 1.5, lambda line: None, 0)
for _ in train.pixels.batches(torch.randperm(len(train)).split(4)):
    pass
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux does")
def test_streaming_takes_the_memory_of_some_batches(tmp_path):
    photos = coloured(tmp_path / "many", {"blue": 100, "green": 100})
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(photos)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    row = (
        3 * PixelTransform("train", Preprocess(size=512), PRESIZE).side ** 2
    )  # all are 160 of them
    assert int(done.stdout.split()[-1]) < 40 * row, done.stdout
