"""Files of a run folder: description, split, checkpoint and state for resuming."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import mutators
from tests.fuzz.target import Target, put

_RUN = {
    "source": "photos",
    "root": "photos",
    "fingerprint": "0" * 12,
    "classes": ["x", "y"],
    "pretrained": False,
    "device": "cpu",
    "versions": {"python": "3.11"},
}
_RECIPE = b'name = "a"\narch = "squeezenet1_1"\n[[stage]]\nname = "head"\n'
_PHOTOS = ("x/1.jpg", "y/2.jpg", "x/3.jpg", "y/4.jpg")
_SPLIT = "path,fold,label\n" + "".join(
    f"{path},{part},{path[0]}\n"
    for path, part in zip(_PHOTOS, ("train", "train", "valid", "valid"), strict=True)
)
_STEPS = b"stage,epoch,step,loss,momentum,lr\nhead,1,1,0.5,0.9,0.01 0.1\n"


def prepare() -> None:
    for name in _PHOTOS:
        path = Path("photos") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    Path("run").mkdir()
    from training.data import dataset, splits  # noqa: F401
    from training.run import folder, metric_log  # noqa: F401


def run_seeds() -> Iterator[bytes]:
    files = {"run.json": json.dumps(_RUN).encode(), "recipe.toml": _RECIPE}
    yield mutators.join_files({**files, "split.csv": _SPLIT.encode()})
    yield mutators.join_files({**files, "steps.csv": _STEPS, "given.csv": _SPLIT.encode()})
    yield mutators.join_files(
        {"given.csv": b"\xef\xbb\xbf path , fold \r\nx/1.jpg, 0\r\ny/2.jpg,1"}
    )


def check_run(data: bytes) -> None:
    from serving.errors import FledgeError
    from training.config.sections import DataConfig
    from training.data.dataset import read_split
    from training.data.splits import draw_split, read_split_file
    from training.run import folder, metric_log

    files = mutators.split_files(data)
    run = Path("run")
    for name in ("run.json", "recipe.toml", "split.csv", "steps.csv", "given.csv"):
        put(run / name, files.get(name))
    errors: list[FledgeError] = []
    classes = ("x", "y")
    try:
        _, info = folder.read_run(run)
        classes = info.classes
    except FledgeError as error:
        errors.append(error)
    try:
        read_split(run / "split.csv", Path("photos"), classes, "photos")
    except FledgeError as error:
        errors.append(error)
    try:
        config = DataConfig()
        photos = read_split_file(
            Path("photos"), run / "given.csv", config, _label_of, class_folders=True
        )
        draw_split(Path("photos"), photos, config, 0)
    except FledgeError as error:
        errors.append(error)
    metric_log.read_steps(run)


def _label_of(path: str) -> str:
    return path.partition("/")[0]


# Checkpoints and resume states: safetensors


def _safetensors(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _split_tensors(data: bytes) -> tuple[bytes, bytes] | None:
    if len(data) < 8:
        return None
    (length,) = struct.unpack_from("<Q", data)
    return (data[8 : 8 + length], data[8 + length :]) if length <= len(data) else None


def tensors_change(rng: random.Random, data: bytes) -> bytes:
    """Change the header's JSON, or JSON texts within it, and state the header's length."""
    found = _split_tensors(data)
    if found is None:
        return data
    text, body = found
    try:
        header = json.loads(text)
        position = str(header["__metadata__"]["position"])
    except (ValueError, KeyError, TypeError, RecursionError):
        position = None
    if position is not None and rng.random() < 0.6:
        changed = mutators.json_change(_POSITION)(rng, position.encode("utf-8", "surrogatepass"))
        header["__metadata__"]["position"] = changed.decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = mutators.json_change((*_DTYPES, "dtype", "shape"))(rng, text)
    return struct.pack("<Q", len(text)) + text + body


_DTYPES = ("F32", "F64", "I64", "BOOL", "F8_E4M3", "BF16", "U8", "C64", "F4")
_EPOCH = {
    "stage": "head",
    "epoch": 1,
    "lr": 0.1,
    "train_loss": 0.5,
    "valid_loss": 0.4,
    "accuracy": 0.9,
    "seconds": 1.5,
}
_STATE = {
    "stage": 1,
    "epoch": 1,
    "first_view": 0,
    "views": None,
    "lr": 0.1,
    "best": [0.9, -0.4],
    "history": [_EPOCH, {**_EPOCH, "epoch": 2}],
    "processes": 1,
}
_POSITION = (*_STATE, *_EPOCH)


def state_seeds() -> Iterator[bytes]:
    import torch

    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for names in (["model/a"], ["model/a", "optimizer/0.exp_avg"], ["ema/a"], []):
        header: dict[str, Any] = {
            name: {**tensor, "data_offsets": [8 * n, 8 * n + 8]} for n, name in enumerate(names)
        }
        header["__metadata__"] = {"schema": "1", "position": json.dumps(_STATE)}
        yield _safetensors(header, bytes(8 * len(names)))
    short = {"__metadata__": {"schema": "1", "position": json.dumps({**_STATE, "history": []})}}
    generator = {"dtype": "U8", "shape": [5056], "data_offsets": [0, 5056]}
    yield _safetensors({**short, "random/cpu": generator}, torch.get_rng_state().numpy().tobytes())


_optimizer: Any = None


def prepare_torch() -> None:
    import torch

    torch.set_num_threads(1)
    Path("run").mkdir()


def prepare_state() -> None:
    global _optimizer
    prepare_torch()
    import torch

    from training.run import resume_state  # noqa: F401

    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    _optimizer = torch.optim.Adam(parameters)  # the first one of a process imports the compiler


def check_state(data: bytes) -> None:
    import torch

    from training.run import resume_state

    folder = Path("run")
    put(folder / resume_state.STATE_FILE, data)
    found = resume_state.load(folder, torch.device("cpu"))
    if found is None:
        raise AssertionError("there is a state")
    position, tensors = found
    position.losses("head")
    if not isinstance(position.stage + position.epoch + position.processes, int):
        raise AssertionError(f"{position}")
    resume_state.load_optimizer_state(_optimizer, tensors.optimizer)


_INFO = {
    "name": "a",
    "arch": "squeezenet1_1",
    "classes": ["x", "y"],
    "preprocess": {
        "size": 32,
        "crop": 0.875,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "background": [255, 255, 255],
    },
    "arch_args": {},
    "head": {"dropout": [0.1, 0.2]},
    "seed": 0,
    "data": {"source": "photos", "root": "photos", "fingerprint": "0", "train": 2, "valid": 2},
    "metrics": {"accuracy": 0.5, "loss": 0.7, "stage": "head", "epoch": 1},
    "versions": {"python": "3.11"},
    "schema": 1,
}


def checkpoint_seeds() -> Iterator[bytes]:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    head = _safetensors({"a": tensor, "__metadata__": {"format": "pt"}}, bytes(8))
    for info in (_INFO, {**_INFO, "head": {"kind": "linear"}}):
        yield mutators.join_files({"a.json": json.dumps(info).encode(), "a.safetensors": head})


def prepare_checkpoint() -> None:
    prepare_torch()
    from training.run import checkpoint, dataset  # noqa: F401


def check_checkpoint(data: bytes) -> None:
    from serving.errors import FledgeError
    from training.run import checkpoint, dataset

    files = mutators.split_files(data)
    run = Path("run")
    for name, path in (("a.json", "best.json"), ("a.safetensors", "best.safetensors")):
        put(run / path, files.get(name))
    errors: list[FledgeError] = []
    if b'"sample"' not in data:  # the sample data set would be painted into the user's cache
        try:
            dataset.load_run_dataset(run)
        except FledgeError as error:
            errors.append(error)
    info = checkpoint.read_info(run / "best.json")
    if info.arch == _INFO["arch"]:
        checkpoint.load(run)


_TABLES = mutators.one_of(mutators.csv_change(("path", "fold", "label")), mutators.lines_change())


def _toml(rng: random.Random, data: bytes) -> bytes:
    from tests.fuzz.targets import recipes

    return recipes._CHANGES["recipe.toml"](rng, data)


TARGETS = (
    Target(
        "run",
        check_run,
        run_seeds,
        mutators.files_change(
            {".json": mutators.json_change(tuple(_RUN)), ".csv": _TABLES, ".toml": _toml}
        ),
        prepare=prepare,
        words=(b"train", b"valid", b"test", b"path", b"fold", b"%% split.csv\n", b"%% given.csv\n"),
    ),
    Target(
        "checkpoint",
        check_checkpoint,
        checkpoint_seeds,
        mutators.files_change(
            {".json": mutators.json_change(tuple(_INFO)), ".safetensors": tensors_change}
        ),
        prepare=prepare_checkpoint,
        words=tuple(f'"{name}"'.encode() for name in (*_INFO, *_DTYPES)),
    ),
    Target(
        "state",
        check_state,
        state_seeds,
        tensors_change,
        prepare=prepare_state,
        words=tuple(f'"{name}"'.encode() for name in (*_POSITION, *_DTYPES)),
    ),
)
