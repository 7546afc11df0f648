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
ALLOWED_SECONDS = 15
"""A test of `make test` that takes longer fails. The factor of 3 is for a busy machine."""
TIERS = {"process", "slow", "docker", "gpu", "network"}
"""Markers of tests that `make test` leaves out."""
KNOWN_SKIPS = (
    "root may read every folder",
    "root ignores file permissions",
)
"""Reasons to skip that `--strict-skips` lets pass: each holds on some machines by design."""


def pytest_addoption(parser):
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail when a test was skipped for a reason that tests/conftest.py does not list",
    )


class Limits:
    """Sums the seconds of each test and collects the reasons of skips, in the main process."""

    def __init__(self, config):
        self.config = config
        self.seconds = Counter()
        self.skips = Counter()

    def pytest_runtest_logreport(self, report):
        if not TIERS & report.keywords.keys():
            self.seconds[report.nodeid] += report.duration
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def too_long(self):
        return [name for name, seconds in self.seconds.items() if seconds > ALLOWED_SECONDS]

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
            verdict = "FAILED, " if seconds > ALLOWED_SECONDS else ""
            write(f"{verdict}{seconds:.1f} s: {name}: make it smaller, or mark it process")
        if self.config.getoption("strict_skips"):
            for reason in self.unknown_skips():
                write(f"FAILED, skipped {self.skips[reason]} times for an unknown reason: {reason}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the main process receives all workers' reports
        config.pluginmanager.register(Limits(config), "limits")
