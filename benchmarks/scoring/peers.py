"""The competitors: how each scores a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.serving.peers import PROGRAMS, ROOT


@dataclass(frozen=True)
class Setting:
    """One way to run a competitor.

    command: `{photos}`, `{out}`, `{bundle}`, `{run}`, `{network}`, `{threads}`, `{batch}`,
        `{precision}`,
        `{python}` and `{peers}`, the interpreter of the peers' environment, are filled in.
    """

    name: str
    command: tuple[str, ...]

    def filled(self, values: Mapping[str, object]) -> list[str]:
        """The command with everything in its place."""
        return [word.format_map(values) for word in self.command]


@dataclass(frozen=True)
class Peer:
    """A competitor. Of several settings all are measured, and the fastest counts.

    precision: fp32, or `default` for the bundle's fastest, int8 where it has that.
    part: of the photos; those that take long score fewer.
    """

    name: str
    title: str
    precision: str
    settings: tuple[Setting, ...]
    part: float = 1.0

    @property
    def limit(self) -> bool:
        """Whether it is no tool but the bare loop."""
        return self.name.startswith("limit")


_FLEDGE = (
    *("{python}", str(ROOT / "fledge.py"), "score", "{photos}", "--bundle", "{bundle}"),
    *("--out", "{out}"),
)
_BARE = (
    *("{python}", str(PROGRAMS / "bare_score.py"), "{photos}", "--bundle", "{bundle}"),
    *("--precision", "{precision}", "--batch", "{batch}", "--out", "{out}"),
)
_LIMITS = (
    Setting("a process a core", (*_BARE, "--processes", "{threads}")),
    Setting("a thread a core", (*_BARE, "--threads", "{threads}")),
)


def _program(name: str, network: str, python: str) -> tuple[str, ...]:
    program = str(PROGRAMS / f"score_{name}.py")
    return (python, program, "{photos}", "--network", network, "--out", "{out}")


def _settings(program: tuple[str, ...], other: str, *words: str) -> tuple[Setting, ...]:
    """What their documentation leaves to whoever uses them: two ways that differ much."""
    each = ("--workers", "{threads}", "--batch", "64")
    return (
        Setting("a worker a core, batches of 64", (*program, *each)),
        Setting(f"{other}, batches of 8", (*program, *words, "--batch", "8")),
    )


_LAST = ("one worker, channels-last", "--workers", "1", "--channels-last")
_TORCH = _settings(_program("torch", "{run}", "{python}"), *_LAST)
_TIMM = _settings(_program("timm", "{network}", "{peers}"), *_LAST)
_TRANSFORMERS = _settings(
    _program("transformers", "{network}", "{peers}"), "no worker", "--workers", "0"
)
_SLOW: Final = 0.25

_PEERS: Final = (
    Peer(
        "fledge-fp32",
        "`fledge score`",
        "fp32",
        (Setting("as it comes", (*_FLEDGE, "--precision", "fp32")),),
    ),
    Peer("limit-fp32", "*in-process limit*", "fp32", _LIMITS),
    Peer("torch", "plain torch `DataLoader`", "fp32", _TORCH, _SLOW),
    Peer("timm", "timm", "fp32", _TIMM, _SLOW),
    Peer("transformers", "transformers pipeline", "fp32", _TRANSFORMERS, _SLOW),
    Peer("fledge", "`fledge score`", "default", (Setting("as it comes", _FLEDGE),)),
    Peer("limit", "*in-process limit*", "default", _LIMITS),
)
ALL: Final = {peer.name: peer for peer in _PEERS}
ELSEWHERE: Final = ("timm", "transformers")
"""Those that need the peers' environment."""
EAGER: Final = ("torch", *ELSEWHERE)
"""Those that need the run."""
