"""TensorBoard events: scalars of a run, in the files that TensorBoard reads.

The format is small and frozen, and is written here without TensorBoard: a file is a row of records
(length, checksum, bytes, checksum: TensorFlow's TFRecord), each a protocol-buffer `Event`.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from training.run.history import Epoch

FOLDER: Final = "events"


def start(run: Path, step: int = 0) -> Path:
    """Begin a file of events in a run's folder; returns its path.

    Args:
        run: The run's folder.
        step: The first step that will be written. A reader drops this step and later ones of
            older files: what a run that was killed had written beyond where it goes on.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    # Readers take files in the order of their names.
    number = len(list(folder.glob("events.out.tfevents.*")))
    path = folder / f"events.out.tfevents.{int(time.time()):010d}.{number:06d}.fledge"
    version = _event(0, _bytes(3, b"brain.Event:2"))
    session = _event(step, _bytes(7, _varint(1 << 3) + _varint(1)))  # SessionLog.START
    path.write_bytes(_record(version) + _record(session))
    return path


def add(path: Path, step: int, scalars: Mapping[str, float]) -> None:
    """Append scalars, by their tags, to a file of events."""
    values = b"".join(
        # Summary.Value: tag, simple_value
        _bytes(1, _bytes(1, tag.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", value))
        for tag, value in scalars.items()
    )
    with path.open("ab") as file:
        file.write(_record(_event(step, _bytes(5, values))))


def add_step(path: Path, step: int, loss: float, rates: Sequence[float], momentum: float) -> None:
    """Append what a step of the optimiser did; rates of the layer groups, the head's last."""
    by_group = {f"lr/group {i + 1}": rate for i, rate in enumerate(rates[:-1])}
    add(path, step, {"loss/batch": loss, **by_group, "lr/head": rates[-1], "momentum": momentum})


def add_epoch(path: Path, step: int, epoch: Epoch) -> None:
    """Append an epoch's figures, at the number of steps taken so far."""
    scalars = {
        "loss/train": epoch.train_loss,
        "loss/valid": epoch.valid_loss,
        "accuracy/valid": epoch.accuracy,
        "seconds": epoch.seconds,
    }
    add(path, step, scalars)


def _event(step: int, what: bytes) -> bytes:
    wall_time = _varint(1 << 3 | 1) + struct.pack("<d", time.time())
    return wall_time + _varint(2 << 3) + _varint(step) + what


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _masked(content: bytes) -> bytes:
    """TFRecord's checksum: CRC-32C, rotated and shifted."""
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE: Final = _table()
