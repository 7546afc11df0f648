"""Valid and invalid requests generated from the service's OpenAPI document."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.live_server import live
from tests.support.tiny_bundle import tiny_bundle


@pytest.mark.slow
def test_requests_by_the_openapi_document_cause_no_server_error(tmp_path: Path):
    with live(tiny_bundle(tmp_path / "bundle"), tmp_path / "log") as server:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
        command += [f"{server.url}/docs.json", "--checks", "not_a_server_error", "--seed", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "50"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Selected: 6/6" in done.stdout
    assert "Traceback" not in server.log.read_text()
