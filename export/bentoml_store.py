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

_METADATA_FILES: Final = (storage.MANIFEST, storage.CHECKSUM, storage.SIGNATURE)


def register(folder: Path, log: Callable[[str], None] = print) -> str:
    """Copy a bundle into this user's model store, or BENTOML_HOME's; returns its tag.

    The tag is `NAME:VERSION`, with the name in the characters that BentoML allows. A different
    bundle of the same tag is replaced.

    Raises:
        BundleError: As `storage.read`.
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
                storage.read(copy)  # verifies it: an export may have replaced `folder` meanwhile
    except (BentoMLException, OSError) as error:
        raise WorkError(f"BentoML's model store: {error}; the bundle itself is complete") from error
    log(f"registered as {tag} in BentoML's model store, {bentoml.models.get(tag).path}")
    return tag


def _is_stored(stored: Sequence[Any], folder: Path) -> bool:
    """Whether the store has this very bundle; a service may be reading that copy."""
    paths = [Path(model.path) / storage.MANIFEST for model in stored]
    manifest = (folder / storage.MANIFEST).read_bytes()
    return any(path.exists() and path.read_bytes() == manifest for path in paths)


def _name(name: str) -> str:
    """A valid BentoML name: a-z, 0-9, and inside also `-`, `_` and `.`; 63 characters at most."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-_.")[:63].rstrip("-_.") or "model"
