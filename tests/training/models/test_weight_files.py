"""Files of weights are judged by their content: taken where it is safe, else named in one line."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save, save_file
from torch import nn

from serving.errors import DataError
from training.models import backbones, weights
from training.models.classifier import create_classifier

ARGS = {"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 2], [2, 16, 1, 1]]}
LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 14214848\n"
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = torchvision.models.mobilenet_v2(num_classes=7, **ARGS)
    return made


@pytest.fixture(scope="module")
def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return network.state_dict()


def load(path: Path | str) -> nn.Sequential:
    return backbones.build("mobilenet_v2", ARGS, str(path)).body


def refused(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


class Ema(dict[str, torch.Tensor]):
    pass


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda s: s,
    "ddp": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled ddp": lambda s: prefixed("module._orig_mod.", s),
    "compiled parts": lambda s: {
        key.replace("features.", "features._orig_mod."): value for key, value in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "mobilenet_v2"},
    "model_state_dict": lambda s: {
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.ones(1)}}},
    },
    "model": lambda s: {"model": s, "args": argparse.Namespace(out=pathlib.PosixPath("x"))},
    "unknown name": lambda s: {"learned": s, "best": 0.5},
    "two levels": lambda s: {"checkpoint": {"net": s}},
    "lightning": lambda s: {
        "state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(7)},
        "hyper_parameters": {"lr": 0.1},
    },
    "backbone": lambda s: prefixed("backbone.", WRAPPED["no classifier"](s)),
    "only an average": lambda s: {"model_ema": prefixed("module.", s)},
    "swa": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)},
    "random state beside it": lambda s: {"model": s, "rng": torch.get_rng_state()},
    "numpy results": lambda s: {"model": s, "best": np.float64(0.5), "epoch": np.int64(3)},
    "half": lambda s: {key: v.half() if v.is_floating_point() else v for key, v in s.items()},
    "no classifier": lambda s: {k: v for k, v in s.items() if not k.startswith("classifier")},
    "texts and numbers beside": lambda s: {**s, "epoch": 3, "name": "x"},
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("file", ["x.pth", "x.bin", "legacy.pt"])
def test_usual_wrappings_are_taken_off(
    state: dict[str, torch.Tensor], tmp_path: Path, kind: str, file: str
) -> None:
    options = {"_use_new_zipfile_serialization": False} if file == "legacy.pt" else {}
    (tmp_path / file).write_bytes(saved(WRAPPED[kind](state), **options))
    body = load(tmp_path / file)
    for key, value in body.state_dict().items():
        expected = state[f"features.{key}"]
        if kind == "half" and expected.is_floating_point():
            expected = expected.half().float()
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("file", ["x.safetensors", "x.pth"])
def test_safetensors_are_known_by_their_content(
    state: dict[str, torch.Tensor], tmp_path: Path, file: str
) -> None:
    save_file(state, tmp_path / file)
    assert torch.equal(load(tmp_path / file)[0][0].weight, state["features.0.0.weight"])
    torch.save(state, tmp_path / "y.safetensors")
    assert torch.equal(load(tmp_path / "y.safetensors")[0][0].weight, state["features.0.0.weight"])


def test_a_path_that_is_not_utf8_is_read(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff'.safetensors")
    path.write_bytes(save(state))
    load(path)


def test_a_checkpoint_of_fledge_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = create_classifier("mobilenet_v2", 3, arch_args=ARGS)
    save_file(classifier.state_dict(), tmp_path / "best.safetensors")
    body = load(tmp_path / "best.safetensors")
    assert all(
        torch.equal(v, classifier.body.state_dict()[k]) for k, v in body.state_dict().items()
    )
    assert str(tmp_path / "best.safetensors") in refused(tmp_path)  # the run's folder


def test_of_several_state_dicts_the_usual_one_is_taken_and_the_others_are_told(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema = {f"module.{key}": torch.zeros_like(value) for key, value in state.items()}
    path = tmp_path / "x.pth"
    torch.save({"model_ema": ema, "model": state}, path)
    assert load(path)[0][0].weight.abs().sum() > 0
    assert "'model' is taken, and 'model_ema' not; choose by FILE::NAME" in capsys.readouterr().err
    assert load(f"{path}::model_ema")[0][0].weight.abs().sum() == 0
    assert capsys.readouterr().err == ""
    assert "has no state dict 'x'; it has 'model_ema', 'model'" in refused(f"{path}::x")
    torch.save({"student": state, "teacher": ema}, path)
    message = refused(path)
    assert "has several state dicts: 'student', 'teacher'" in message
    assert "FILE::student" in message
    load(f"{path}::teacher")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([float("nan")], "1 NaN of 72 values"),
        ([float("inf"), -float("inf")], "2 infinite of 72 values"),
        ([float("nan"), float("inf")], "1 NaN and 1 infinite of 72 values"),
    ],
)
@pytest.mark.parametrize("file", ["x.pth", "x.safetensors"])
def test_values_that_are_not_finite_are_refused_with_the_tensor(
    state: dict[str, torch.Tensor], tmp_path: Path, value: list[float], told: str, file: str
) -> None:
    broken = {key: tensor.clone() for key, tensor in state.items()}
    broken["features.1.conv.0.0.weight"].view(-1)[: len(value)] = torch.tensor(value)
    data = saved(broken) if file == "x.pth" else save(broken)
    (tmp_path / file).write_bytes(data)
    message = refused(tmp_path / file)
    assert f"features.1.conv.0.0.weight has {told}" in message
    assert "diverged" in message


def test_a_classifier_that_is_not_used_may_have_any_values_and_classes(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    other = {**state, "classifier.1.weight": torch.full((3, 1280), float("nan"))}
    torch.save(other, tmp_path / "x.pth")
    load(tmp_path / "x.pth")


def test_weights_of_a_quantised_network_are_refused(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = {k: (v * 100).to(torch.int8) if v.ndim == 4 else v for k, v in state.items()}
    torch.save(whole, tmp_path / "x.pth")
    assert "has values of type int8" in refused(tmp_path / "x.pth")


def archive(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("x.pth"))
    return file.getvalue()


def onnx_graph() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])  # fmt: skip
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("the-code-ran",)


def torchscript() -> bytes:
    file = io.BytesIO()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], bytes], str]] = {
    "empty": (lambda _: b"", "is empty"),
    "lfs": (lambda _: LFS, "is a pointer of Git LFS, not the file of 14,214,848 bytes itself"),
    "html": (lambda _: b"\n<!DOCTYPE html><html><title>Sign in</title>", "is a web page"),
    "html small": (lambda _: b"<html>", "is a web page"),
    "xml": (lambda _: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a web page"),
    "text": (lambda _: b"Entry not found", "is a text, not weights; it begins with 'Entry not"),
    "json": (lambda _: json.dumps({"weight_map": {}}).encode(), "is JSON, not weights"),
    "onnx": (lambda _: onnx_graph(), "is an ONNX graph"),
    "hdf5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, of Keras"),
    "tflite": (lambda _: b"\x1c\0\0\0TFL3" + bytes(100), "is a TensorFlow Lite graph"),
    "numpy": (lambda _: b"\x93NUMPY\x01\0" + bytes(100), "is a single NumPy array"),
    "npz": (lambda _: archive(**{"a.npy": b"\x93NUMPY"}), "is an archive of NumPy arrays"),
    "keras": (lambda _: archive(**{"config.json": b"", "model.weights.h5": b""}), "of Keras"),
    "zip": (lambda _: archive(**{"a/x.pth": b"x"}), "is a zip archive ('a/x.pth' in it); unpack"),
    "zip empty": (lambda _: b"PK\5\6" + bytes(18), "is damaged or cut short"),
    "gzip": (lambda s: gzip.compress(saved(s)), "is compressed; unpack it"),
    "tar": (lambda _: tar(), "is a tar archive; unpack it"),
    "picture": (lambda _: b"\xff\xd8\xff\xe0" + bytes(100), "is a picture"),
    "torchscript": (lambda _: torchscript(), "a TorchScript program, which is not run"),
    "cut": (lambda s: saved(s)[:-4000], "is cut short: it has "),
    "cut at the start": (lambda s: saved(s)[:60], "is cut short: it has 60 bytes"),
    "cut legacy": (lambda s: saved(s, _use_new_zipfile_serialization=False)[:-4000], "cut short"),
    "cut safetensors": (lambda s: save(s)[:-4], "is cut short or damaged"),
    "long safetensors": (lambda s: struct.pack("<Q", 50) + b"{" + bytes(60), "cut short or dam"),
    "code": (lambda _: saved({"a": Evil()}), "it contains code (posix.mkdir), which is not run"),
    "legacy code": (
        lambda _: saved({"a": Evil()}, _use_new_zipfile_serialization=False), "it contains code"),
    "pickle": (lambda s: pickle.dumps({"a": 1}), "a pickle that torch.save has not written"),
    "pickle with code": (lambda _: pickle.dumps(Evil()), "may contain code, which is not run"),
    "whole network": (
        lambda _: saved(nn.Linear(2, 2)), "contains code (torch.nn.modules.linear.Linear)"),
    "a list": (lambda _: saved([torch.zeros(1)]), "it must map names to tensors"),
    "a tensor": (lambda _: saved(torch.zeros(1)), "it must map names to tensors"),
    "numbers": (lambda _: saved({"epoch": 3}), "it must map names to tensors"),
    "another protocol": (
        lambda s: saved(s, pickle_protocol=4), "not in the form that torch.save usually has"),
    "garbage": (lambda _: bytes(range(1, 256)) * 9, "it is damaged or cut short at 2,295 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_usable_weights_is_named_for_what_it_is(
    state: dict[str, torch.Tensor], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, told = FILES[kind]
    for name in ("x.pth", "x.safetensors", "x.onnx"):
        (tmp_path / name).write_bytes(make(state))
        message = refused(tmp_path / name)
        assert told in message, message
        assert repr(str(tmp_path / name)) in message
    assert not (tmp_path / "the-code-ran").exists()


def test_a_dict_that_contains_itself_is_no_endless_search(tmp_path: Path) -> None:
    loop: dict[str, Any] = {str(number): {} for number in range(300)}
    for key in list(loop):
        loop[key] = loop
    torch.save(loop, tmp_path / "x.pth")
    assert "must map names to tensors" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("arch", "names", "told"),
    [
        ("resnet18", None, "it has the size of resnet18"),
        ("resnet34", None, "it has the size of resnet34"),
        ("squeezenet1_1", None, "it has the size of squeezenet1_1"),
        ("vgg11_bn", None, "it has the size of vgg11_bn"),
        ("", ["conv_stem.weight", "blocks.0.0.conv_dw.weight"], "its names are timm, not"),
        ("", ["vit.embeddings.patch_embeddings.projection.weight"], "are Hugging Face's, not"),
        ("", ["model.0.conv.weight", "model.1.cv1.conv.weight"], "its names are ultralytics, not"),
    ],
)
def test_weights_of_another_network_are_named(
    arch: str, names: list[str] | None, told: str
) -> None:
    if arch:
        with torch.device("meta"):
            found = torchvision.models.get_model(arch, weights=None, num_classes=5).state_dict()
    else:
        found = {name: torch.zeros(1, 1) for name in names or ()}
    assert told in weights.origin(found, "mobilenet_v2")


def test_the_message_for_another_network_says_which_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = torchvision.models.resnet18(num_classes=5).state_dict()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in other.items()}}, tmp_path / "x"
    )
    message = refused(tmp_path / "x")
    assert "is not for mobilenet_v2: it lacks features.0.0.weight" in message
    assert message.endswith("; it has the size of resnet18")
