import numpy as np
import pytest

from serving.errors import WorkError
from serving.inference import load, runtime
from serving.inference.load import open_predictor
from serving.inference.runtime import OnnxRuntime, PaddedBatchRuntime
from tests.support.tiny_bundle import photo, tiny_bundle


class Counting:
    provider = "counting"

    def __init__(self, limit=99):
        self.sizes, self.limit = [], limit

    def run(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.limit:
            raise WorkError("out of memory")
        sums = pixels.reshape(len(pixels), -1).sum(axis=1, keepdims=True).astype(np.float32)
        return sums, -sums


@pytest.mark.parametrize(
    ("rows", "run"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (17, 24)]
)
def test_a_batch_is_padded_and_only_its_own_rows_are_returned(rows, run):
    engine = Counting()
    padded = PaddedBatchRuntime(engine, 4, (1, 2, 4, 8))
    assert engine.sizes == [1, 2, 4, 8]  # run once each
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 4, 4, 3), np.uint8)
    logits, features = padded.run(pixels)
    assert engine.sizes[-1] == run
    expected = Counting().run(pixels)
    assert np.array_equal(logits, expected[0])
    assert np.array_equal(features, expected[1])
    assert padded.provider == "counting"


def test_a_batch_that_needs_too_much_memory_fails_at_the_start():
    with pytest.raises(WorkError, match="out of memory"):
        PaddedBatchRuntime(Counting(limit=8), 4)


def test_batches_are_padded_on_a_gpu_only(tmp_path, monkeypatch):
    folder = tiny_bundle(tmp_path)
    plain = open_predictor(folder, device="cpu")
    assert isinstance(plain.runtime, OnnxRuntime)

    class FakeGpuRuntime(OnnxRuntime):
        """Runs on the CPU and reports the provider of a GPU."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.provider = runtime.PROVIDERS["cuda"]

    monkeypatch.setattr(load, "OnnxRuntime", FakeGpuRuntime)
    padded = open_predictor(folder, device="cpu")
    assert isinstance(padded.runtime, PaddedBatchRuntime)
    assert padded.runtime.provider == "CUDAExecutionProvider"
    prepared = [plain.prepare(photo(seed)) for seed in range(5)]
    for one, other in zip(plain.predict(prepared), padded.predict(prepared), strict=True):
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-6)
