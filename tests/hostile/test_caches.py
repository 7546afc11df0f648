"""Caches of pixels and activations that were changed on the disk, or that others can write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.imaging.preprocess import Preprocess
from tests.support.tiny_bundle import photo
from training.activations.cached_views import TRAILER_BYTES, CachedViews, DiskStore, ViewShape
from training.config.sections import DataConfig
from training.data.dataset import Dataset, load_dataset
from training.pixels.decoded import decode_dataset
from training.pixels.part import PixelSet
from training.utils import disk_cache

SHAPE = ViewShape(5, (4, 2, 2), torch.bfloat16)
NAME = f"activations-{'a' * 32}"
PREPROCESS = Preprocess(size=32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLEDGE_CACHE", str(folder))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    return load_dataset(str(tmp_path / "photos"), config=DataConfig(valid=0.34))


def decoded(photos: Dataset, gigabytes: float | None = None) -> tuple[list[torch.Tensor], str]:
    """The pixels of both parts, and what was logged."""
    lines: list[str] = []
    sets: list[PixelSet]
    _, *sets = decode_dataset(photos, PREPROCESS, 1.5, lines.append, gigabytes)
    return [part.pixels[:] for part in sets], "\n".join(lines)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_changed_row_is_noticed_and_decoded_again(photos: Dataset, cache: Path) -> None:
    right, _ = decoded(photos)
    assert "12 from the cache" in decoded(photos)[1]
    for path in cache.glob("pixels-*/rows-*.bin"):
        data = bytearray(path.read_bytes())
        for at in (0, len(data) // 2, len(data) - 1):
            data[at] ^= 1
            path.write_bytes(data)
            found, log = decoded(photos)
            assert equal(found, right)
            assert "photos were changed on the disk; all are decoded again" in log
            (path,) = path.parent.glob("rows-*.bin")
            assert "12 from the cache" in decoded(photos)[1]
            data = bytearray(path.read_bytes())


def test_rows_that_changed_places_are_noticed(photos: Dataset, cache: Path) -> None:
    right, _ = decoded(photos)
    for path in cache.glob("pixels-*/rows-*.bin"):
        data = np.frombuffer(path.read_bytes(), np.uint8)
        train = data.size % len(photos.train) == 0
        rows = data.reshape(len(photos.train if train else photos.valid), -1)
        path.write_bytes(rows[::-1].tobytes())
    found, log = decoded(photos)
    assert equal(found, right)
    assert log.count("changed on the disk") == 2


def numbered(number: int):
    for start in (0, 3):
        index = torch.arange(start, min(start + 3, 5))
        yield index, right_view(number)[index]


def right_view(number: int) -> torch.Tensor:
    flat = torch.arange(SHAPE.count, dtype=torch.float32) + 8 * number
    return SHAPE.unflatten(flat.to(SHAPE.dtype))


def views(cache: Path, lines: list[str]) -> CachedViews:
    store = DiskStore(disk_cache.DiskCache(cache, 10**6), NAME, "a test", {NAME}, lines.append)
    return CachedViews(SHAPE, numbered, store)


@pytest.mark.parametrize("place", [0, 50, SHAPE.size - 1, SHAPE.size, SHAPE.size + 7])
def test_a_changed_view_is_noticed_and_computed_again(cache: Path, place: int) -> None:
    lines: list[str] = []
    views(cache, lines).prepare([0])
    (path,) = cache.glob("*/view-*.bin")
    data = bytearray(path.read_bytes())
    assert len(data) == SHAPE.size + TRAILER_BYTES
    right = bytes(data)
    data[place] ^= 1
    path.write_bytes(data)
    found = views(cache, lines)
    found.prepare([0])
    assert torch.equal(found[0], right_view(0))
    assert "was changed on the disk" in lines[0]
    assert path.read_bytes() == right
    lines.clear()
    assert torch.equal(views(cache, lines)[0], right_view(0))
    assert not lines


def test_folders_and_files_are_for_this_user_alone(photos: Dataset, cache: Path) -> None:
    before = os.umask(0)
    try:
        decoded(photos)
        views(cache, []).prepare([0])
    finally:
        os.umask(before)
    paths = [cache, *cache.rglob("*")]
    assert len(paths) > 8
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
@pytest.mark.parametrize("place", ["cache", "entry"])
def test_a_cache_that_others_can_write_is_not_used(
    photos: Dataset, cache: Path, mode: int, place: str
) -> None:
    right, _ = decoded(photos)
    lines: list[str] = []
    views(cache, lines).prepare([0])
    folders = [cache] if place == "cache" else list(cache.iterdir())
    for folder in folders:
        folder.chmod(mode)
    for path in cache.glob("*/*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    found, log = decoded(photos)
    assert equal(found, right)
    assert "can't be used: others can write to it; use `chmod go-w " in log
    assert "12 decoded" in log
    again = views(cache, lines)
    again.prepare([0])
    assert torch.equal(again[0], right_view(0))
    assert len(lines) == 1
    assert "others can write to it" in lines[0]
    for folder in folders:
        folder.chmod(0o700)
    found, log = decoded(photos)
    assert equal(found, right)
    assert "changed on the disk" in log


def test_a_cache_that_others_can_read_is_used(photos: Dataset, cache: Path) -> None:
    cache.mkdir(mode=0o755)
    decoded(photos)
    assert "12 from the cache" in decoded(photos)[1]


@pytest.mark.parametrize("kind", ["link", "other"])
def test_an_entry_that_is_not_ours_is_not_used(
    photos: Dataset, cache: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "other" and os.geteuid():
        pytest.skip("needs root")
    right, _ = decoded(photos)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "rows-0123456789abcdef.bin").write_text("mine")
    for entry in list(cache.iterdir()):
        if kind == "link":
            entry.rename(tmp_path / entry.name)
            entry.symlink_to(precious)
        else:
            os.chown(entry, 12345, 12345)
    found, log = decoded(photos)
    assert equal(found, right)
    assert "can't be used: it" in log
    assert [path.name for path in precious.iterdir()] == ["rows-0123456789abcdef.bin"]
