import hashlib
import os
import re
import shutil
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from serving.errors import OptionError, WorkError
from serving.imaging.decode import read
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from serving.utils.parallel import map_ordered
from tests.support.tiny_bundle import elongated
from tests.training.conftest import coloured
from training.config import load
from training.data.dataset import load_dataset
from training.engine import finetune, lr_find
from training.pixels import store
from training.pixels.decoded import decode_dataset
from training.pixels.rows import MemmapRows, StreamingRows
from training.pixels.store import PixelStore
from training.pixels.transform import PixelTransform
from training.report import lr_plots
from training.run import checkpoint
from training.utils import disk_cache

SMALL = Preprocess(size=32)
PRESIZE = 1.5
SIDE = PixelTransform("train", SMALL, PRESIZE).side
ROW = 3 * SIDE**2  # bytes of a training photo
ONE_EPOCH = """
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.02
augment = { mixup = 0.2 }
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The disk cache of the test."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    return disk_cache.DiskCache(tmp_path / "cache", 10**9)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def few(tmp_path):
    """A data set of 12 training and 3 validation photos."""
    return coloured(tmp_path / "few", {"blue": 5, "green": 5, "red": 5})


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no learning rates: it takes longer than their training."""
    monkeypatch.setattr(lr_plots, "schedule", lambda *_: None)
    monkeypatch.setattr(lr_plots, "lr_find", lambda *_: None)


def expected_pixels(sample, transform):
    """The pixels of a photo, computed without the cache."""
    return transform(read(sample.path, preprocess=transform.to_square))


def assert_right(found, sets, preprocess=SMALL, presize=PRESIZE):
    for part, of in zip(("train", "valid"), sets, strict=True):
        samples = getattr(found, part)
        assert len(of) == len(of.pixels) == len(samples)
        transform = PixelTransform(part, preprocess, presize)
        for sample, row, label in zip(samples, of.pixels[:], of.labels, strict=True):
            assert (row.numpy() == expected_pixels(sample, transform)).all()
            assert sample.label == label
        ratios = [np.float32(w / h) for w, h in (read(s.path).image.size for s in samples)]
        assert of.aspect.tolist() == ratios


def test_weights_are_the_same_with_a_cold_cache_a_warm_cache_and_none(
    recipe, few, tmp_path, cache, no_pictures
):
    path, log, weights = recipe(ONE_EPOCH), [], []
    for number, cache_gb in enumerate((None, None, 0, 0.00005)):
        folder = finetune.run(
            load.read(path), str(few), out=tmp_path / str(number), device="cpu",
            cache_gb=cache_gb, log=log.append,
        )  # fmt: skip
        weights += [(folder / checkpoint.BEST).read_bytes()]
    assert len(set(weights)) == 1
    summaries = [line.partition(";")[0] for line in log if line.startswith("pixels: ")]
    for line, pattern in zip(summaries, (
        r"15 photos, 15 decoded in \S+ s",
        r"15 photos, 15 from the cache, read in \S+ s",
        r"15 photos, read in \S+ s, 15 streamed: their \S+ MB are more than --cache-gb allows",
        # The rest of the budget is enough for the validation part.
        r"15 photos, 3 from the cache, read in \S+ s, 12 streamed: their \S+ MB .*",
    ), strict=True):  # fmt: skip
        assert re.fullmatch(f"pixels: {pattern}", line), line
    assert len(cache.entries()) == 2


def test_folds_and_seeds_share_the_rows(photos, cache, lines):
    for seed, fold in ((0, 0), (3, 0), (3, 2)):
        own = load.parse(
            {"name": "x", "arch": "resnet18", "stage": [{"name": "s"}],
             "data": {"folds": 3, "fold": fold}}, "x"
        )  # fmt: skip
        found = load_dataset(str(photos), config=own.data, seed=seed)
        _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append)
        assert_right(found, sets)
    rows = {entry.description: entry.size for entry in cache.entries()}
    assert len(rows) == 2
    assert rows[str(PixelTransform("train", SMALL, PRESIZE))] < 45 * ROW + 2000  # every photo once


def test_identical_photos_share_a_row_and_names_do_not_matter(photos, cache, lines):
    data_of = (photos / "red" / "0.jpg").read_bytes()
    (photos / "red" / "copy.jpg").write_bytes(data_of)
    (photos / "red" / "1.jpg").write_bytes(data_of)
    found = load_dataset(str(photos))
    _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)
    moved = photos.rename(photos.with_name("moved"))
    again = load_dataset(str(moved))
    _, *sets = decode_dataset(again, SMALL, PRESIZE, lines.append)
    assert_right(again, sets)
    assert f"{len(again.train) + len(again.valid)} from the cache" in lines[-1]


@pytest.mark.parametrize("cache_gb", [None, 0])
def test_exact_copies_of_training_photos_are_told_in_training(few, cache, lines, cache_gb):
    found = load_dataset(str(few))
    decode_dataset(found, SMALL, PRESIZE, lines.append, cache_gb)
    assert not any("exact cop" in line for line in lines)
    original, copy = found.train[0].path, found.valid[0].path
    copy.write_bytes(original.read_bytes())
    decode_dataset(found, SMALL, PRESIZE, lines.append, cache_gb)
    assert [line for line in lines if "exact cop" in line] == [
        f"warning: 1 of 3 validation photos is an exact copy of a training photo, such as "
        f"'{copy.relative_to(few)}' of '{original.relative_to(few)}': accuracy will look better "
        "than it is; fledge preview lists them"
    ]


@pytest.mark.parametrize("cache_gb", [None, 0])
def test_a_photo_changed_in_place_is_detected_with_equal_size_and_mtime(tmp_path, lines, cache_gb):
    root = tmp_path / "bmp"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 30), (i * 20, 0, 90)).save(root / label / f"{i}.bmp")
    found = load_dataset(str(root))
    decode_dataset(found, SMALL, PRESIZE, lines.append, cache_gb)
    changed = root / "a" / "2.bmp"
    before = changed.stat()
    Image.new("RGB", (40, 30), (1, 250, 3)).save(changed)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = changed.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append, cache_gb)
    assert_right(found, sets)


def test_the_entry_name_depends_on_what_determines_the_pixels_only():
    def names(presize=PRESIZE, **changes):
        preprocess = Preprocess(**{"size": 64, **changes})
        return tuple(PixelTransform(part, preprocess, presize).name for part in ("train", "valid"))

    train, valid = names()
    assert train != valid
    assert disk_cache._NAME.fullmatch(train)
    for change in (
        *({"size": 65}, {"background": (0, 0, 0)}, {"decode": "scaled"}),
        *({"fit": "pad"}, {"fit": "squish"}),
    ):
        assert not {*names(**change)} & {train, valid}
    assert (
        len({name for fit in FITS for how in DECODES for name in names(fit=fit, decode=how)}) == 12
    )
    for change in ({"crop": 0.5}, {"interpolation": "bicubic"}):
        assert names(**change)[0] == train
        assert names(**change)[1] != valid
    assert names(mean=(0.5, 0.5, 0.5), std=(1, 1, 1)) == (train, valid)
    assert names(presize=2)[0] != train
    assert names(presize=2)[1] == valid
    assert names(presize=1, size=96)[0] == train  # the same side: 96 pixels


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return elongated(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("how", DECODES)
@pytest.mark.parametrize("fit", FITS)
def test_squares_show_what_fit_keeps(large, lines, fit, how, cache_gb):
    preprocess = Preprocess(size=32, fit=fit, decode=how, background=(0, 255, 0))
    found = load_dataset(str(large))
    _, *sets = decode_dataset(found, preprocess, PRESIZE, lines.append, cache_gb)
    for part, of in zip(("train", "valid"), sets, strict=True):
        transform = PixelTransform(part, preprocess, PRESIZE)
        for sample, row, aspect in zip(getattr(found, part), of.pixels[:], of.aspect, strict=True):
            # Augmentation draws boxes within the whole photo, or within the square that is seen.
            whole = read(sample.path)
            width, height = whole.image.size
            assert aspect == pytest.approx(width / height if fit == "crop" else 1)
            square = row.numpy()
            assert (square == expected_pixels(sample, transform)).all()
            padded = (square == (0, 255, 0)).all(axis=2).mean()
            expected = 1 - min(width, height) / max(width, height) if fit == "pad" else 0
            assert padded == pytest.approx(expected, abs=0.05)
            # Scaled decoding shows the same as full decoding: whole photos in training.
            shown = replace(preprocess, decode="full")
            if part == "train":
                shown = replace(shown, fit="pad" if fit == "pad" else "squish", size=SIDE)
            difference = np.abs(shown(whole.image).astype(int) - square).mean()
            assert difference < (2 if how == "scaled" else 0.001)


def test_presize_sets_the_size_and_the_cache_has_an_entry_for_each(
    recipe, few, tmp_path, cache, lines, no_pictures
):
    path, weights = recipe(ONE_EPOCH), []
    for presize in (1.5, 2):
        settings = load.read(path, [f"data.presize={presize}"])
        folder = finetune.run(
            settings, str(few), out=tmp_path / f"run-{presize}", device="cpu", log=lines.append
        )
        weights.append((folder / checkpoint.BEST).read_bytes())
    assert weights[0] != weights[1]
    lr_find.lr_find(
        load.read(path, ["data.presize=1", "lr_find.steps=10"]), str(few),
        out=tmp_path / "curve.png", device="cpu", log=lines.append,
    )  # fmt: skip
    parts = sorted(entry.description for entry in cache.entries())
    assert parts == [*(f"train photos at {side} px" for side in (32, 48, 64)),
                     "valid photos at 32 px"]  # fmt: skip
    for presize in (1, 1.5, 2):
        found = load_dataset(str(few))
        _, *sets = decode_dataset(found, settings.preprocess, presize, lines.append)
        assert "15 from the cache" in lines[-1]
        assert_right(found, sets, settings.preprocess, presize)
        assert sets[0].pixels[:1].shape == (1, 32 * presize, 32 * presize, 3)


def test_rows_are_returned_for_any_indices_and_slices(photos, lines):
    found = load_dataset(str(photos))
    _, mapped, _ = decode_dataset(found, SMALL, PRESIZE, lines.append)
    _, streamed, _ = decode_dataset(found, SMALL, PRESIZE, lines.append, 0)
    assert isinstance(mapped.pixels, MemmapRows)
    assert isinstance(streamed.pixels, StreamingRows)
    all_rows = mapped.pixels[:]
    assert torch.equal(mapped.aspect, streamed.aspect)
    order = torch.randperm(len(mapped), generator=torch.Generator().manual_seed(1)).split(7)
    slices = [slice(start, start + 5) for start in range(0, len(mapped), 5)]
    for indices in (order, slices, [torch.tensor([3, 3, 0])], []):
        expected = [all_rows[index] for index in indices]
        for rows in (mapped.pixels, streamed.pixels):
            batches = list(rows.batches(indices))
            assert all(map(torch.equal, batches, expected))
            assert len(batches) == len(expected)
    all_rows[0] = 0  # a copy
    assert not torch.equal(mapped.pixels[:1], all_rows[:1])
    threads = threading.active_count()
    batches = streamed.pixels.batches(order)
    next(batches)
    batches.close()
    assert threading.active_count() == threads


def test_the_number_of_rows_decoded_ahead_is_bounded():
    begun = []
    results = map_ordered(lambda item: begun.append(item) or item, range(1000), window=20)
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
def test_a_photo_changed_during_streaming_is_an_error(photos, lines, damage, message):
    found = load_dataset(str(photos))
    _, train, _ = decode_dataset(found, SMALL, PRESIZE, lines.append, 0)
    changed = next(s.path for s in found.train if s.path.name != "0.jpg")
    damage(changed)
    with pytest.raises(WorkError, match=f"{re.escape(str(changed))} {message}"):
        list(train.pixels.batches([slice(0, 8), slice(8, len(train))]))


@pytest.mark.parametrize("cache_gb", [None, 0])
def test_unreadable_photos_are_logged_and_left_out_every_time(photos, lines, cache_gb):
    broken = photos / "red" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    other, there = photos / "blue" / "4.jpg", load_dataset(str(photos))
    for number in range(2):
        if number:
            other.unlink()
        else:
            other.write_text("not a photo")
        found, *sets = decode_dataset(there, SMALL, PRESIZE, lines.append, cache_gb)
        assert len(found.train) + len(found.valid) == 43
        assert_right(found, sets)
        text = "\n".join(lines)
        assert f"skipped {broken}: the image is broken" in text
        why = ("no image that Fledge reads (JPEG", "No such file or directory")[number]
        assert f"skipped {other}: {why}" in text
        assert "warning: 2 of 45 photos can't be read" in text
        lines.clear()


def test_a_truncated_or_damaged_index_never_gives_wrong_rows(photos, cache, lines):
    found = load_dataset(str(photos))
    decode_dataset(found, SMALL, PRESIZE, lines.append)
    entry = next(e for e in cache.entries() if "train" in e.description)
    index, (rows,) = entry.path / "index", entry.path.glob("rows-*.bin")
    all_records, all_rows = index.read_bytes(), rows.read_bytes()
    record, header = store._RECORD.itemsize, store._HEADER_BYTES
    flipped = bytearray(all_records)
    flipped[header + 3 * record + 5] ^= 4
    rows_left = {
        all_records + b"\0" * 7: 36, all_records + all_records[header : header + 11]: 36,
        all_records[:-1]: 35, all_records[: -record - 9]: 34, all_records + bytes(record): 0,
        bytes(flipped): 0, all_records[: header - 1]: 0, b"": 0,
        all_records.replace(b"pixels 2", b"pixels 1"): 0,
    }  # fmt: skip
    for torn, left in rows_left.items():
        for old in entry.path.glob("rows-*.bin"):
            old.unlink()
        rows.write_bytes(all_rows)
        index.write_bytes(torn)
        _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append)
        assert_right(found, sets)
        assert ("36 decoded" if not left else f"{left + 9} from the cache") in lines[-1]
    rows, *more = entry.path.glob("rows-*.bin")
    assert not more
    rows.write_bytes(rows.read_bytes()[:-1])  # the last row of the index is not in the file
    _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)


def test_the_budget_is_kept_and_the_oldest_entry_is_evicted(photos, cache, lines):
    found = load_dataset(str(photos))
    first, last = Preprocess(size=24), Preprocess(size=64)
    largest = 36 * 3 * PixelTransform("train", last, PRESIZE).side ** 2 + 9 * 3 * last.size**2
    budget = 1.3 * largest / 1e9
    for preprocess in (first, Preprocess(size=48), SMALL, last):
        _, *sets = decode_dataset(found, preprocess, PRESIZE, lines.append, budget)
        assert_right(found, sets, preprocess)
        assert isinstance(sets[0].pixels, MemmapRows)
        assert cache.size() <= budget * 1e9
        if preprocess is first:
            first_train = sets[0]
    names = {entry.path.name for entry in cache.entries()}
    assert PixelTransform("train", first, PRESIZE).name not in names
    assert PixelTransform("train", last, PRESIZE).name in names
    _, _, valid = decode_dataset(found, first, PRESIZE, lines.append)
    assert_right(found, (first_train, valid), first)  # the evicted file is still mapped
    _, *sets = decode_dataset(found, Preprocess(size=256), PRESIZE, lines.append, budget)
    assert isinstance(sets[0].pixels, StreamingRows)


def test_a_store_full_of_other_photos_is_reset(tmp_path, photos, cache, lines):
    other = coloured(tmp_path / "other", {"cyan": 20, "pink": 20})
    budget = 60 * ROW / 1e9  # enough for one dataset, not for both
    for root in (photos, other, photos):
        found = load_dataset(str(root))
        _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append, budget)
        assert_right(found, sets)
        assert isinstance(sets[0].pixels, MemmapRows)
        assert cache.size() <= budget * 1e9
    assert "45 decoded" in lines[-1] or "36 decoded" in lines[-1]


def test_an_unusable_cache_is_a_warning(tmp_path, photos, monkeypatch, lines):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "file" / "cache"))
    found = load_dataset(str(photos))
    _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append)
    assert_right(found, sets)
    assert isinstance(sets[0].pixels, MemmapRows)
    warning, done = lines
    assert warning.startswith(f"warning: the cache {tmp_path}/file/cache can't be used: ")
    assert warning.endswith("; decoded photos go to a temporary file")
    assert re.fullmatch(r"pixels: 45 photos, 45 decoded in \S+ s", done)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores file permissions")
def test_a_read_only_cache_is_read(photos, cache, lines):
    found = load_dataset(str(photos))
    decode_dataset(found, SMALL, PRESIZE, lines.append)
    files = [cache.folder, *cache.folder.rglob("*")]
    for path in files:
        path.chmod(0o555)
    try:
        _, *sets = decode_dataset(found, SMALL, PRESIZE, lines.append)
        assert "45 from the cache" in lines[-1]
        _, *sets = decode_dataset(found, Preprocess(size=24), PRESIZE, lines.append)
        assert_right(found, sets, Preprocess(size=24))
        assert "Permission denied" in lines[-2]
    finally:
        for path in files:
            path.chmod(0o755)


def test_an_invalid_budget_is_an_error_before_anything_is_written(recipe, photos, tmp_path):
    settings = load.read(recipe())
    with pytest.raises(OptionError, match="--cache-gb -1: use gigabytes"):
        finetune.run(settings, str(photos), out=tmp_path / "run", cache_gb=-1)
    with pytest.raises(OptionError, match="--cache-gb -1: use gigabytes"):
        lr_find.lr_find(settings, str(photos), cache_gb=-1)
    assert not (tmp_path / "run").exists()


def forked(function):
    """Call a function in a child process, which then ends without any cleanup."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class StepsOfTheStore:
    """Copies the cache before each step that changes a file: what a kill at this step would leave.

    A row and a record are also copied half written. What Python buffers is in no copy.
    """

    def __init__(self, folder, copies):
        self.folder, self.copies, self.names = folder, copies, []

    def step(self, name):
        shutil.copytree(self.folder, self.copies / str(len(self.names)))
        self.names.append(name)

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        for name in ("fsync", "posix_fallocate", "replace", "unlink"):
            self.patches.setattr(os, name, self.counted(getattr(os, name), name))
        writer = PixelStore.writer

        def open_writer(pixel_store, index, more):
            opened = writer(pixel_store, index, more)
            opened.file = CountedFile(opened.file, self, "row")
            opened.index = CountedFile(opened.index, self, "record")
            return opened

        self.patches.setattr(PixelStore, "writer", open_writer)
        return self

    def __exit__(self, *_):
        self.patches.undo()

    def counted(self, function, name):
        def replaced(*args, **named):
            self.step(name)
            return function(*args, **named)

        return replaced


class CountedFile:
    """A file whose `write` and `truncate` are steps of a `StepsOfTheStore`."""

    def __init__(self, file, steps, name):
        self.file, self.steps, self.name = file, steps, name

    def write(self, data):
        view = memoryview(data).cast("B")
        self.steps.step(f"write {self.name}")
        self.file.write(view[: len(view) // 2])
        self.file.flush()
        self.steps.step(f"write half {self.name}")
        self.file.write(view[len(view) // 2 :])
        return len(view)

    def truncate(self, size):
        self.steps.step("truncate")
        self.file.truncate(size)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_kill_at_any_step_leaves_only_complete_rows(tmp_path, cache, lines, monkeypatch):
    monkeypatch.setattr(store, "FLUSH_BYTES", 2 * ROW)
    found = load_dataset(str(coloured(tmp_path / "four", {"blue": 3, "green": 3})))
    assert (len(found.train), len(found.valid)) == (4, 2)
    transforms = {part: PixelTransform(part, SMALL, PRESIZE) for part in ("train", "valid")}
    right = {
        (part, hashlib.sha256(sample.path.read_bytes()).digest()[:16]): expected_pixels(
            sample, transform
        )
        for part, transform in transforms.items()
        for sample in getattr(found, part)
    }

    def rows_of(folder):
        """The number of rows in the store of each part; each must be right."""
        counts = []
        for part, transform in transforms.items():
            index = PixelStore(folder / transform.name, transform.side).read()
            for digest, row in index.rows.items():
                assert (index.pixels[row] == right[part, digest]).all()
            counts.append(len(index.rows))
        return tuple(counts)

    def decode():
        decode_dataset(found, SMALL, PRESIZE, lines.append)
        assert rows_of(cache.folder) == (4, 2)  # and all are right
        assert cache.size() < 4 * ROW + 2 * 3 * 32**2 + 6 * 24 + 200  # no reserved space is left

    with StepsOfTheStore(cache.folder, tmp_path / "copies") as steps:
        decode()
    names = steps.names
    assert {*names} == {
        "fsync", "replace", "posix_fallocate", "write row", "write half row", "write record",
        "write half record", "truncate",
    }  # fmt: skip
    assert names.count("write row") == 6
    seen = set()
    for number, name in enumerate(names):
        left = tmp_path / "copies" / str(number)
        seen.add(rows_of(left))
        shutil.rmtree(cache.folder)
        shutil.copytree(left, cache.folder)
        if seen == {(0, 0), (1, 0)} and name == "write half record":  # killed a second time
            with StepsOfTheStore(cache.folder, tmp_path / "again") as again:
                decode()
            found_again = [rows_of(tmp_path / "again" / str(i)) for i in range(len(again.names))]
            assert sorted(found_again) == found_again
            assert found_again[0] == (1, 0)
        else:
            decode()
    # Records are written by two; half of them is one record.
    assert seen == {*((rows, 0) for rows in range(5)), (4, 1), (4, 2)}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_two_runs_that_fill_one_cache_at_once_get_the_same_rows(few, cache, lines):
    """The second begins while the first writes; the first goes on when the second waits."""
    found = load_dataset(str(few))
    writing, going_on = os.pipe(), os.pipe()

    def first():
        os.close(going_on[1])  # the read below ends when the second closes its end

        def flush(writer, flush=store.PixelWriter.flush):
            os.write(writing[1], b"1")
            os.read(going_on[0], 1)
            flush(writer)

        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(store.PixelWriter, "flush", flush)
            _, *sets = decode_dataset(found, SMALL, PRESIZE, lambda line: None)
            assert_right(found, sets)

    def log(line):
        lines.append(line)
        if "waiting" in line and len(lines) == 1:
            os.close(going_on[1])

    child = forked(first)
    assert os.read(writing[0], 1) == b"1"
    _, *sets = decode_dataset(found, SMALL, PRESIZE, log)
    assert ended(child) == 0
    for end in (*writing, going_on[0]):
        os.close(end)
    assert_right(found, sets)
    transform = PixelTransform("train", SMALL, PRESIZE)
    assert lines[0] == f"pixels: waiting for another run that decodes {transform}"
    entry = next(e for e in cache.entries() if "train" in e.description)
    index = PixelStore(entry.path, SIDE).read()
    assert len(index.rows) == len(index.pixels) == len({s.path.read_bytes() for s in found.train})


def test_streaming_needs_memory_for_a_few_batches_only(tmp_path):
    """Of 96 rows, about 3 batches of 4 are in memory, and one for each thread."""
    photos = coloured(tmp_path / "many", {"blue": 60, "green": 60}, side=20)
    found, large = load_dataset(str(photos)), Preprocess(size=128)
    row = 3 * PixelTransform("train", large, PRESIZE).side ** 2
    tracemalloc.start()  # numpy tells it of each array
    try:
        _, train, _ = decode_dataset(found, large, PRESIZE, lambda line: None, 0)
        assert len(train) == 96
        for _ in train.pixels.batches(torch.randperm(len(train)).split(4)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * row
