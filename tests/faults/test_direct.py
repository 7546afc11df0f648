"""Sweeps of small jobs in this process: every file operation fails once."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.bundle import storage
from serving.errors import BundleError, FledgeError
from serving.inference.load import open_predictor
from serving.scoring import journal, score
from serving.scoring.options import ScoringOptions
from serving.utils.files import atomic_folder, atomic_write
from tests.faults.file_operations import ERRNOS, FileOperations, Operation
from tests.faults.sweep import content_key
from tests.support.tiny_bundle import photo, tiny_bundle


def faults(
    work: Path, run: Callable[[], object]
) -> Iterator[tuple[Operation, int, BaseException | None]]:
    """Fail each file operation of `run` in `work` once, from the same files each time.

    Yields:
        The operation, its error number, and the exception of `run`.
    """
    kept = work.with_name("kept")
    shutil.copytree(work, kept)
    with FileOperations(work) as recorded:
        run()
    for number, operation in enumerate(recorded.operations):
        shutil.rmtree(work)
        shutil.copytree(kept, work)
        error = ERRNOS[number % len(ERRNOS)]
        caught = None
        with FileOperations(work, number, error) as operations:
            try:
                run()
            except (FledgeError, OSError) as raised:
                caught = raised
        assert operations.failed
        yield operation, error, caught
    assert recorded.operations


def again(work: Path, run: Callable[[], object]) -> None:
    """Run the job again. No operation fails; nothing waits for the disk."""
    with FileOperations(work):
        run()


def test_a_written_file_is_the_old_or_the_new_one_and_the_error_names_it(tmp_path: Path) -> None:
    path = tmp_path / "work" / "file"
    path.parent.mkdir()
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as partial:
            partial.write_text("new")

    for operation, error, caught in faults(path.parent, write):
        if caught is None:
            assert operation.kind in ("lock", "list")
            assert path.read_text() == "new"
            continue
        assert isinstance(caught, OSError)
        assert caught.errno == error
        assert path.read_text() in ("old", "new")
        assert str(path) in str(caught) or operation.kind == "unlink"
        again(path.parent, write)
        assert [(one.name, one.read_text()) for one in path.parent.iterdir()] == [("file", "new")]


def test_a_written_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "work" / "folder"
    path.mkdir(parents=True)
    (path / "old").write_text("old")

    def write() -> None:
        with atomic_folder(path) as partial:
            (partial / "new").write_text("new")

    for _operation, error, caught in faults(path.parent, write):
        assert [one.name for one in path.iterdir()] in (["old"], ["new"])
        assert caught is None or caught.errno == error
        again(path.parent, write)
        assert [one.name for one in path.parent.iterdir()] == ["folder"]
        assert [one.name for one in path.iterdir()] == ["new"]


def test_a_bundle_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "work")
    old = storage.read(folder).manifest
    new = old.model_copy(update={"name": "new"})
    for operation, _error, caught in faults(folder, lambda: storage.publish(new, folder)):
        name = storage.read(folder).manifest.name
        assert name in (old.name, "new")
        assert caught is not None or name == "new", operation
        again(folder, lambda: storage.publish(new, folder))
        assert storage.read(folder).manifest == new
        assert len((folder / storage.CHECKSUM).read_text().split()) == 2


def test_three_photos_are_scored_or_the_error_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, photos = tmp_path / "work", tmp_path / "photos"
    work.mkdir()
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.jpg").write_bytes(photo(number))
    bundle = tiny_bundle(tmp_path / "bundle")
    predictor = open_predictor(bundle, device="cpu", threads=1)
    monkeypatch.setattr(score, "open_predictor", lambda *_, **__: predictor)
    monkeypatch.setattr(journal, "SIZE", 2)
    out = work / "scores.csv"
    out.write_text("old")

    def run() -> None:
        options = ScoringOptions(workers=1, device="cpu")
        score.score([str(photos)], bundle, out, options, log=lambda line: None)

    def shown() -> list[str]:
        return sorted(path.name for path in work.iterdir())

    complete, checked = None, set()
    for operation, error, caught in faults(work, run):
        left = out.read_text()
        if caught:
            assert isinstance(caught, FledgeError), operation
            assert not isinstance(caught, BundleError)
            assert str(out.with_suffix("")) in str(caught)
            assert os.strerror(error) in str(caught) or operation.kind == "lock"
        else:
            assert left == complete
            own = operation.path in (".scores.csv.parts/lock", ".scores.csv.parts")
            assert own or operation.kind in ("lock", "list")
        key = content_key(work, os.getpid())
        if key in checked:  # the job was run again from the same files before
            continue
        checked.add(key)
        again(work, run)
        complete = complete or out.read_text()
        assert left in ("old", complete)
        assert out.read_text() == complete
        assert shown() == ["scores.csv", "scores.summary.json"]
