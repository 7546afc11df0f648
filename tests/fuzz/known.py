"""Faults that are known and belong to later work. Remove an entry with the fault that it excuses.

`EXCUSED` are faults that are found and reported, but don't fail a run. `skipped` leaves out inputs
that would only find them again, each time for seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.laws import Fault

DECODED_PIXELS = 4_000_000
"""`max_pixels` of the decoding targets. With the default of 100 million, 38 bytes of WebP and 349
bytes of JPEG take more than 300 MB and 1 s. When decoding is limited by its cost, use
`serving.imaging.decode.MAX_PIXELS`."""


@dataclass(frozen=True)
class Known:
    """A known fault. target, kind and place: as in `Fault`; "" stands for any."""

    target: str
    kind: str
    place: str
    reason: str

    def excuses(self, fault: Fault) -> bool:
        return all(
            not stated or stated == found
            for stated, found in zip((self.target, self.kind, self.place), fault.key, strict=True)
        )


EXCUSED: tuple[Known, ...] = ()


def excuse(fault: Fault) -> str:
    """Return why a fault is known; "" if it is new."""
    return next((known.reason for known in EXCUSED if known.excuses(fault)), "")


def skipped(target: str, data: bytes) -> bool:
    """Return whether an input is left out, because it shows a known fault."""
    return False
