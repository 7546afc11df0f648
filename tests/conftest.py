"""Settings for all tests: one torch thread, a temporary cache folder, limits on time and skips."""

import os
import tempfile
from collections import Counter

import pytest

# Set before torch is imported. The tests' networks are so small that a second thread makes them
# slower, and threads that spin while they wait slow down parallel test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The tests, and the processes that they start, must not use the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="fledge-tests-")
os.environ["FLEDGE_CACHE"] = _CACHE.name
os.environ.pop("FLEDGE_CACHE_GB", None)

LISTED_SECONDS = 5
"""A test of `make test` that takes longer, with its fixtures, is listed at the end."""
ALLOWED_SECONDS = 30 if "COVERAGE_PROCESS_CONFIG" in os.environ else 15  # coverage slows down
"""A test of `make test` that needs more CPU time fails, child processes that ended included.

It is CPU time, and three times as much as is asked for, so that a busy machine fails nothing."""
TIERS = {"process", "slow", "docker", "gpu", "network"}
"""Markers of tests that `make test` leaves out."""
KNOWN_SKIPS = (
    "root may read every folder",
    "root ignores file permissions",
    "needs root",
)
"""Reasons to skip that `--strict-skips` lets pass: each holds on some machines by design."""


def pytest_addoption(parser):
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail when a test was skipped for a reason that tests/conftest.py does not list",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.stash[CPU_SECONDS] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.cpu_seconds = cpu_seconds() - item.stash[CPU_SECONDS]
    return report


def cpu_seconds():
    return sum(os.times()[:4])


CPU_SECONDS = pytest.StashKey()


class Limits:
    """Sums the seconds of each test and collects the reasons of skips, in the main process."""

    def __init__(self, config):
        self.config = config
        self.seconds = Counter()
        self.cpu_seconds = {}
        self.skips = Counter()

    def pytest_runtest_logreport(self, report):
        if not TIERS & report.keywords.keys():
            self.seconds[report.nodeid] += report.duration
            if report.when == "teardown":
                self.cpu_seconds[report.nodeid] = report.cpu_seconds
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def too_long(self):
        return {name: cpu for name, cpu in self.cpu_seconds.items() if cpu > ALLOWED_SECONDS}

    def unknown_skips(self):
        return [reason for reason in self.skips if reason not in KNOWN_SKIPS]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        unknown = self.config.getoption("strict_skips") and self.unknown_skips()
        if exitstatus == pytest.ExitCode.OK and (self.too_long() or unknown):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        long = [(s, name) for name, s in self.seconds.items() if s > LISTED_SECONDS]
        for seconds, name in sorted(long, reverse=True):
            cpu = self.cpu_seconds.get(name, 0)
            verdict = "FAILED: " if name in self.too_long() else ""
            write(f"{verdict}{seconds:.1f} s, {cpu:.1f} s of CPU: {name}")
        if long:
            write(f"No test of `make test` may take over {LISTED_SECONDS} s: mark it process.")
        if self.config.getoption("strict_skips"):
            for reason in self.unknown_skips():
                write(f"FAILED, skipped {self.skips[reason]} times for an unknown reason: {reason}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the main process receives all workers' reports
        config.pluginmanager.register(Limits(config), "limits")
