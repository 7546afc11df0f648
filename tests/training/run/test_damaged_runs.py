"""Files of a run that were damaged on disk are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serving.errors import DataError
from training.data.dataset import read_split
from training.run import checkpoint, metric_log, resume_state
from training.run.dataset import load_run_dataset
from training.run.folder import read_run

DEEP = "[" * 100_000 + "]" * 100_000
RUN = {
    "source": "photos",
    "root": "photos",
    "fingerprint": "0",
    "classes": ["x", "y"],
    "pretrained": False,
    "device": "cpu",
    "versions": {},
}
RECIPE = 'name = "a"\narch = "resnet18"\n[[stage]]\nname = "head"\n'
INFO: dict[str, Any] = {
    "name": "a",
    "arch": "squeezenet1_1",
    "classes": ["x", "y"],
    "preprocess": {"size": 32},
    "data": {"root": "photos"},
    "schema": 1,
}
EPOCH = {
    **{"stage": "head", "epoch": 1, "lr": 0.1, "train_loss": 0.5},
    **{"valid_loss": 0.4, "accuracy": 0.9, "seconds": 1.5},
}
POSITION: dict[str, Any] = {"stage": 1, "epoch": 1, "best": [0.9, -0.4], "history": [EPOCH]}


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [DEEP, "3", "null", json.dumps(RUN | {"classes": [{}]}), json.dumps(RUN | {"root": 3})],
)
def test_a_damaged_description_of_a_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert read_run(tmp_path)[1].classes == ("x", "y")
    (tmp_path / "run.json").write_text(text)
    assert "its files can't be read" in refused(lambda: read_run(tmp_path))


@pytest.mark.parametrize("recipe", ["a = " + DEEP, "a = " + "9" * 5000, "a = {a=" * 2000])
def test_a_recipe_of_a_run_that_no_parser_takes(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "recipe.toml").write_text(recipe)
    assert "its files can't be read" in refused(lambda: read_run(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "3",
        json.dumps(INFO | {"classes": [["x"], 3]}),
        json.dumps(INFO | {"head": 3}),
        json.dumps(INFO | {"arch": None}),
        json.dumps(INFO | {"preprocess": 3}),
        json.dumps(INFO | {"preprocess": {"crop": 10**400}}),
        json.dumps(INFO | {"name": "\ud800"}),
        json.dumps(INFO | {"metrics": {"loss": float("nan")}}),
    ],
)
def test_a_damaged_description_of_a_checkpoint(tmp_path: Path, text: str) -> None:
    path = tmp_path / "best.json"
    path.write_text(json.dumps(INFO))
    assert checkpoint.read_info(path).preprocess.size == 32
    path.write_text(text)
    assert "is not a checkpoint description" in refused(lambda: checkpoint.read_info(path))


@pytest.mark.parametrize("head", [{"dropout": [0.1]}, {"hidden": "x"}, {"other": 1}])
def test_a_checkpoint_whose_head_can_not_be_built(tmp_path: Path, head: dict[str, Any]) -> None:
    (tmp_path / "best.json").write_text(json.dumps(INFO | {"head": head}))
    save_file({"a": torch.zeros(1)}, tmp_path / "best.safetensors")
    assert "best.json can't be used" in refused(lambda: checkpoint.load(tmp_path))


@pytest.mark.parametrize("root", [None, 3, "a\0b", "x" * 300, {}])
def test_a_checkpoint_without_a_folder_of_photos(tmp_path: Path, root: object) -> None:
    (tmp_path / "best.json").write_text(json.dumps(INFO | {"data": {"root": root}}))
    refused(lambda: load_run_dataset(tmp_path))


def write_state(folder: Path, position: object, **tensors: torch.Tensor) -> None:
    header = {"schema": resume_state.SCHEMA, "position": json.dumps(position)}
    named = {name.replace("__", "/"): value for name, value in tensors.items()}
    save_file(named or {"model/a": torch.zeros(1)}, folder / resume_state.STATE_FILE, header)


@pytest.mark.parametrize(
    "position",
    [
        3,
        [],
        POSITION | {"history": [EPOCH | {"epoch": []}]},
        POSITION | {"history": [{}]},
        POSITION | {"history": 3},
        POSITION | {"best": 3},
        POSITION | {"best": [1]},
        POSITION | {"stage": "x"},
        POSITION | {"stage": -1},
        POSITION | {"processes": 0},
    ],
)
def test_a_state_whose_position_is_damaged(tmp_path: Path, position: object) -> None:
    write_state(tmp_path, POSITION)
    loaded = resume_state.load(tmp_path, torch.device("cpu"))
    assert loaded is not None
    assert loaded[0].best == (0.9, -0.4)
    assert loaded[0].history[0].accuracy == 0.9
    write_state(tmp_path, position)
    message = refused(lambda: resume_state.load(tmp_path, torch.device("cpu")))
    assert "start the run again" in message


def test_a_state_with_a_random_state_that_torch_does_not_know(tmp_path: Path) -> None:
    write_state(tmp_path, POSITION, random__cpu=torch.zeros(5056, dtype=torch.uint8))
    assert "can't be read" in refused(lambda: resume_state.load(tmp_path, torch.device("cpu")))


@pytest.mark.parametrize("name", ["x.exp_avg", "7.exp_avg", "-1.exp_avg", "0.exp_avg", ""])
def test_an_optimizer_state_of_another_run(name: str) -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    tensors = {name: torch.zeros(2)}
    refused(lambda: resume_state.load_optimizer_state(optimizer, tensors))


@pytest.mark.parametrize(
    "text",
    [
        b"x,y\n1,2\n",
        b"stage,epoch,step,loss,momentum,lr\nhead,x,1,0.5,0.9,0.1\n",
        b"stage,epoch,step,loss,momentum,lr\nhead,1\n",
        b"\xff\n",
    ],
)
def test_damaged_optimizer_steps(tmp_path: Path, text: bytes) -> None:
    (tmp_path / metric_log.STEPS).write_bytes(text)
    assert "steps.csv can't be read" in refused(lambda: metric_log.read_steps(tmp_path))


def test_a_split_with_a_row_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text("fold,label,path\ntrain,x\n")
    message = refused(lambda: read_split(path, tmp_path, ("x",), "photos", needed=()))
    assert "split.csv can't be read" in message
