import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    f"serving.{path.stem}"
    for path in (ROOT / "serving").glob("*.py")
    if path.stem not in ("__init__", "runtime_torchscript")
)
HEAVY = ("torch", "torchvision", "onnx", "safetensors", "matplotlib", "ray", "training", "export")


def loaded(*modules: str) -> set[str]:
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("modules", [["serving.service"], MODULES], ids=["service", "every module"])
def test_serving_loads_no_torch(modules: list[str]):
    assert loaded(*modules) == set()


def test_even_the_torchscript_runtime_waits_until_it_is_used():
    assert loaded("serving.inference.torchscript") == set()
