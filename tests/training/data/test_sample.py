"""The built-in sample dataset: reproducible, complete or absent, not separable by colour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.errors import DataError, OptionError
from training.data import sample

Features = NDArray[np.float64]

CHANCE = 1 / len(sample.CLASSES)


def picture(label: str, *key: int, size: int = 64) -> bytes:
    return sample.paint(label, np.random.default_rng(key), size).tobytes()


@pytest.mark.parametrize("label", sample.CLASSES)
def test_equal_seeds_give_equal_pictures_and_other_seeds_different_ones(label: str) -> None:
    assert picture(label, 3, 1) == picture(label, 3, 1)
    assert picture(label, 3, 1) != picture(label, 3, 2)


@pytest.mark.parametrize("size", [32, 97, 160])
def test_paint_gives_an_rgb_image_of_the_requested_size(size: int) -> None:
    painted = sample.paint("lily", np.random.default_rng(0), size)
    assert (painted.mode, painted.size) == ("RGB", (size, size))
    assert np.asarray(painted).std() > 5


def test_class_names_are_unique_and_sorted() -> None:
    assert len(set(sample.CLASSES)) == len(sample.CLASSES) >= 8
    assert list(sample.CLASSES) == sorted(sample.CLASSES)  # the order of the class indices


def test_an_unknown_class_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        sample.paint("cactus", np.random.default_rng(0))


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.jpg")}


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of two pictures of each class."""
    folder = tmp_path_factory.mktemp("sample") / "set"
    return read(sample.write_sample(folder, per_class=2, size=48))


def test_equal_seeds_write_equal_photos_and_other_seeds_different_ones(
    tmp_path: Path, twenty: dict[str, bytes]
) -> None:
    assert set(twenty) == {f"{c}/{i:04d}.jpg" for c in sample.CLASSES for i in range(2)}
    assert len(set(twenty.values())) == len(twenty)
    # A picture does not depend on how many are written.
    first = read(sample.write_sample(tmp_path / "a", per_class=1, size=48))
    assert first == {name: twenty[name] for name in twenty if name.endswith("0000.jpg")}
    other = read(sample.write_sample(tmp_path / "b", per_class=1, size=48, seed=1))
    assert first.keys() == other.keys()
    assert not set(twenty.values()) & set(other.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_interrupted_write_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted = []

    def fails_at_the_fifth(label: str, rng: np.random.Generator, size: int) -> Image.Image:
        painted.append(label)
        if len(painted) == 5:
            raise KeyboardInterrupt
        return Image.new("RGB", (size, size))

    monkeypatch.setattr(sample, "paint", fails_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        sample.write_sample(tmp_path / "set", per_class=2, size=48)
    assert len(painted) == 5
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "set", []

    def check_folder(label: str, rng: np.random.Generator, size: int) -> Image.Image:
        seen.append(folder.exists())
        return Image.new("RGB", (size, size))

    monkeypatch.setattr(sample, "paint", check_folder)
    sample.write_sample(folder, per_class=1, size=48)
    assert len(seen) == len(sample.CLASSES)
    assert not any(seen)
    assert folder.is_dir()


def test_partial_folders_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sample, "write_sample", partial(sample.write_sample, per_class=1, size=48))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    for _ in range(2):  # first call writes the set, second call finds it
        place = tmp_path / "fledge"
        name = sample.cached_sample().name
        for process in (ended.pid, os.getppid()):
            (place / f".{name}.partial-{process}" / "daisy").mkdir(parents=True)
        sample.cached_sample()
        assert {p.name for p in place.iterdir()} == {name, f".{name}.partial-{os.getppid()}"}
        shutil.rmtree(place / f".{name}.partial-{os.getppid()}")


def test_write_refuses_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="exists already"):
        sample.write_sample(tmp_path / "set", per_class=1)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_write_refuses_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match=r"^/.*/file/set: /.*/file can't be written to; choose"):
        sample.write_sample(tmp_path / "file" / "set", per_class=1)


@pytest.mark.parametrize("wrong", [{"per_class": 0}, {"seed": -1}, {"size": 8}])
def test_write_refuses_numbers_out_of_range(tmp_path: Path, wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(DataError, match=rf"^--{name.replace('_', '-')} {value}: use \d+ or more$"):
        sample.write_sample(tmp_path / "set", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_cached_sample_is_written_once_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = []

    def other_process_is_first(folder: Path, *, seed: int) -> Path:
        written.append(seed)
        folder.mkdir(parents=True)
        raise DataError(f"{folder} exists already")

    monkeypatch.setattr(sample, "write_sample", other_process_is_first)
    folder = sample.cached_sample()
    assert folder.parent == tmp_path / "fledge"
    assert folder.name.startswith(f"sample-v{sample.VERSION}-")
    assert sample.cached_sample() == folder
    assert sample.cached_sample(seed=1) != folder
    assert written == [0, 1]


def test_cached_sample_raises_errors_of_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match="seed"):
        sample.cached_sample(seed=-1)


def test_the_contact_sheet_has_one_row_per_class() -> None:
    sheet = sample.contact_sheet(columns=2, size=48)
    assert sheet.width == 96
    assert sheet.height % len(sample.CLASSES) == 0
    assert sheet.height > 48 * len(sample.CLASSES)


# --- colour and coarse layout must not reveal the class ------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """12 pictures of each class and their labels [120]."""
    count = 12
    painted = [
        sample.paint(label, np.random.default_rng([7, row, index]), 64)
        for row, label in enumerate(sample.CLASSES)
        for index in range(count)
    ]
    return painted, np.repeat(np.arange(len(sample.CLASSES)), count)


def histogram(image: Image.Image) -> Features:
    """Square roots of a normalised 8 x 8 x 8 colour histogram [512]."""
    levels = np.asarray(image).reshape(-1, 3) // 32
    counts = np.bincount(levels @ np.array([64, 8, 1]), minlength=512)
    return np.asarray(np.sqrt(counts / counts.sum()), np.float64)


def thumbnail(image: Image.Image) -> Features:
    """Pixels of the picture at 16 x 16 [768], 0 to 1."""
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float64).ravel() / 255


def linear_accuracy(features: Features, labels: NDArray[np.int64]) -> tuple[float, float]:
    """(train, validation) accuracy of a logistic regression, the mean of four folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_validate
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500))
    found = cross_validate(model, features, labels, cv=4, return_train_score=True)
    return float(found["train_score"].mean()), float(found["test_score"].mean())


@pytest.mark.process  # painting takes 30 ms a picture
@pytest.mark.parametrize("describe", [histogram, thumbnail])
def test_a_linear_model_can_not_separate_the_classes(
    pictures: tuple[list[Image.Image], NDArray[np.int64]], describe: object
) -> None:
    assert callable(describe)
    images, labels = pictures
    fitted, valid = linear_accuracy(np.stack([describe(image) for image in images]), labels)
    assert fitted > 0.6, "the regression must fit, else the validation accuracy means nothing"
    # Documented: below 0.6. With 12 pictures of each class, a tint of each class gives 0.4.
    assert CHANCE < valid < 0.35
