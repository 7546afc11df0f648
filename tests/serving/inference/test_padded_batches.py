import numpy as np
import pytest

from serving.errors import WorkError
from serving.inference import runtime
from serving.inference.buckets import PaddedBatchRuntime
from serving.inference.load import open_predictor
from serving.inference.runtime import OnnxRuntime
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
def test_a_batch_is_filled_and_only_what_came_is_answered(rows, run):
    engine = Counting()
    bucketed = PaddedBatchRuntime(engine, 4, (1, 2, 4, 8))
    assert engine.sizes == [1, 2, 4, 8]  # warmed
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 4, 4, 3), np.uint8)
    logits, features = bucketed.run(pixels)
    assert engine.sizes[-1] == run
    expected = Counting().run(pixels)
    assert np.array_equal(logits, expected[0])
    assert np.array_equal(features, expected[1])
    assert bucketed.provider == "counting"


def test_what_does_not_fit_fails_while_loading():
    with pytest.raises(WorkError, match="out of memory"):
        PaddedBatchRuntime(Counting(limit=8), 4)


def test_a_gpu_gets_buckets_and_a_cpu_does_not(tmp_path, monkeypatch):
    folder = tiny_bundle(tmp_path)
    plain = open_predictor(folder, device="cpu")
    assert isinstance(plain.runtime, OnnxRuntime)

    class Elsewhere(OnnxRuntime):
        """A CPU in a GPU's place."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.provider = runtime.PROVIDERS["cuda"]

    monkeypatch.setattr(runtime, "OnnxRuntime", Elsewhere)
    bucketed = open_predictor(folder, device="cpu")
    assert isinstance(bucketed.runtime, PaddedBatchRuntime)
    assert bucketed.runtime.provider == "CUDAExecutionProvider"
    prepared = [plain.prepare(photo(seed)) for seed in range(5)]
    for one, other in zip(plain.predict(prepared), bucketed.predict(prepared), strict=True):
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-6)
