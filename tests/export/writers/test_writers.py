"""Files of all formats: graph contract, equal bytes, no data about this machine."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import graph
from export.torchvision_checkpoint import WholeNetwork
from export.writers import onnx as writer
from export.writers import torch_export, torchscript
from serving.errors import WorkError
from serving.imaging.preprocess import Preprocess
from serving.inference.runtime import OnnxRuntime
from serving.inference.torchscript import TorchScriptRuntime
from tests.export.conftest import pixels

LABELS = ("blau", "grün", "rot")


WRITERS = {"onnx": writer, "ts": torchscript, "pt2": torch_export}


def write(run, folder):
    """Write the file of each format."""
    assembled, _ = graph.assemble(run.classifier, run.preprocess)
    facts = {"name": "tiny", "labels": LABELS, "preprocess": run.preprocess}
    paths = [folder / f"model.{suffix}" for suffix in WRITERS]
    for one, path in zip(WRITERS.values(), paths, strict=True):
        one.write(assembled, path, **facts)
    return paths


@pytest.fixture(scope="module")
def files(shared_run, recorded, tmp_path_factory):
    """The file of each format; the translation to ONNX is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        recorded.patch(patch)
        return write(shared_run, tmp_path_factory.mktemp("graphs"))


def test_the_files_have_no_paths_or_stack_traces(files):
    for path in files:
        data = path.read_bytes()
        if path.suffix != ".onnx":
            with zipfile.ZipFile(path) as archive:
                data = b"".join(archive.read(name) for name in archive.namelist())
                assert not [name for name in archive.namelist() if "debug" in name]
        assert str(Path.cwd()).encode() not in data
        assert b"site-packages" not in data
        assert not re.search(rb'File "|stack_trace', data)


def test_the_same_graph_gives_the_same_bytes(files, shared_run, tmp_path):
    again = write(shared_run, tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_files_give_the_checkpoint_s_outputs_at_any_batch_size(files, batch, shared_run):
    x = pixels(batch, 32).numpy()
    checkpoint = graph.CheckpointRuntime(shared_run.classifier, shared_run.preprocess)
    expected = checkpoint.run(x)
    onnx_file, script, program = files
    engines = [OnnxRuntime(onnx_file, device="cpu"), TorchScriptRuntime(script)]
    for engine in (*engines, torch_export.ExportedRuntime(program)):
        for one, other in zip(expected, engine.run(x), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


def test_the_onnx_file_is_self_contained_and_has_metadata(files):
    loaded = onnx.load(files[0], load_external_data=False)
    assert loaded.opset_import[0].version >= 17
    assert not [node for node in loaded.graph.node if node.op_type == "BatchNormalization"]
    assert not any(tensor.external_data for tensor in loaded.graph.initializer)
    assert [i.name for i in loaded.graph.input] == ["pixels"]
    assert [o.name for o in loaded.graph.output] == ["logits", "features"]
    facts = {prop.key: prop.value for prop in loaded.metadata_props}
    assert facts["name"] == "tiny"
    assert tuple(json.loads(facts["labels"])) == LABELS
    assert json.loads(facts["preprocess"])["size"] == 32


def test_tensors_in_the_torchscript_file_are_aligned(files):
    path = files[1]
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            name, extra = (
                int.from_bytes(data[entry.header_offset + at :][:2], "little") for at in (26, 28)
            )
            assert (entry.header_offset + 30 + name + extra) % 64 == 0


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("layer", "operator"),
    [(Unsupported(), "bessel_j0"), (torch.nn.FractionalMaxPool2d(2, 2), "fractional_max_pool2d")],
)
def test_an_operator_without_a_translation_is_named_with_its_module(tmp_path, layer, operator):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.Sequential(layer)),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )
    assembled, _ = graph.assemble(WholeNetwork(network).eval(), Preprocess(size=32))
    facts = {"name": "odd", "labels": LABELS, "preprocess": Preprocess(size=32)}
    line = rf"as ONNX: no translation for {operator}, in network\.1\.1\.0$"
    with pytest.raises(WorkError, match=line):
        writer.write(assembled, tmp_path / "model.onnx", **facts)


def test_a_network_too_large_for_the_file_is_refused_before_the_export(
    shared_run, tmp_path, monkeypatch, recorded_exporters
):
    assembled, _ = graph.assemble(shared_run.classifier, shared_run.preprocess)
    weights = sum(one.numel() * 4 for one in assembled.state_dict().values())
    facts = {"name": "tiny", "labels": LABELS, "preprocess": shared_run.preprocess}
    monkeypatch.setattr(writer, "_MAX_BYTES", weights)
    writer.write(assembled, tmp_path / "model.onnx", **facts)
    monkeypatch.setattr(writer, "_MAX_BYTES", weights - 1)
    monkeypatch.setattr(writer, "_translate", None)
    with pytest.raises(WorkError, match=r"its weights take 0\.0 GB, and a file holds 0\.0"):
        writer.write(assembled, tmp_path / "model.onnx", **facts)


def test_an_exporter_error_is_one_line(shared_run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise writer.torch.onnx.OnnxExporterError("no translation for aten::odd\nmore\nlines")

    monkeypatch.setattr(writer.torch.onnx, "export", refuse)
    assembled, _ = graph.assemble(shared_run.classifier, shared_run.preprocess)
    facts = {"name": "tiny", "labels": LABELS, "preprocess": shared_run.preprocess}
    with pytest.raises(WorkError, match=r"can't be written as ONNX: no translation for aten::odd$"):
        writer.write(assembled, tmp_path / "model.onnx", **facts)
