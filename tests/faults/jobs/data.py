"""Jobs that write photos and caches: the sample data set, decoded pixels, frozen activations."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from serving.errors import FledgeError
from serving.imaging.preprocess import Preprocess
from tests.faults.file_operations import READING, Operation
from tests.faults.jobs.base import CommandJob
from tests.support.tiny_bundle import photo
from training.activations.cached_views import CachedViews, DiskStore, ViewShape
from training.config.sections import DataConfig
from training.data import sample
from training.data.dataset import Dataset, load_dataset
from training.pixels import decoded, store
from training.pixels.transform import PixelTransform
from training.utils import disk_cache

torch.set_num_threads(1)


class Sample(CommandJob):
    """The sample data set, one picture of each class."""

    def prepare(self) -> None:
        pass

    def command(self) -> list[str]:
        sample.paint = self.paint  # the real pictures take long
        return ["sample", str(self.work / "flowers"), "--per-class", "1"]

    def paint(self, label: str, rng: Any, size: int) -> Image.Image:
        return Image.new("RGB", (16, 16), tuple(rng.integers(0, 256, 3).tolist()))

    def again(self) -> int:
        # A complete folder is refused.
        return 0 if (self.work / "flowers").exists() else self.run()

    def result(self) -> dict[str, Any]:
        folder = self.work / "flowers"
        return {"pictures": _hash(folder) if folder.exists() else None}


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


class CacheJob(CommandJob):
    """A job whose faults cost time, but no result: a cache that fails is not used."""

    def run(self) -> int:
        tempfile.tempdir = str(self.work / "tmp")
        os.environ["FLEDGE_CACHE"] = str(self.work / "cache")
        try:
            self.compute()
        except FledgeError as error:  # as fledge.main
            print(f"fledge: {error}", file=sys.stderr)
            return error.exit_status
        return 0

    def compute(self) -> None:
        """Compute what is cached, and check it."""
        raise NotImplementedError

    def tolerates(self, operation: Operation) -> bool:
        return True

    def says_why(self, operation: Operation) -> bool:
        return operation.kind not in READING


class Pixels(CacheJob):
    """Decoded photos are added to a cache that has those of another data set."""

    gigabytes: float | None = None
    preprocess = Preprocess(size=32)

    def prepare(self) -> None:
        for name, first in (("old", 0), ("new", 100)):
            for number in range(6):
                path = self.inputs / name / "ab"[number % 2] / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(photo(first + number))
        (self.work / "tmp").mkdir()
        os.environ["FLEDGE_CACHE"] = str(self.work / "cache")
        self.decode("old", self.gigabytes)
        torch.save(self.decode("new", 0), self.inputs / "expected")
        rows = self.rows()
        (self.inputs / "old.json").write_text(json.dumps(rows))

    def decode(self, name: str, gigabytes: float | None) -> list[Any]:
        """Return pixels, aspect ratios and labels of both parts."""
        store.FLUSH_BYTES = 3 * 32 * 32 * 2  # type: ignore[misc]
        found = decoded.decode_dataset(
            self.dataset(name), self.preprocess, 1.5, lambda line: print(line), gigabytes
        )
        return [(part.pixels[:], part.aspect, part.labels) for part in found[1:]]

    def dataset(self, name: str) -> Dataset:
        return load_dataset(str(self.inputs / name), config=DataConfig(valid=0.34))

    def compute(self) -> None:
        found = self.decode("new", self.gigabytes)
        expected = torch.load(self.inputs / "expected")
        for part, right in zip(found, expected, strict=True):
            for tensor, other in zip(part, right, strict=True):
                assert torch.equal(tensor, other)

    def result(self) -> dict[str, Any]:
        """Return the photos of the new data set in the cache. Those of the old one may be lost."""
        old = json.loads((self.inputs / "old.json").read_text())
        rows = self.rows()
        assert all(value == old.get(key, value) for key, value in rows.items())
        return {key: value for key, value in rows.items() if key not in old}

    def rows(self) -> dict[str, str]:
        """Return a hash of the pixels of each photo in the cache."""
        rows: dict[str, str] = {}
        for part in ("train", "valid"):
            transform = PixelTransform(part, self.preprocess, 1.5)
            index = store.PixelStore(self.work / "cache" / transform.name, transform.side).read()
            for digest, row in index.rows.items():
                key = f"{part} {digest.hex()}"
                rows[key] = hashlib.sha256(index.pixels[row].tobytes()).hexdigest()
                rows[key] += f" {index.aspect[row]:.6f}"
        return rows


class PixelsEvict(Pixels):
    """The cache has no space for both data sets: the older one goes, and another entry."""

    # Four training photos of 48 x 48 pixels and two validation photos of 32 x 32.
    gigabytes = (4 * 3 * 48 * 48 + 2 * 3 * 32 * 32 + 1000) / 1e9

    def prepare(self) -> None:
        super().prepare()
        entry = self.work / "cache" / f"activations-{'a' * 32}"
        with disk_cache.locked_entry(entry, "older", lambda: None):
            (entry / f"view-{'0' * 16}.bin").write_bytes(bytes(900))
        os.utime(entry / disk_cache.ENTRY_FILE, (1, 1))


class Activations(CacheJob):
    """A second view of frozen activations is added to a cache that has the first."""

    shape = ViewShape(5, (4, 2, 2), torch.float32)
    name = f"activations-{'b' * 32}"

    def prepare(self) -> None:
        (self.work / "tmp").mkdir()
        self.views().prepare([0])

    def views(self) -> CachedViews:
        cache = disk_cache.DiskCache(self.work / "cache", 10**6)
        disk = DiskStore(cache, self.name, "of a test", {self.name}, lambda line: print(line))
        return CachedViews(self.shape, self.parts, disk)

    def parts(self, number: int) -> Any:
        for start in (0, 3):
            index = torch.arange(start, min(start + 3, 5))
            yield index, self.rows(number)[index]

    def rows(self, number: int) -> torch.Tensor:
        count = self.shape.count
        flat = torch.arange(count, dtype=torch.float32) + 1000 * (number + 1)
        return self.shape.unflatten(flat)

    def compute(self) -> None:
        views = self.views()
        views.prepare([0, 1])
        for number in (0, 1):
            assert torch.equal(views[number], self.rows(number))

    def result(self) -> dict[str, Any]:
        folder = self.work / "cache" / self.name
        found = {path.name: path.read_bytes() for path in folder.glob("view-*.bin")}
        for number in (0, 1):
            data = found.get(f"view-{number:016x}.bin")
            data = data and data[: self.shape.size]  # a checksum follows
            flat = self.rows(number).permute(0, 2, 3, 1).contiguous().numpy().tobytes()
            assert data in (None, flat), f"view {number} is damaged"
        return dict(found)
