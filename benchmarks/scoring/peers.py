"""The competitors of the scoring race: commands and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.machine import PEERS_FOLDER, ROOT


@dataclass(frozen=True)
class Setting:
    """One way to run a competitor.

    command: Template with the fields `{photos}`, `{out}`, `{bundle}`, `{run}`, `{network}`,
        `{threads}`, `{batch}`, `{precision}`, `{python}`, `{peers}`, the interpreter of the peers'
        environment, and those of an older checkout: `{before}`, `{before_python}` and
        `{before_bundle}`.
    """

    name: str
    command: tuple[str, ...]

    def filled(self, values: Mapping[str, object]) -> list[str]:
        """The command with the template fields filled in."""
        return [word.format_map(values) for word in self.command]


@dataclass(frozen=True)
class Peer:
    """A competitor. All of its settings are measured; the tables show the fastest.

    precision: fp32, or `default` for the bundle's fastest: int8 if the bundle has it.
    part: Fraction of the photos to score; slow competitors score fewer.
    """

    name: str
    title: str
    precision: str
    settings: tuple[Setting, ...]
    part: float = 1.0

    @property
    def limit(self) -> bool:
        """Whether it is the in-process loop, without a tool."""
        return self.name.startswith("limit")


_FLEDGE = (
    *("{python}", str(ROOT / "fledge.py"), "score", "{photos}", "--bundle", "{bundle}"),
    *("--out", "{out}"),
)
_BEFORE = (
    *("{before_python}", "{before}/fledge.py", "score", "{photos}", "--bundle", "{before_bundle}"),
    *("--out", "{out}"),
)
_BARE = (
    *("{python}", str(PEERS_FOLDER / "bare_score.py"), "{photos}", "--bundle", "{bundle}"),
    *("--precision", "{precision}", "--batch", "{batch}", "--out", "{out}"),
)
_LIMITS = (
    Setting("a process per core", (*_BARE, "--processes", "{threads}")),
    Setting("a thread per core", (*_BARE, "--threads", "{threads}")),
)


def _program(name: str, network: str, python: str) -> tuple[str, ...]:
    program = str(PEERS_FOLDER / f"score_{name}.py")
    return (python, program, "{photos}", "--network", network, "--out", "{out}")


def _settings(program: tuple[str, ...], other: str, *arguments: str) -> tuple[Setting, ...]:
    """Two settings that differ much, since the documentation recommends none."""
    per_core = ("--workers", "{threads}", "--batch", "64")
    return (
        Setting("a worker per core, batches of 64", (*program, *per_core)),
        Setting(f"{other}, batches of 8", (*program, *arguments, "--batch", "8")),
    )


_CHANNELS_LAST = ("one worker, channels-last", "--workers", "1", "--channels-last")
_TORCH = _settings(_program("torch", "{run}", "{python}"), *_CHANNELS_LAST)
_TIMM = _settings(_program("timm", "{network}", "{peers}"), *_CHANNELS_LAST)
_TRANSFORMERS = _settings(
    _program("transformers", "{network}", "{peers}"), "no worker", "--workers", "0"
)
_SLOW: Final = 0.25  # fraction of the photos

_PEERS: Final = (
    Peer(
        "fledge-fp32",
        "`fledge score`",
        "fp32",
        (Setting("default", (*_FLEDGE, "--precision", "fp32")),),
    ),
    Peer(
        "before-fp32",
        "`fledge score` before",
        "fp32",
        (Setting("default", (*_BEFORE, "--precision", "fp32")),),
    ),
    Peer("limit-fp32", "*in-process limit*", "fp32", _LIMITS),
    Peer("torch", "plain torch `DataLoader`", "fp32", _TORCH, _SLOW),
    Peer("timm", "timm", "fp32", _TIMM, _SLOW),
    Peer("transformers", "transformers pipeline", "fp32", _TRANSFORMERS, _SLOW),
    Peer("fledge", "`fledge score`", "default", (Setting("default", _FLEDGE),)),
    Peer("before", "`fledge score` before", "default", (Setting("default", _BEFORE),)),
    Peer("limit", "*in-process limit*", "default", _LIMITS),
)
PEERS: Final = {peer.name: peer for peer in _PEERS}
REFERENCE: Final = Setting("labels", (*_BARE, "--full"))
"""Scores all pixels of the photos, turned upright, for the labels that answers are checked by."""
IN_PEER_ENVIRONMENT: Final = ("timm", "transformers")
"""Names of the peers that run in the peers' virtual environment."""
NEED_RUN: Final = ("torch", *IN_PEER_ENVIRONMENT)
"""Names of the peers that score with the run's checkpoint, so that they need --run."""
