"""Run external programs (nginx, promtool) where they are installed."""

from __future__ import annotations

import shutil
import subprocess

from tests.support.container_engine import skip_or_fail


def find_program(name: str) -> str:
    """The path of a program; skips the test without it, or fails if FLEDGE_REQUIRE_DOCKER=1."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    skip_or_fail("" if path else f"{name} is not installed")
    return str(path)


def output_of(*command: str, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr
