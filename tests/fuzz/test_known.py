"""Each fault that the fuzzer leaves out is still there."""

from pathlib import Path

import pytest

from tests.fuzz import campaign, known
from tests.fuzz.laws import HANG, MEMORY, SLOW


@pytest.mark.process
@pytest.mark.parametrize("fault", known.KNOWN, ids=lambda fault: fault.reason)
def test_a_known_fault_is_still_there(tmp_path: Path, fault: known.Known) -> None:
    data = fault.example()
    assert fault.shows(data)
    (tmp_path / "input").write_bytes(data)
    found = campaign.replay(fault.targets[0], tmp_path / "input")
    assert found is not None, f"mended: remove it from tests/fuzz/known.py ({fault.reason})"
    assert found.kind in (SLOW, MEMORY, HANG)


@pytest.mark.parametrize("fault", known.KNOWN, ids=lambda fault: fault.reason)
def test_seeds_show_no_known_fault(fault: known.Known) -> None:
    from tests.fuzz.target import load

    for name in fault.targets:
        assert not any(known.skipped(name, data) for data in load(name).seeds())
