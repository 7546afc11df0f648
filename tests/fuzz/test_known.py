"""Each fault that the fuzzer leaves out is still there."""

from pathlib import Path

import pytest

from tests.fuzz import campaign, known
from tests.fuzz.laws import HANG, MEMORY, SLOW
from tests.fuzz.target import load


@pytest.mark.process
def test_known_faults_are_still_there(tmp_path: Path) -> None:
    for fault in known.KNOWN:
        data = fault.example()
        assert fault.shows(data)
        (tmp_path / "input").write_bytes(data)
        found = campaign.replay(fault.targets[0], tmp_path / "input")
        assert found is not None, f"mended: remove it from tests/fuzz/known.py ({fault.reason})"
        assert found.kind in (SLOW, MEMORY, HANG)


def test_seeds_show_no_known_fault() -> None:
    for fault in known.KNOWN:
        for name in fault.targets:
            assert not any(known.skipped(name, data) for data in load(name).seeds())
