"""metrics.csv, steps.csv and TensorBoard events of a run, read by parsers in this file."""

import struct
import threading
from pathlib import Path

from training.run import metric_log
from training.run.history import Epoch, Step
from training.run.metric_log import EVENTS, MetricLog, read_steps

# Bytes written by TensorBoard 2.21's RecordWriter at wall time 1.5: `Event(step=300,
# summary=Summary(value=[Summary.Value(tag="loss/batch", simple_value=0.25)]))`.
SCALAR = (
    "2100000000000000017becf609000000000000f83f10ac022a130a110a0a6c6f73732f"
    "6261746368150000803ebeeab393"
)
# The same for a file version and `Event(step=7, session_log=SessionLog(status=SessionLog.START))`.
HEADER = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "0f000000000000006d532b0909000000000000f83f10073a020801774771c7"
)
EPOCH_SCALARS = {"loss/train": 2.5, "loss/valid": 2.0, "accuracy/valid": 0.5, "seconds": 3.0}


def epoch(number, stage="a"):
    return Epoch(stage, number, 0.2, 2.5, 2.0, 0.5, 3.0)


def steps(epoch, count=2, stage="a"):
    return [Step(stage, epoch, n + 1, epoch + n / 10, 0.9, (0.1, 0.2)) for n in range(count)]


def crc32c(content):
    """The Castagnoli checksum, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(content):
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def records(path):
    """The records of a TFRecord file; their checksums must be right."""
    rest, found = path.read_bytes(), []
    while rest:
        (length,) = struct.unpack("<Q", rest[:8])
        content = rest[12 : 12 + length]
        head, end = rest[:8], 12 + length
        assert rest[8:12] == masked(head)
        assert rest[end : end + 4] == masked(content)
        found.append(content)
        rest = rest[end + 4 :]
    return found


def files(run):
    return sorted((run / EVENTS).iterdir())


def events(path):
    from tensorboardX.proto.event_pb2 import Event

    return [Event.FromString(record) for record in records(path)]


def scalars(run):
    """tag -> [(step, value)], after TensorBoard's rules for restarts.

    Files are read in the order of their names; a START event removes earlier events at its step
    and later.
    """
    found = {}
    for path in files(run):
        for event in events(path):
            if event.HasField("session_log"):
                assert event.session_log.status == event.session_log.START
                for values in found.values():
                    values[:] = [entry for entry in values if entry[0] < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
    return found


def test_the_readers_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC catalogues
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_event_files_have_the_bytes_that_tensorboard_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_log.time, "time", lambda: 1.5)
    file = metric_log._EventFile(tmp_path / EVENTS, 7)
    (path,) = files(tmp_path)
    assert path.read_bytes().hex() == HEADER
    file.add(300, {"loss/batch": 0.25})
    file.close()
    assert path.read_bytes().hex() == HEADER + SCALAR


def test_an_epoch_and_its_steps_are_on_disk_after_add(tmp_path):
    threads = threading.active_count()
    with MetricLog(tmp_path, []) as log:
        log.add(epoch(1), steps(1))
        found = scalars(tmp_path)
        assert threading.active_count() == threads
    assert found["loss/batch"] == [(0, 1.0), (1, 1.1)]
    assert found["lr/group 1"] == [(0, 0.1), (1, 0.1)]
    assert found["lr/head"] == [(0, 0.2), (1, 0.2)]
    assert found["momentum"] == [(0, 0.9), (1, 0.9)]
    of_epoch = {tag: [(1, value)] for tag, value in EPOCH_SCALARS.items()}
    assert {tag: found[tag] for tag in EPOCH_SCALARS} == of_epoch
    assert set(found) == {"loss/batch", "lr/group 1", "lr/head", "momentum", *EPOCH_SCALARS}


def test_event_files_of_resumed_runs_sort_in_order(tmp_path):
    paths = []
    for _ in range(3):
        with MetricLog(tmp_path, []):
            paths += set(files(tmp_path)) - set(paths)
    assert paths == files(tmp_path)


def test_events_of_a_killed_run_beyond_the_resume_point_are_dropped(tmp_path):
    with MetricLog(tmp_path, []) as log:
        for number in (1, 2, 3):
            log.add(epoch(number), steps(number))
    with MetricLog(tmp_path, [epoch(1)]) as log:
        assert log.steps == 2
        log.add(epoch(2), steps(2, count=3))
    found = scalars(tmp_path)
    losses = [loss for _, loss in found["loss/batch"]]
    assert [step for step, _ in found["loss/batch"]] == [0, 1, 2, 3, 4]
    assert losses == [1.0, 1.1, 2.0, 2.1, 2.2]
    assert [step for step, _ in found["loss/valid"]] == [1, 4]


def test_rows_of_unfinished_epochs_are_removed_on_resume(tmp_path):
    with MetricLog(tmp_path, []) as log:
        for number in (1, 2):
            log.add(epoch(number), steps(number))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("a,3,1,0.")  # cut short by a kill
    with MetricLog(tmp_path, [epoch(1)]) as log:
        assert log.steps == 2
    assert read_steps(tmp_path) == steps(1)
    assert Path(tmp_path, "metrics.csv").read_text().count("\n") == 2
