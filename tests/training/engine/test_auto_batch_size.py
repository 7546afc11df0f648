"""`batch_size = "auto"`: the largest batch that fits; the trials leave the run unchanged.

Most tests run the steps on the CPU and replace the memory of a GPU by a fake.
"""

import copy
import gc
import tomllib
from dataclasses import replace

import pytest
import torch

from serving.errors import WorkError
from training.config import load
from training.config.schema import AUTO
from training.data.dataset import load_dataset
from training.distributed.process_group import ProcessGroup
from training.engine import auto_batch_size, finetune, plan
from training.engine.auto_batch_size import SMALLEST, largest_fitting, resolve_batch_size
from training.run.folder import read_run
from training.utils.precision import Precision

CPU = Precision(torch.float32, torch.device("cpu"))
A_PHOTO = 1000  # bytes that a photo needs in a step
STAGES = """
[[stage]]
name = "head"
lr = 0.01
[[stage]]
name = "tail"
unfreeze = 1
lr = "find"
augment = { mixup = 0.2 }
[[stage]]
name = "all"
unfreeze = "all"
lr = 1e-3
[[stage]]
name = "large"
unfreeze = 2
lr = { low = 1e-4, high = 1e-3 }
image_size = 40
"""


class FakeMemory:
    """Fake memory for `photos` photos; more than `full` photos in a step raise OutOfMemoryError."""

    def __init__(self, photos, full=10**6):
        self.free, self.full, self.seen, self._peak = photos * A_PHOTO, full, [], 0

    def begin(self):
        self._peak = 0

    def peak(self):
        return self._peak

    def watch(self, module, inputs):
        photos = len(inputs[0])
        self.seen.append(photos)
        if photos > self.full:
            raise torch.OutOfMemoryError(f"{photos} photos")
        self._peak = max(self._peak, photos * A_PHOTO)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def opened(recipe, photos, lines, monkeypatch):
    """A recipe with batch_size = "auto", its classifier and stages, and `count` photos."""

    def made(*overrides, count=10_000):
        settings = load.read(recipe(STAGES), ["batch_size=auto", *overrides])
        found = load_dataset(str(photos))
        found = replace(found, train=(found.train * (count // len(found.train) + 1))[:count])
        classifier, _ = plan.build_classifier(settings, 3, lines.append)
        return settings, classifier, settings.stage, found

    monkeypatch.setattr(auto_batch_size, "_pixel_bytes", lambda *_: 0)
    return made


def watched(memory):
    return lambda size: memory.watch(None, [range(size)])


@pytest.mark.parametrize(
    ("available", "full", "most", "expected"),
    [
        (100, 10**6, 1024, 64),
        (64, 10**6, 1024, 64),
        (10**6, 100, 1024, 64),
        (10**6, 10**6, 1024, 1024),
        (10**6, 10**6, 1000, 512),
        (10**6, 10**6, 8, 8),
        (7, 10**6, 1024, 0),
        (10**6, 7, 1024, 0),
    ],
)
def test_the_batch_size_is_the_largest_power_of_two_that_fits(available, full, most, expected):
    memory = FakeMemory(10**6, full)
    found, peak = largest_fitting(watched(memory), memory, available * A_PHOTO, most)
    assert (found, peak) == (expected, expected * A_PHOTO)
    assert memory.seen == [8 * 2**n for n in range(len(memory.seen))]


def test_cuda_graphs_get_half_the_memory(opened, lines):
    found = []
    for compiled in ("false", "cuda_graphs"):
        settings, classifier, stages, photos = opened(f"compile={compiled}")
        memory = FakeMemory(36)
        classifier.head.register_forward_pre_hook(lambda *given, m=memory: m.watch(*given))
        settled = resolve_batch_size(
            settings, classifier, stages, photos, CPU, lines.append, memory=memory
        )
        found.append(settled.batch_size)
    assert found == [32, 16]


def test_other_errors_are_raised():
    def broken(size):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        largest_fitting(broken, FakeMemory(100), 10**9, 1024)


@pytest.mark.parametrize("full", [10**6, 20])
def test_trials_leave_classifier_and_random_state_unchanged(opened, lines, full):
    settings, classifier, stages, found = opened(
        "optimizer.accumulate=2", "optimizer.ema=0.9", "optimizer.kind=adam", "augment.erase=0.5"
    )
    memory = FakeMemory(36, full)
    # A bound method as hook would be deep-copied with the classifier, memory included.
    classifier.head.register_forward_pre_hook(lambda *given: memory.watch(*given))
    before = copy.deepcopy(classifier.state_dict())
    modes = [module.training for module in classifier.modules()]
    trains = [parameter.requires_grad for parameter in classifier.parameters()]
    random = torch.get_rng_state()
    settled = resolve_batch_size(
        settings, classifier, stages, found, CPU, lines.append, memory=memory
    )
    assert settled.batch_size == (32 if full > 32 else 16)  # 90 % of 36 photos
    assert settled == settings.model_copy(update={"batch_size": settled.batch_size})
    assert len(memory.seen) >= 3 * 4  # at least three trials of two steps with two batches each
    after = classifier.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert modes == [module.training for module in classifier.modules()]
    assert trains == [parameter.requires_grad for parameter in classifier.parameters()]
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert lines[-1].startswith(f"batch_size = 'auto': {settled.batch_size}; ")


def test_the_most_demanding_stages_are_tried(opened):
    settings, classifier, stages, _ = opened()
    tried = [s.name for s in auto_batch_size.most_demanding(classifier, settings, stages)]
    assert tried == ["all", "large"]
    again = [stages[0], stages[0].model_copy(update={"name": "twice"})]
    assert list(auto_batch_size.most_demanding(classifier, settings, again)) == again[:1]


@pytest.mark.parametrize(("count", "size", "expected"), [(50, 1, 32), (50, 3, 48), (3, 1, 8)])
def test_the_batch_is_not_larger_than_the_training_part(
    opened, lines, monkeypatch, count, size, expected
):
    monkeypatch.setattr(ProcessGroup, "broadcast_object", lambda process_group, choose: choose())
    opened = opened(count=count)
    settled = resolve_batch_size(
        *opened, CPU, lines.append, ProcessGroup(size=size), memory=FakeMemory(10**6)
    )
    assert settled.batch_size == expected


def test_no_fitting_batch_is_an_error_with_a_remedy(opened, lines):
    settings, classifier, stages, found = opened()
    memory = FakeMemory(10**6, full=SMALLEST - 1)
    classifier.head.register_forward_pre_hook(lambda *given: memory.watch(*given))
    with pytest.raises(WorkError, match=r"^batch_size = 'auto': stage all does not fit[^\n]+$"):
        resolve_batch_size(settings, classifier, stages, found, CPU, lines.append, memory=memory)


def test_a_number_is_unchanged_and_on_a_cpu_auto_is_32(opened, lines):
    settings, *rest = opened()
    numbered = settings.model_copy(update={"batch_size": 7})
    assert resolve_batch_size(numbered, *rest, CPU, lines.append, memory=FakeMemory(1)) is numbered
    assert lines == []
    assert resolve_batch_size(settings, *rest, CPU, lines.append).batch_size == 32
    assert lines == ["batch_size = 'auto': 32; on a CPU"]


def test_memory_is_reserved_for_pixels_on_the_gpu(opened, monkeypatch):
    monkeypatch.undo()
    settings, _, stages, found = opened(count=1000)
    train, valid = 1000 * 3 * 60**2, 9 * 3 * 40**2
    assert auto_batch_size._pixel_bytes(settings, stages, found, 10**9) == train + valid
    assert auto_batch_size._pixel_bytes(settings, stages, found, train) == valid
    assert auto_batch_size._pixel_bytes(settings, stages, found, 1000) == 0


def test_the_recipe_of_the_run_has_the_number(recipe, photos, tmp_path, lines):
    settings = load.read(recipe(), ["batch_size=auto", "stage.all.cycle_len=1", "tta.count=0"])
    assert settings.batch_size == AUTO
    folder = finetune.run(
        settings, str(photos), out=tmp_path / "run", device="cpu", cache_gb=0, log=lines.append
    )
    assert tomllib.loads((folder / "recipe.toml").read_text())["batch_size"] == 32
    assert read_run(folder)[0].batch_size == 32
    assert "batch_size = 'auto': 32; on a CPU" in lines


@pytest.mark.gpu
def test_the_trials_free_the_memory_of_the_gpu(opened, lines):
    # A ResNet: for MobileNetV2 cuDNN compiles kernels for every batch size, which takes seconds.
    settings, classifier, stages, found = opened("precision=bf16", "arch=resnet18", "arch_args={}")
    where = Precision(torch.bfloat16, torch.device("cuda"))
    torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda"))  # cuBLAS keeps some memory
    memory = auto_batch_size.CudaMemory(where.device)
    random, base = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.mem_get_info()[1])
    try:
        memory.free = 2**30
        settled = resolve_batch_size(
            settings, classifier, stages, found, where, lines.append, memory=memory
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 8 <= settled.batch_size <= 1024
    assert torch.equal(torch.cuda.get_rng_state(), random)
    gc.collect()
    assert torch.cuda.memory_allocated() == base
