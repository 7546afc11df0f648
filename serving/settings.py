"""Settings of the HTTP service, read from the environment variables `FLEDGE_*`.

All wrong variables are reported in one error.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, overload

from serving.bundle import signing
from serving.errors import OptionError
from serving.imaging import decode
from serving.utils.cpu import cores

DEVICES: Final = ("auto", "cpu", "cuda", "tensorrt")
PRECISIONS: Final = ("auto", "fp32", "int8", "fp16")
RUNTIMES: Final = ("onnx", "torchscript")
# Variables that other parts of Fledge read, and those that Kubernetes sets for a service whose name
# begins with fledge-.
_OTHER_VARIABLES: Final = re.compile(
    "FLEDGE_(BUNDLE_DIR|CACHE|CACHE_GB|IMAGE|SCRATCH)|"
    r"FLEDGE_(.+_)?(PORT(_\d+_\w+)?|SERVICE_HOST|SERVICE_PORT(_\w+)?)"
)
_HOST: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?|[0-9a-f:]{2,45}")
_ORIGIN: Final = re.compile(
    r"null|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)


def bundle_folder(environ: Mapping[str, str]) -> Path:
    """Return the path in FLEDGE_BUNDLE or, if the variable is empty, the default bundle folder."""
    path = environ.get("FLEDGE_BUNDLE", "").strip()
    return Path(path) if path else _default_bundle()


def load_timeout(environ: Mapping[str, str] | None = None) -> float | None:
    """Return the value of FLEDGE_LOAD_TIMEOUT for commands without other settings.

    Raises:
        OptionError: The value is wrong.
    """
    reader = _Reader(os.environ if environ is None else environ)
    seconds = reader.seconds("FLEDGE_LOAD_TIMEOUT", None)
    if reader.errors:
        raise OptionError(reader.errors[0])
    return seconds


def _default_bundle() -> Path:
    here, beside = Path("bundle"), Path(__file__).parent.parent / "bundle"
    # BENTO/bento.yaml, BENTO/src/serving, BENTO/src/bundle
    in_bento = (beside.parent.parent / "bento.yaml").is_file()
    return beside if beside.is_dir() and (in_bento or not here.is_dir()) else here


@dataclass(frozen=True)
class Settings:
    """Settings of the HTTP service. Everything that decides answers is in the bundle instead.

    Attributes:
        bundle: Folder that contains `manifest.json`. Default: the bundle inside the Bento; without
            a Bento, `bundle` in the current folder or beside this package.
        device: auto, cpu, cuda or tensorrt. Only auto may fall back to another device, which is
            logged.
        precision: auto, fp32, int8 or fp16; auto takes the fastest precision in the bundle.
        runtime: onnx or torchscript. TorchScript needs torch and has fp32 only.
        workers: Number of processes that share the port. Every process has a copy of the model.
        max_batch: Largest batch of one run of the graph, in rows (images times TTA views). None
            takes the value that was measured at export.
        max_queue: Largest number of images that a worker has accepted and not answered yet. Further
            images are rejected with status 429.
        max_bytes: Largest size in bytes of one image, and of all images of a request together.
        max_pixels: Largest width times height of an image.
        max_memory: Bytes that a worker may take for the bodies of requests and for decoding their
            images, all together. None takes what the container's limit leaves; see
            `serving.server.memory_needs`.
        deadline: Largest time from queueing an image to its answer, in seconds. A slower answer
            becomes a response with status 504.
        load_timeout: Largest time for loading a bundle and predicting its golden images, in
            seconds. None: 60, or 1200 on a GPU.
        tls_cert: PEM file with the certificate of the service; None for plain HTTP.
        tls_key: PEM file with the private key of `tls_cert`.
        hosts: Host names, in lower case, that requests may name besides those of loopback. If
            empty, names are checked only while the service listens on loopback.
        cors_origins: Origins of web pages that may use the service, or "*" for all.
        max_connections: Largest number of connections of a worker. None: as many as the limit on
            open files allows, at most 4096, with TLS 1024.
        api_keys: sha256 digests of the accepted API keys; if empty, no key is needed.
        key_rate: Images per second that each key may send, over all workers; 0 for no limit.
    """

    bundle: Path = field(default_factory=_default_bundle)
    device: str = "auto"
    precision: str = "auto"
    runtime: str = RUNTIMES[0]
    workers: int = 1
    max_batch: int | None = None
    max_queue: int = 64
    max_bytes: int = decode.MAX_BYTES
    max_pixels: int = 50_000_000
    max_memory: int | None = None
    deadline: float = 10.0
    load_timeout: float | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)
    cors_origins: frozenset[str] = field(default_factory=frozenset)
    max_connections: int | None = None
    api_keys: frozenset[bytes] = field(default_factory=frozenset)
    key_rate: float = 0.0

    @property
    def threads(self) -> int:
        """Number of CPU cores that one worker process may use."""
        return max(1, cores() // self.workers)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the variables `FLEDGE_*`; an empty variable counts as not set.

        Args:
            environ: Environment variables. None: those of this process.

        Raises:
            OptionError: A variable has a wrong value or a misspelt name. The message names all
                wrong variables in one line.
        """
        reader = _Reader(os.environ if environ is None else environ)
        settings = cls(
            bundle=bundle_folder(reader.environ),
            device=reader.choice("FLEDGE_DEVICE", DEVICES),
            precision=reader.choice("FLEDGE_PRECISION", PRECISIONS),
            runtime=reader.choice("FLEDGE_RUNTIME", RUNTIMES),
            workers=reader.integer("FLEDGE_WORKERS", cls.workers, 1, 256),
            max_batch=reader.integer("FLEDGE_MAX_BATCH", 0, 1, 4096) or None,
            max_queue=reader.integer("FLEDGE_MAX_QUEUE", cls.max_queue, 1, 1_000_000),
            max_bytes=reader.integer("FLEDGE_MAX_BYTES", cls.max_bytes, 1024, 2**31),
            max_pixels=reader.integer("FLEDGE_MAX_PIXELS", cls.max_pixels, 64, 2**31),
            max_memory=reader.integer("FLEDGE_MAX_MEMORY", 0, 2**24, 2**40) or None,
            deadline=reader.seconds("FLEDGE_DEADLINE", cls.deadline),
            load_timeout=reader.seconds("FLEDGE_LOAD_TIMEOUT", None),
            tls_cert=reader.path("FLEDGE_TLS_CERT"),
            tls_key=reader.path("FLEDGE_TLS_KEY"),
            hosts=reader.names("FLEDGE_HOSTS", _HOST, "host names without port, such as a.example"),
            cors_origins=reader.names("FLEDGE_CORS_ORIGINS", _ORIGIN, "origins, such as https://a"),
            max_connections=reader.integer("FLEDGE_MAX_CONNECTIONS", 0, 1, 1_000_000) or None,
            api_keys=reader.keys("FLEDGE_API_KEYS_FILE"),
            key_rate=reader.rate("FLEDGE_KEY_RATE"),
        )
        if settings.key_rate and not reader.text("FLEDGE_API_KEYS_FILE", ""):
            reader.errors.append(
                "FLEDGE_KEY_RATE: set FLEDGE_API_KEYS_FILE too, or no key is known"
            )
        if (settings.tls_cert is None) != (settings.tls_key is None):
            reader.errors.append("FLEDGE_TLS_CERT, FLEDGE_TLS_KEY: set both, or none")
        reader.check_trusted_keys()
        reader.check_misspelt()
        if reader.errors:
            raise OptionError("; ".join(reader.errors))
        return settings


class _Reader:
    """Reads environment variables and collects the error messages in `errors`."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.errors: list[str] = []
        self._known = {"FLEDGE_BUNDLE", signing.TRUSTED}

    def text(self, name: str, default: str) -> str:
        self._known.add(name)
        return self.environ.get(name, "").strip() or default

    def path(self, name: str) -> Path | None:
        text = self.text(name, "")
        return Path(text) if text else None

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name, choices[0])
        if value not in choices:
            self.errors.append(f"{name} = {value!r}: use {', '.join(choices)}")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        text = self.text(name, "")
        if not text:
            return default
        # At most 12 digits, because int() raises ValueError for more than 4300.
        if re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        self.errors.append(f"{name} = {text[:20]!r}: use a whole number, {low} to {high}")
        return default

    @overload
    def seconds(self, name: str, default: float) -> float: ...
    @overload
    def seconds(self, name: str, default: None) -> float | None: ...
    def seconds(self, name: str, default: float | None) -> float | None:
        text = self.text(name, "")
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0.001 <= value <= 3600:
            self.errors.append(f"{name} = {text!r}: use seconds, 0.001 to 3600")
        return value

    def rate(self, name: str) -> float:
        text = self.text(name, "0")
        # Written out, because float() also reads nan, inf and 1e999.
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
            return float(text)
        self.errors.append(f"{name} = {text[:20]!r}: use images per second, such as 5 or 0.5")
        return 0.0

    def names(self, name: str, pattern: re.Pattern[str], kind: str) -> frozenset[str]:
        """Read a list that is separated by commas or spaces; `*` stands for all."""
        values = frozenset(self.text(name, "").lower().replace(",", " ").split())
        for value in sorted(values):
            if value != "*" and not pattern.fullmatch(value):
                self.errors.append(f"{name} = {value[:60]!r}: use {kind}, or *")
        return values

    def keys(self, name: str) -> frozenset[bytes]:
        path = self.text(name, "")
        if not path:
            return frozenset()
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            self.errors.append(f"{name} = {path!r}: can't be read ({error})")
            return frozenset()
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            # A file without keys must not turn authorisation off.
            self.errors.append(f"{name} = {path!r}: has no key; write one a line")
        return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)

    def check_trusted_keys(self) -> None:
        """Report an unusable FLEDGE_TRUSTED_KEYS now, not only when a bundle is opened."""
        try:
            signing.trusted(self.environ)
        except OptionError as error:
            self.errors.append(str(error))

    def check_misspelt(self) -> None:
        """Report unknown variables whose name resembles that of a setting.

        Without the report, a misspelt limit or key file would be ignored silently.
        """
        for name, value in self.environ.items():
            if not name.startswith("FLEDGE_") or not value.strip():
                continue
            if name not in self._known and not _OTHER_VARIABLES.fullmatch(name):
                for near in difflib.get_close_matches(name, self._known, 1, 0.82):
                    self.errors.append(f"{name}: no such variable; did you mean {near}?")
