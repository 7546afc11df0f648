import struct

import pytest

from training.run import events
from training.run.history import Epoch

# Written by TensorBoard 2.21's own RecordWriter, at wall time 1.5: `Event(step=300,
# summary=Summary(value=[Summary.Value(tag="loss/batch", simple_value=0.25)]))`, ...
SCALAR = (
    "2100000000000000017becf609000000000000f83f10ac022a130a110a0a6c6f73732f"
    "6261746368150000803ebeeab393"
)
# ... and a version, then `Event(step=7, session_log=SessionLog(status=SessionLog.START))`.
OPENING = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "0f000000000000006d532b0909000000000000f83f10073a020801774771c7"
)


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(events.time, "time", lambda: 1.5)


def records(path):
    """The contents of a file's records; their checksums must be right."""
    left, found = path.read_bytes(), []
    while left:
        (length,) = struct.unpack("<Q", left[:8])
        content = left[12 : 12 + length]
        assert left[: 16 + length] == events._record(content)
        found.append(content)
        left = left[16 + length :]
    return found


def test_the_checksum_is_crc32c():
    # RFC 3720, B.4, and the check value of the catalogues.
    assert events.crc32c(b"123456789") == 0xE3069283
    assert events.crc32c(bytes(32)) == 0x8A9136AA
    assert events.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert events.crc32c(bytes(range(32))) == 0x46DD794E


def test_scalars_are_written_as_tensorboard_does(tmp_path, timer):
    path = tmp_path / "file"
    events.add(path, 300, {"loss/batch": 0.25})
    assert path.read_bytes().hex() == SCALAR


def test_a_file_begins_as_tensorboards_does(tmp_path, timer):
    theirs = tmp_path / "theirs"
    theirs.write_bytes(bytes.fromhex(OPENING))
    version, session = records(events.start(tmp_path, step=7))
    # A step of 0 may be written or not.
    assert version.replace(b"\x10\x00", b"", 1) == records(theirs)[0]
    assert session == records(theirs)[1]


def test_files_of_a_resumed_run_follow_each_other(tmp_path):
    first = events.start(tmp_path)
    second = events.start(tmp_path, step=40)
    third = events.start(tmp_path, step=40)
    assert [first, second, third] == sorted((tmp_path / "events").iterdir())


def test_steps_and_epochs_are_appended(tmp_path):
    path = events.start(tmp_path)
    events.add_step(path, 1, 2.5, (1e-4, 1e-3), 0.9)
    size = path.stat().st_size
    events.add_epoch(path, 1, Epoch("head", 1, 1e-3, 2.5, 2.0, 0.5, 3.0))
    assert path.stat().st_size > size
    _, _, step, epoch = records(path)
    for tag in (b"loss/batch", b"lr/group 1", b"lr/head", b"momentum"):
        assert tag in step
    for tag, value in ((b"loss/train", 2.5), (b"loss/valid", 2.0), (b"accuracy/valid", 0.5)):
        assert tag + b"\x15" + struct.pack("<f", value) in epoch
