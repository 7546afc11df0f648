"""The description of a checkpoint, best.json."""

import json
from pathlib import Path

import pytest

from training.run import checkpoint


@pytest.mark.parametrize("added", [{}, {"decode": "scaled"}, {"fit": "pad"}])
def test_the_description_has_no_field_of_preprocessing_that_says_what_was_before(
    tmp_path: Path, added: dict[str, str]
) -> None:
    """An older version reads a checkpoint that is resumed by this one."""
    preprocess = {"size": 32, "crop": 0.875, "interpolation": "bilinear"} | added
    path = tmp_path / "best.json"
    values = {"name": "a", "arch": "squeezenet1_1", "classes": ["x", "y"], "schema": 1}
    path.write_text(json.dumps(values | {"preprocess": preprocess, "data": {"root": "photos"}}))
    info = checkpoint.read_info(path)
    checkpoint.write_info(path, info)
    written = json.loads(path.read_text())["preprocess"]
    assert {key: written.get(key) for key in ("decode", "fit")} == {
        **{"decode": added.get("decode"), "fit": added.get("fit")}
    }
    assert checkpoint.read_info(path) == info
