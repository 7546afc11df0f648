"""Tensors are written by Python's own file, and not by safetensors beside it."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serving.errors import WorkError
from tests.faults.file_operations import FileOperations
from training.run import tensor_file


def test_a_file_has_the_mode_of_any_other_file_and_its_tensors(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "other"
    other.touch()
    tensor_file.write(path, {"a": torch.arange(3.0)}, {"key": "text"})
    assert load_file(path)["a"].tolist() == [0, 1, 2]
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "other"]


@pytest.mark.parametrize("number", range(2))
def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_older_one(
    tmp_path: Path, number: int
) -> None:
    path = tmp_path / "a.safetensors"
    tensor_file.write(path, {"a": torch.zeros(1)})
    message = f"{path} can't be written: {os.strerror(28)}"
    with FileOperations(tmp_path, number, 28), pytest.raises(WorkError, match=f"^{message}$"):
        tensor_file.write(path, {"a": torch.ones(1)})
    assert load_file(path)["a"].tolist() == [0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
