"""CPU quota of a container, by both versions of control groups."""

import os
from pathlib import Path

import pytest

from serving.utils import cpu
from serving.utils.cpu import cores, quotas


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def own(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "own"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("text", "expected"), [("200000 100000", [2.0]), ("50000 100000", [0.5]), ("max 100000", [])]
)
def test_the_quota_of_a_version_2_group_is_read_in_cores(
    tmp_path: Path, text: str, expected: list[float]
):
    write(tmp_path, cpu__max=text)
    assert list(quotas(own(tmp_path, "0::/"), tmp_path)) == expected


@pytest.mark.parametrize(("text", "expected"), [("150000", [1.5]), ("-1", []), ("", [])])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_the_quota_of_a_version_1_group_is_read_in_cores(
    tmp_path: Path, controllers: str, text: str, expected: list[float]
):
    write(tmp_path / "cpu", cpu__cfs_quota_us=text, cpu__cfs_period_us="100000")
    lines = ("11:cpuset:/other", f"9:{controllers}:/", "1:name=systemd:/")
    assert list(quotas(own(tmp_path, *lines), tmp_path)) == expected


def test_the_root_group_is_read_if_the_path_exists_only_on_the_host(tmp_path: Path):
    write(tmp_path / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert list(quotas(own(tmp_path, "4:cpu,cpuacct:/docker/0123abcd"), tmp_path)) == [3.0]
    write(tmp_path, cpu__max="100000 100000")
    assert list(quotas(own(tmp_path, "0::/../../system.slice"), tmp_path)) == [1.0]


def test_the_quotas_of_all_parent_groups_are_read(tmp_path: Path):
    write(tmp_path / "a.slice" / "b.service", cpu__max="max 100000")
    write(tmp_path / "a.slice", cpu__max="400000 100000")
    write(tmp_path, cpu__max="900000 100000")
    assert list(quotas(own(tmp_path, "0::/a.slice/b.service"), tmp_path)) == [4.0, 9.0]


def test_a_version_1_quota_is_read_beside_a_version_2_hierarchy(tmp_path: Path):
    write(tmp_path / "cpu", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert list(quotas(own(tmp_path, "3:cpu:/", "0::/"), tmp_path)) == [2.0]


def test_without_control_groups_there_is_no_quota(tmp_path: Path):
    assert list(quotas(tmp_path / "own", tmp_path)) == []


@pytest.mark.parametrize(
    ("limits", "expected"), [([], 4), ([2.0], 2), ([1.5, 3.0], 2), ([0.1], 1), ([64.0], 4)]
)
def test_cores_is_the_smallest_limit_rounded_up(
    monkeypatch: pytest.MonkeyPatch, limits: list[float], expected: int
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cpu, "quotas", lambda: limits)
    assert cores() == expected
