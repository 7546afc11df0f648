import logging
from pathlib import Path

import numpy as np
import pytest

from serving.bundle import storage
from serving.errors import BundleError, OptionError, WorkError
from serving.inference.runtime import PROVIDERS, OnnxRuntime, _why_not
from tests.support.tiny_bundle import tiny_bundle

needs_no_gpu = pytest.mark.skipif(_why_not("cuda") is None, reason="this machine has a GPU")
needs_gpu = pytest.mark.skipif(_why_not("cuda") is not None, reason="no GPU here")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return storage.read(tiny_bundle(tmp_path_factory.mktemp("bundle"))).graph("fp32")


def pixels(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(graph: Path, rows: int):
    runtime = OnnxRuntime(graph, device="cpu")
    batch = pixels(rows)
    logits, features = runtime.run(batch)
    assert logits.dtype == features.dtype == np.float32
    assert logits.shape == (rows, 3)
    for number in range(rows):
        single, single_features = runtime.run(batch[number : number + 1])
        np.testing.assert_allclose(logits[number], single[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(features[number], single_features[0], rtol=1e-5, atol=1e-5)


def test_a_strided_array_gives_the_same(graph: Path):
    runtime = OnnxRuntime(graph, device="cpu")
    flipped = pixels(1)[:, :, ::-1]
    expected, _ = runtime.run(flipped.copy())
    np.testing.assert_array_equal(runtime.run(flipped)[0], expected)


def test_device_cpu_runs_on_the_cpu(graph: Path):
    assert OnnxRuntime(graph, device="cpu", threads=2).provider == PROVIDERS["cpu"]


@needs_no_gpu
def test_auto_falls_back_to_the_cpu_and_logs_it(graph: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "bentoml.fledge"):
        assert OnnxRuntime(graph, device="auto").provider == PROVIDERS["cpu"]
    assert "on the CPU" in caplog.text


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_missing_device_is_an_error_with_a_remedy(graph: Path, device: str):
    with pytest.raises(OptionError, match=rf"device = {device}: .*; install .* or use device cpu"):
        OnnxRuntime(graph, device=device)


@needs_gpu
@pytest.mark.gpu
def test_cuda_answers_as_the_cpu_does(graph: Path):
    batch = pixels(7)
    runtime = OnnxRuntime(graph, device="cuda")
    assert runtime.provider == PROVIDERS["cuda"]
    np.testing.assert_allclose(
        runtime.run(batch)[0], OnnxRuntime(graph, device="cpu").run(batch)[0], atol=1e-4
    )


def test_an_unknown_device_is_named(graph: Path):
    with pytest.raises(OptionError, match="tpu"):
        OnnxRuntime(graph, device="tpu")


def test_a_file_that_is_not_a_graph_is_refused(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        OnnxRuntime(path, device="cpu")


def test_a_graph_with_other_inputs_and_outputs_is_refused(tmp_path: Path):
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "other",
        [info("x", TensorProto.FLOAT, [1])],
        [info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="contract"):
        OnnxRuntime(path, device="cpu")


def test_a_failing_run_is_a_one_line_work_error(graph: Path):
    with pytest.raises(WorkError) as caught:
        OnnxRuntime(graph, device="cpu").run(np.zeros((1, 8, 8, 3), np.uint8))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # deprecated, still supported
def test_torchscript_has_the_same_inputs_and_outputs(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from serving.inference.torchscript import TorchScriptRuntime

    class Graph(torch.nn.Module):
        def forward(self, pixels):
            features = pixels.float().mean(dim=(1, 2))
            return features * 2, features

    path = tmp_path / "model.ts"
    torch.jit.trace(Graph(), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)).save(str(path))
    runtime = TorchScriptRuntime(path)
    batch = pixels(3)
    logits, features = runtime.run(batch)
    assert runtime.provider == "torchscript-cpu"
    np.testing.assert_allclose(features, batch.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(logits, features * 2)
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"model\.ts"):
        TorchScriptRuntime(path)
    with pytest.raises(OptionError, match="tpu"):
        TorchScriptRuntime(path, device="tpu")
