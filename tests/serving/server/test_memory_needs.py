"""What the service needs of the container's memory: the sum, the line, the refusal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serving.bundle import storage
from serving.errors import BundleError, OptionError
from serving.server import memory_needs as memory_needs_module
from serving.server.memory_needs import (
    LEAST_MEMORY,
    check,
    check_update,
    memory_needs,
    request_memory,
)
from serving.settings import Settings
from tests.support.live_server import ROOT, free_port, live
from tests.support.tiny_bundle import tiny_bundle

MB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("limit", [2**30, 2**32, 2**36])
def test_the_sum_of_all_terms_is_the_limit(folder: Path, limit: int, workers: int) -> None:
    manifest = storage.read(folder).manifest
    needs = memory_needs(Settings(folder, workers=workers), manifest, limit)
    if needs.requests > workers * LEAST_MEMORY:
        assert limit - workers <= needs.total <= limit
    else:
        assert (limit, workers) == (2**30, 4)
        assert needs.total > limit


def test_a_container_of_one_gibibyte_leaves_half_of_it_for_requests(folder: Path) -> None:
    manifest = storage.read(folder).manifest
    assert memory_needs(Settings(folder), manifest, 2**30).requests > 2**29


def test_a_larger_graph_more_workers_and_larger_batches_leave_less(folder: Path) -> None:
    manifest = storage.read(folder).manifest
    plain = memory_needs(Settings(folder), manifest, 2**32)
    files = {name: dict(entry) for name, entry in manifest.files.items()}
    (graph,) = manifest.graphs
    files[graph]["bytes"] = 100 * MB
    large = memory_needs(Settings(folder), manifest.model_copy(update={"files": files}), 2**32)
    assert large.model >= plain.model + 200 * MB
    assert large.requests <= plain.requests - 400 * MB  # the next version of the bundle, too
    for other in (Settings(folder, workers=3), Settings(folder, max_batch=1000)):
        assert memory_needs(other, manifest, 2**32).requests < plain.requests


def test_a_new_version_of_the_bundle_is_loaded_only_if_there_is_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, settings = storage.read(folder).manifest, Settings(folder)
    check_update(settings, manifest)
    monkeypatch.setattr(memory_needs_module, "free_memory", lambda: 1000)
    with pytest.raises(BundleError, match="beside the version in service") as refused:
        check_update(settings, manifest)
    assert "\n" not in str(refused.value)
    (graph,) = manifest.graphs
    files = {**manifest.files, graph: {**manifest.files[graph], "bytes": 94_000_000}}
    needs = memory_needs(settings, manifest.model_copy(update={"files": files}), 2**30)
    assert needs.update == 0  # the container has no room for it, and is used without it
    assert needs.total <= 2**30


def test_too_little_memory_is_refused_and_the_stated_amount_is_enough(folder: Path) -> None:
    manifest, settings = storage.read(folder).manifest, Settings(folder)
    with pytest.raises(OptionError, match="FLEDGE_MAX_MEMORY") as refused:
        check(settings, manifest, 128 * MB)
    assert "\n" not in str(refused.value)
    assert "this container has 128 MB" in str(refused.value)
    least = int(re.search(r"may need (\d+) MB", str(refused.value))[1])
    assert f"of {least} MB (" in check(settings, manifest, least * MB)
    with pytest.raises(OptionError):
        check(settings, manifest, (least - 2) * MB)


def test_with_a_stated_budget_it_starts_and_says_that_there_is_less(folder: Path) -> None:
    manifest = storage.read(folder).manifest
    line = check(Settings(folder, max_memory=100 * MB), manifest, 128 * MB)
    assert "requests 100)" in line
    assert "more than there is" in line


def test_the_measured_base_counts(folder: Path) -> None:
    manifest, settings = storage.read(folder).manifest, Settings(folder)
    less = request_memory(settings, manifest, 200 * MB)
    assert request_memory(settings, manifest, 100 * MB) == less + 100 * MB
    assert request_memory(settings, manifest, 2**50) == LEAST_MEMORY
    assert request_memory(Settings(folder, max_memory=123), manifest, 2**50) == 123


CODE = """
import sys
from pathlib import Path
from serving.errors import FledgeError
from serving.server import launch, memory_needs
memory_needs.container_memory = lambda: 150 * 2**20
try:
    launch.serve(Path(sys.argv[1]), port=int(sys.argv[2]))
except FledgeError as error:
    print(f"fledge: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
"""


def test_a_process_with_too_little_memory_ends_with_status_2_and_one_line(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(free_port())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "this container has 150 MB" in done.stderr


def test_the_start_prints_the_sum_and_the_estimates_hold(folder: Path, tmp_path: Path) -> None:
    with live(folder, tmp_path / "log", new_interpreter=True) as server:
        used = psutil.Process(server.process.pid).memory_info().rss
    log = server.log.read_text()
    terms = re.search(r"memory: at most \d+ MB of \d+ MB \((.*)\)", log)
    assert terms, log
    needs = {name: int(size) for name, size in re.findall(r"(\w+) (\d+)", terms[1])}
    assert 0.7 * used < (needs["processes"] + needs["model"]) * MB < 1.5 * used
    budget = int(re.search(r"(\d+) MB for requests", log)[1])
    assert budget == pytest.approx(needs["requests"], rel=0.1)
