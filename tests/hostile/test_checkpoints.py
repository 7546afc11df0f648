"""Descriptions and headers of checkpoints that state gigabytes, or are no JSON, end in one line."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from serving.errors import DataError
from serving.imaging.preprocess import Preprocess
from tests.hostile.graphs import fifo
from training.models.classifier import create_classifier
from training.run import checkpoint, folder, resume_state
from training.run.checkpoint import CheckpointInfo
from training.utils import tensor_header

ROOT = Path(__file__).parents[2]
INFO: dict[str, Any] = {
    "name": "a",
    "arch": "squeezenet1_1",
    "classes": ["x", "y"],
    "preprocess": Preprocess(size=64).to_dict(),
    "schema": 1,
}


def peak() -> int:
    """Most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refused(action: Callable[[], object], seconds: float = 15) -> str:
    """The message of the DataError; it is one line and was raised in time and without gigabytes."""
    before, started = peak(), time.monotonic()
    with pytest.raises(DataError) as caught:
        action()
    assert time.monotonic() - started < seconds
    assert peak() - before < 300e6
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def write(run: Path, info: dict[str, Any] | str, weights: bytes | None = None) -> Path:
    text = info if isinstance(info, str) else json.dumps(info)
    (run / "best.json").write_text(text, errors="surrogatepass")
    (run / "best.safetensors").write_bytes(weights or save({"a": torch.zeros(1)}))
    return run


LARGE = [
    {"head": {"hidden": [200_000]}},
    {"head": {"hidden": [10**15]}},
    {"head": {"hidden": [10**400]}},
    {"head": {"kind": "deep", "hidden": [3 * 10**9, 3 * 10**9]}},
    {"head": {"hidden": [512] * 100_000, "dropout": 0.1}},
    {"head": {"kind": "deep", "hidden": [512] * 20_000}},
    {"arch": "mobilenet_v2", "arch_args": {"width_mult": 3000.0}},
    {"arch": "mobilenet_v2", "arch_args": {"width_mult": 1e30}},
    {
        "arch": "mobilenet_v2",
        "arch_args": {"inverted_residual_setting": [[6, 24, 10**9, 2]]},
    },
    {"arch": "densenet121", "arch_args": {"growth_rate": 10**6}},
    {"arch": "densenet121", "arch_args": {"block_config": [10**8, 1, 1, 1]}},
    {"arch": "densenet121", "arch_args": {"num_init_features": 10**9}},
    {"arch": "resnet50", "arch_args": {"width_per_group": 10**6}},
    {"arch": "resnet18", "arch_args": {"groups": 10**9}},
    {"arch": "vit_b_16", "arch_args": {"image_size": 160_000}},
    {"arch": "mnasnet0_5", "arch_args": {"alpha": 1e6}},
]


@pytest.mark.parametrize("change", LARGE, ids=lambda change: json.dumps(change)[:60])
def test_a_description_of_gigabytes_is_refused_before_the_network_is_built(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    write(tmp_path, INFO | change)
    assert "best." in refused(lambda: checkpoint.load(tmp_path))


def test_the_classes_of_a_description_make_no_gigabytes(tmp_path: Path) -> None:
    write(tmp_path, INFO | {"arch": "vgg11", "classes": [str(number) for number in range(300_000)]})
    assert "best." in refused(lambda: checkpoint.load(tmp_path))


TEXTS = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 5000 + "1" + "}" * 5000,
    "lone surrogate": json.dumps(INFO).replace('"a"', '"\\ud800"'),
    "nan": json.dumps(INFO | {"metrics": {"loss": float("nan")}}),
    "infinite": json.dumps(INFO).replace('"schema": 1', '"seed": 1e999, "schema": 1'),
    "digits": json.dumps(INFO).replace('"schema": 1', f'"seed": {"9" * 4000}, "schema": 1'),
    "many digits": json.dumps(INFO).replace('"schema": 1', f'"seed": {"9" * 10**6}, "schema": 1'),
    "twice": json.dumps(INFO).replace('"schema": 1', '"name": "b", "schema": 1'),
    "list": "[]",
    "number": "1",
    "null": "null",
    "empty": "",
    "other kind": json.dumps(INFO | {"classes": {"x": 1}}),
    "other kinds": json.dumps(INFO | {"arch": ["a"], "head": 3, "data": "x"}),
    "no preprocess": json.dumps({"schema": 1}),
    "preprocess of text": json.dumps(INFO | {"preprocess": "x"}),
    "many lists": json.dumps(INFO | {"data": {"a": [[]] * 300_000}}),
    "wrong classes": json.dumps(INFO | {"classes": [1] * 1_000_000}),
    "wrong versions": json.dumps(INFO | {"versions": {str(n): n for n in range(190_000)}}),
    "line breaks": json.dumps(INFO | {"schema": "a\nb\x1b[31m"}),
    "megabytes": json.dumps(INFO | {"name": "a" * 5_000_000}),
}


OTHER_FIELDS = (
    *("other kind", "other kinds", "no preprocess", "preprocess of text", "wrong classes"),
    *("wrong versions", "line breaks", "megabytes"),
)


@pytest.mark.parametrize("name", TEXTS)
def test_a_description_that_is_not_as_written_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, TEXTS[name])
    message = refused(lambda: checkpoint.load(tmp_path))
    assert "best.json" in message
    assert "\x1b" not in message


@pytest.mark.parametrize("name", TEXTS)
def test_a_run_file_that_is_not_as_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / folder.RUN_FILE).write_text(TEXTS[name], errors="surrogatepass")
    assert "--resume" in refused(lambda: folder.read_run(tmp_path))


def entry(**values: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **values}


HEADERS = {
    "empty": b"",
    "short": b"\1\2",
    "long": header(b"{}", 2**62),
    "hundred megabytes": header(b"{}", 100_000_000),
    "deep": header(b"[" * 100_000 + b"]" * 100_000),
    "list": header(b"[]"),
    "text": header(b'"a"'),
    "tensor is text": header(b'{"a": "b"}'),
    "negative": header(json.dumps({"a": entry(shape=[-1])}).encode()),
    "huge": header(json.dumps({"a": entry(shape=[2**60])}).encode()),
    "dimensions": header(json.dumps({"a": entry(shape=[1] * 100_000)}).encode()),
    "float": header(json.dumps({"a": entry(shape=[1.5])}).encode()),
    "offsets": header(json.dumps({"a": entry(data_offsets=[0, 2**40])}).encode() + b""),
    "metadata": header(b'{"__metadata__": {"a": 1}}'),
    "twice": header(b'{"a": {}, "a": {}}'),
    "surrogate": header(b'{"\\ud800": {}}'),
    "many": header(json.dumps({str(n): entry() for n in range(50_000)}).encode()),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_not_as_written_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, INFO, HEADERS[name] or b"\0")
    assert "best.safetensors" in refused(lambda: checkpoint.load(tmp_path))
    (tmp_path / resume_state.STATE_FILE).write_bytes(HEADERS[name])
    message = refused(lambda: resume_state.load(tmp_path, torch.device("cpu")))
    assert resume_state.STATE_FILE in message


def state(position: str) -> bytes:
    return save({"model/a": torch.zeros(1)}, {"schema": "1", "position": position})


# Fields that a position doesn't have are ignored.
@pytest.mark.parametrize("name", [name for name in TEXTS if name not in OTHER_FIELDS])
def test_a_position_that_is_not_as_written_is_refused(tmp_path: Path, name: str) -> None:
    text = TEXTS[name].encode("ascii", "replace").decode()
    (tmp_path / resume_state.STATE_FILE).write_bytes(state(text))
    refused(lambda: resume_state.load(tmp_path, torch.device("cpu")))


@pytest.mark.parametrize("name", ["best.json", "best.safetensors", "state.safetensors", "run.json"])
def test_fifos_and_devices_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, INFO)
    actions: dict[str, Callable[[], object]] = {
        "state.safetensors": lambda: resume_state.load(tmp_path, torch.device("cpu")),
        "run.json": lambda: folder.read_run(tmp_path),
    }
    action = actions.get(name, lambda: checkpoint.load(tmp_path))
    fifo(tmp_path / name)
    assert "regular file" in refused(action)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "regular file" in refused(action)


def test_a_sparse_file_of_weights_is_not_read(tmp_path: Path) -> None:
    size = 2**38
    text = json.dumps({"a": entry(shape=[size // 4], data_offsets=[0, size])}).encode()
    write(tmp_path, INFO, header(text))
    os.truncate(tmp_path / "best.safetensors", 8 + len(text) + size)
    assert "does not fit" in refused(lambda: checkpoint.load(tmp_path))


@pytest.mark.process
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("squeezenet1_1", {}),
        ("mobilenet_v2", {"head": {"kind": "concat_pool", "hidden": [16]}}),
        ("resnet18", {"head": {"kind": "deep", "hidden": [8, 8]}}),
        ("regnet_y_400mf", {"head": {"kind": "linear"}}),
        ("densenet121", {}),
        ("vit_b_16", {"arch_args": {"image_size": 32}, "head": {"kind": "linear"}}),
        ("mnasnet0_5", {}),
        ("googlenet", {}),
        ("swin_t", {}),
    ],
)
def test_a_checkpoint_that_fits_is_loaded_and_draws_no_random_numbers_more(
    tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network = create_classifier(arch, 2, **options)
    info = CheckpointInfo("a", arch, ("x", "y"), Preprocess(), **options)
    checkpoint.save(tmp_path / "best.safetensors", network, info)
    torch.manual_seed(1)
    create_classifier(arch, 2, **options)
    expected = torch.rand(3)
    torch.manual_seed(1)
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    header = tensor_header.read_header(tmp_path / "best.safetensors")
    assert header.shapes == {name: tuple(v.shape) for name, v in network.state_dict().items()}


@pytest.mark.process
def test_the_command_ends_in_one_line_within_a_limit_of_memory(tmp_path: Path) -> None:
    write(tmp_path, INFO | {"head": {"hidden": [200_000]}})

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))

    done = subprocess.run(
        [sys.executable, "-m", "fledge", "evaluate", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
