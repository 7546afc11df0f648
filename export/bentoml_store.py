"""Copy a bundle into BentoML's model store, for BentoML's own commands (list, export, push)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from serving.bundle import storage
from serving.errors import WorkError
from serving.terminal import show

_METADATA_FILES: Final = (storage.MANIFEST, storage.CHECKSUM, storage.SIGNATURE)


def register(folder: Path, log: Callable[[str], None] = show) -> str:
    """Copy a bundle into BentoML's model store and return its tag, `NAME:VERSION`.

    The store is in BENTOML_HOME if set, else in the user's home directory. Characters that BentoML
    does not allow in a name are replaced. A different bundle with the same tag is replaced.

    Raises:
        BundleError: The bundle is missing, damaged or not trusted.
        WorkError: The store can't be written.
    """
    opened = storage.read(folder)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    import bentoml
    from bentoml.exceptions import BentoMLException, NotFound

    manifest = opened.manifest
    tag = f"{_name(manifest.name)}:{manifest.version}"
    facts = {
        "arch": manifest.arch,
        "classes": len(manifest.labels),
        "schema": manifest.schema_version,
    }
    try:
        if not _is_stored(bentoml.models.list(tag), folder):
            with suppress(NotFound):
                bentoml.models.delete(tag)
            with bentoml.models.create(tag, labels={"made-by": "fledge"}, metadata=facts) as model:
                copy = Path(model.path)
                for name in _METADATA_FILES:
                    if (folder / name).exists():
                        shutil.copy2(folder / name, copy)
                shutil.copytree(opened.payload, copy / manifest.version)
                # Verify the copy, because an export may have replaced `folder` meanwhile.
                storage.read(copy)
    except (BentoMLException, OSError) as error:
        raise WorkError(f"BentoML's model store: {error}; the bundle itself is complete") from error
    log(f"registered as {tag} in BentoML's model store, {bentoml.models.get(tag).path}")
    return tag


def _is_stored(stored: Sequence[Any], folder: Path) -> bool:
    """Check whether one of the stored models is this bundle.

    Such a model is not copied again, because a service may be reading the stored copy.
    """
    paths = [Path(model.path) / storage.MANIFEST for model in stored]
    manifest = (folder / storage.MANIFEST).read_bytes()
    return any(path.exists() and path.read_bytes() == manifest for path in paths)


def _name(name: str) -> str:
    """Convert a name to a valid BentoML name.

    The result has at most 63 characters of a-z, 0-9, `-`, `_` and `.`, and begins and ends with a
    letter or digit.
    """
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-_.")[:63].rstrip("-_.") or "model"
