"""Serving imports no torch and no other package of training."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "serving").rglob("*.py")
    if path.stem != "__init__"
)
HEAVY = ("torch", "torchvision", "onnx", "safetensors", "matplotlib", "ray", "training", "export")


def imported(*modules: str) -> set[str]:
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("modules", [["serving.service"], MODULES], ids=["service", "every module"])
def test_serving_imports_no_torch(modules: list[str]):
    assert imported(*modules) == set()


def test_the_torchscript_runtime_imports_torch_only_when_used():
    assert imported("serving.inference.torchscript") == set()
