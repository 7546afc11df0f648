"""The settings of the service: environment variables, checked at start, all mistakes at once."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from serving.bundle import signing
from serving.errors import OptionError
from serving.imaging import decode
from serving.utils.cpu import cores

DEVICES: Final = ("auto", "cpu", "cuda", "tensorrt")
PRECISIONS: Final = ("auto", "fp32", "int8", "fp16")
RUNTIMES: Final = ("onnx", "torchscript")
# What others of our parts read, and what Kubernetes sets for a service that is called fledge-x.
_OTHERS: Final = re.compile(
    "FLEDGE_(BUNDLE_DIR|CACHE|CACHE_GB|IMAGE|SCRATCH)|"
    r"FLEDGE_(.+_)?(PORT(_\d+_\w+)?|SERVICE_HOST|SERVICE_PORT(_\w+)?)"
)


def bundle_folder(environ: Mapping[str, str]) -> Path:
    """What FLEDGE_BUNDLE names, else the Bento's own, else `bundle` here or beside this package."""
    stated = environ.get("FLEDGE_BUNDLE", "").strip()
    return Path(stated) if stated else _bundle()


def _bundle() -> Path:
    here, beside = Path("bundle"), Path(__file__).parent.parent / "bundle"
    # BENTO/bento.yaml, BENTO/src/serving, BENTO/src/bundle
    in_bento = (beside.parent.parent / "bento.yaml").is_file()
    return beside if beside.is_dir() and (in_bento or not here.is_dir()) else here


@dataclass(frozen=True)
class Settings:
    """What an operator may decide; the bundle decides the rest.

    bundle: folder that holds `manifest.json`; in a Bento its own, else `bundle` here or beside this
        package.
    device: auto, cpu, cuda or tensorrt; only auto may fall back, and says so.
    precision: auto, fp32, int8 or fp16; auto takes the fastest that the bundle keeps.
    runtime: onnx, or torchscript, which needs torch and answers in fp32.
    workers: processes that share the port; each has its own copy of the model.
    max_batch: graph rows (images times views) that run together; None takes the bundle's tuning.
    max_queue: images that a worker holds unanswered; one more is refused with 429.
    max_bytes: of an image, and of a whole request.
    max_pixels: of an image, width times height.
    deadline: seconds that an image may take from its turn in the service to its answer; later is
        a 504.
    api_keys: sha256 digests of the keys that may ask; empty lets everybody in.
    """

    bundle: Path = field(default_factory=_bundle)
    device: str = "auto"
    precision: str = "auto"
    runtime: str = RUNTIMES[0]
    workers: int = 1
    max_batch: int | None = None
    max_queue: int = 64
    max_bytes: int = decode.MAX_BYTES
    max_pixels: int = decode.MAX_PIXELS
    deadline: float = 10.0
    api_keys: frozenset[bytes] = field(default_factory=frozenset)

    @property
    def threads(self) -> int:
        """Cores that one worker may keep busy."""
        return max(1, cores() // self.workers)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `FLEDGE_*`. A variable that is empty counts as not set.

        Raises:
            OptionError: One line that names every variable at fault and its value.
        """
        reader = _Reader(os.environ if environ is None else environ)
        settings = cls(
            bundle=bundle_folder(reader.environ),
            device=reader.choice("FLEDGE_DEVICE", DEVICES),
            precision=reader.choice("FLEDGE_PRECISION", PRECISIONS),
            runtime=reader.choice("FLEDGE_RUNTIME", RUNTIMES),
            workers=reader.whole("FLEDGE_WORKERS", cls.workers, 1, 256),
            max_batch=reader.whole("FLEDGE_MAX_BATCH", 0, 1, 4096) or None,
            max_queue=reader.whole("FLEDGE_MAX_QUEUE", cls.max_queue, 1, 1_000_000),
            max_bytes=reader.whole("FLEDGE_MAX_BYTES", cls.max_bytes, 1024, 2**31),
            max_pixels=reader.whole("FLEDGE_MAX_PIXELS", cls.max_pixels, 64, 2**31),
            deadline=reader.seconds("FLEDGE_DEADLINE", cls.deadline),
            api_keys=reader.keys("FLEDGE_API_KEYS_FILE"),
        )
        reader.trusted_keys()
        reader.misspelt()
        if reader.mistakes:
            raise OptionError("; ".join(reader.mistakes))
        return settings


class _Reader:
    """Reads variables and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.mistakes: list[str] = []
        self._known = {"FLEDGE_BUNDLE", signing.TRUSTED}

    def text(self, name: str, default: str) -> str:
        self._known.add(name)
        return self.environ.get(name, "").strip() or default

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name, choices[0])
        if value not in choices:
            self.mistakes.append(f"{name} = {value!r}: use {', '.join(choices)}")
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        text = self.text(name, "")
        if not text:
            return default
        # Twelve digits are more than any of these has; of a thousand int() itself would raise.
        if re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        self.mistakes.append(f"{name} = {text[:20]!r}: use a whole number, {low} to {high}")
        return default

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name, str(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0.001 <= value <= 3600:
            self.mistakes.append(f"{name} = {text!r}: use seconds, 0.001 to 3600")
        return value

    def keys(self, name: str) -> frozenset[bytes]:
        path = self.text(name, "")
        if not path:
            return frozenset()
        try:
            lines = [line.strip() for line in Path(path).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            self.mistakes.append(f"{name} = {path!r}: can't be read ({error})")
            return frozenset()
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            # An empty list must not open the door that the operator meant to close.
            self.mistakes.append(f"{name} = {path!r}: has no key; write one a line")
        return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)

    def trusted_keys(self) -> None:
        """Only checked: `serving.bundle.storage` reads them whenever it reads a bundle."""
        try:
            signing.trusted(self.environ)
        except OptionError as error:
            self.mistakes.append(str(error))

    def misspelt(self) -> None:
        """A limit or a key file that nobody reads would look like one that holds."""
        for name, value in self.environ.items():
            ours = name.startswith("FLEDGE_") and value.strip() and not _OTHERS.fullmatch(name)
            if ours and name not in self._known:
                for near in difflib.get_close_matches(name, self._known, 1, 0.82):
                    self.mistakes.append(f"{name}: no such variable; did you mean {near}?")
