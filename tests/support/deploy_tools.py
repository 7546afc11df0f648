"""Programs of other houses that these tests run for real where they are installed."""

from __future__ import annotations

import shutil
import subprocess

from tests.support.container_engine import need


def program(name: str) -> str:
    """Its path; else the test skips by name, or fails where FLEDGE_REQUIRE_DOCKER=1."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    need("" if found else f"{name} is not installed")
    return str(found)


def said(*command: str, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr
