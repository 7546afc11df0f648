"""The competitors of the serving race: commands, settings, and the form of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from benchmarks.machine import PEERS_FOLDER, ROOT


@dataclass(frozen=True)
class Setting:
    """One way to run a competitor.

    command, env: Templates with the fields `{port}`, `{bundle}`, `{threads}`, `{python}`,
        `{peers}`, the interpreter of the peers' environment, and those of an older checkout:
        `{before}`, `{before_python}` and `{before_bundle}`.
    """

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def filled(self, values: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
        """Command and environment variables with the template fields filled in."""
        command = [word.format_map(values) for word in self.command]
        return command, {name: text.format_map(values) for name, text in self.env.items()}


@dataclass(frozen=True)
class Peer:
    """A competitor. All of its settings are measured; the tables show the fastest.

    precision: fp32, or `default` for the bundle's fastest: int8 if the bundle has it.
    ready: Path that returns 200 when the server is ready; empty for the in-process limit.
    form: Field of a multipart form; None sends the photo as the request body.
    """

    name: str
    title: str
    precision: str
    settings: tuple[Setting, ...]
    ready: str = ""
    form: str | None = None

    @property
    def limit(self) -> bool:
        """Whether it is the in-process loop, without a server."""
        return not self.ready


_FLEDGE = ("{python}", str(ROOT / "fledge.py"), "serve", "{bundle}", "--port", "{port}")
_BEFORE = ("{before_python}", "{before}/fledge.py", "serve", "{before_bundle}", "--port", "{port}")
_OF_BEFORE = {"PYTHONPATH": "{before}"}
_UVICORN = (
    *("{peers}", "-m", "uvicorn", "--app-dir", str(PEERS_FOLDER)),
    *("--host", "127.0.0.1", "--port", "{port}"),
)
_LITSERVE = ("{peers}", str(PEERS_FOLDER / "litserve_onnx.py"), "{port}")
_BENTOML = (
    *("{python}", "-m", "bentoml", "serve", "--working-dir", str(PEERS_FOLDER)),
    *("--host", "127.0.0.1", "--port", "{port}"),
)
_WORKER_PER_CORE = {"PEER_WORKERS": "{threads}", "PEER_THREADS": "1"}

_LITSERVE_SETTINGS: Final = (
    Setting("a worker per core", _LITSERVE, _WORKER_PER_CORE),
    Setting(
        "a worker per core, fast queue, one API server",
        _LITSERVE,
        {**_WORKER_PER_CORE, "PEER_FAST_QUEUE": "1", "PEER_SERVERS": "1"},
    ),
    Setting(
        "a worker per core, fast queue, one API server, batches of up to 8 within 5 ms",
        _LITSERVE,
        {
            **_WORKER_PER_CORE,
            **{"PEER_FAST_QUEUE": "1", "PEER_SERVERS": "1"},
            **{"PEER_BATCH": "8", "PEER_WAIT": "0.005"},
        },
    ),
    Setting(
        "one worker, fast queue, batches of up to 8 within 5 ms",
        _LITSERVE,
        {
            **{"PEER_WORKERS": "1", "PEER_THREADS": "{threads}", "PEER_FAST_QUEUE": "1"},
            **{"PEER_BATCH": "8", "PEER_WAIT": "0.005"},
        },
    ),
)

_PEERS: Final = (
    Peer(
        *("fledge-fp32", "Fledge", "fp32"),
        (Setting("default", (*_FLEDGE, "--precision", "fp32")),),
        "/readyz",
    ),
    Peer(
        *("before-fp32", "Fledge before", "fp32"),
        (Setting("default", (*_BEFORE, "--precision", "fp32"), _OF_BEFORE),),
        "/readyz",
    ),
    Peer(
        *("fledge-form", "Fledge, multipart", "fp32"),
        (Setting("default", (*_FLEDGE, "--precision", "fp32")),),
        *("/readyz", "image"),
    ),
    Peer(
        *("torch", "FastAPI + eager PyTorch", "fp32"),
        (Setting("as in tutorials", (*_UVICORN, "fastapi_torch:app")),),
        *("/docs", "file"),
    ),
    Peer(
        *("onnx", "FastAPI + ONNX Runtime", "fp32"),
        (
            Setting("default", (*_UVICORN, "fastapi_onnx:app")),
            Setting("one thread per run", (*_UVICORN, "fastapi_onnx:app"), {"PEER_THREADS": "1"}),
            Setting(
                "a worker per core, one thread per run",
                (*_UVICORN, "--workers", "{threads}", "fastapi_onnx:app"),
                {"PEER_THREADS": "1"},
            ),
        ),
        *("/docs", "file"),
    ),
    Peer("litserve", "LitServe + ONNX Runtime", "fp32", _LITSERVE_SETTINGS, "/health", "image"),
    Peer(
        *("bentoml", "BentoML + ONNX Runtime", "fp32"),
        (Setting("as documented", (*_BENTOML, "bentoml_image:Classifier")),),
        *("/readyz", "image"),
    ),
    Peer(
        *("bentoml-batch", "BentoML, batchable", "fp32"),
        (Setting("as documented", (*_BENTOML, "bentoml_batch:Classifier")),),
        *("/readyz", "images"),
    ),
    Peer("limit-fp32", "*in-process limit*", "fp32", (Setting("bare loop"),)),
    Peer(
        *("fledge", "Fledge", "default"),
        (Setting("default", _FLEDGE),),
        "/readyz",
    ),
    Peer(
        *("before", "Fledge before", "default"),
        (Setting("default", _BEFORE, _OF_BEFORE),),
        "/readyz",
    ),
    Peer("limit", "*in-process limit*", "default", (Setting("bare loop"),)),
)
PEERS: Final = {peer.name: peer for peer in _PEERS}
IN_PEER_ENVIRONMENT: Final = ("torch", "onnx", "litserve")
"""Names of the peers that run in the peers' virtual environment."""
