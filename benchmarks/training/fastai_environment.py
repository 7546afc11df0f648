"""The virtual environment with fastai."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks import environments

FASTAI: Final = "2.8.12"


def python() -> Path:
    """The interpreter of that environment, which is created at first use.

    It has the torch version that runs here, so that the race does not compare two versions of
    torch.

    Raises:
        SystemExit: pip failed; its own message is on stderr.
    """
    pair = [f"{name}=={_release(name)}" for name in ("torch", "torchvision")]
    name = "-".join([f"fastai-{FASTAI}", *(pin.replace("==", "-") for pin in pair)])
    on_failure = (
        "fastai could not be installed; leave it out by --peers fledge,torch, or name an "
        "interpreter that has it by --fastai-python"
    )
    return environments.create(name, [f"fastai=={FASTAI}", *pair], on_failure)


def _release(package: str) -> str:
    """The installed version without its local part (`+cpu`)."""
    return metadata.version(package).partition("+")[0]
