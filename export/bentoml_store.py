"""A bundle in BentoML's model store, where its own commands list, ship and fetch it."""

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

_BESIDE: Final = (storage.MANIFEST, storage.CHECKSUM, storage.SIGNATURE)


def register(folder: Path, log: Callable[[str], None] = print) -> str:
    """Copy a bundle into the store of this user, or of BENTOML_HOME; returns its tag.

    The tag is `NAME:VERSION`, the name in the letters that BentoML allows. The same version put
    there before is replaced.

    Raises:
        BundleError: As `bundle.read`.
        WorkError: The store can't be written.
    """
    opened = storage.read(folder)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    import bentoml
    from bentoml.exceptions import BentoMLException, NotFound

    manifest = opened.manifest
    tag = f"{_name(manifest.name)}:{manifest.version}"
    facts = {"arch": manifest.arch, "classes": len(manifest.labels), "schema": manifest.schema}
    try:
        if not _same(bentoml.models.list(tag), folder):
            with suppress(NotFound):
                bentoml.models.delete(tag)
            with bentoml.models.create(tag, labels={"made-by": "fledge"}, metadata=facts) as model:
                place = Path(model.path)
                for name in _BESIDE:
                    if (folder / name).exists():
                        shutil.copy2(folder / name, place)
                shutil.copytree(opened.payload, place / manifest.version)
                storage.read(place)  # an export may have gone on meanwhile
    except (BentoMLException, OSError) as error:
        raise WorkError(f"BentoML's model store: {error}; the bundle itself is complete") from error
    log(f"registered as {tag} in BentoML's model store, {bentoml.models.get(tag).path}")
    return tag


def _same(stored: Sequence[Any], folder: Path) -> bool:
    """Whether this very bundle lies there; somebody may be serving it."""
    paths = [Path(model.path) / storage.MANIFEST for model in stored]
    mine = (folder / storage.MANIFEST).read_bytes()
    return any(path.exists() and path.read_bytes() == mine for path in paths)


def _name(name: str) -> str:
    """Lower case, digits, `-`, `_` and `.`, not at the ends, 63 at most."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-_.")[:63].rstrip("-_.") or "model"
