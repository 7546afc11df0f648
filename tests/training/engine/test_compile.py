"""`compile` by torch.compile and CUDA graphs: same outputs, same weights, one-line errors."""

import copy
import shutil

import pytest
import torch
from torch import nn

from serving.errors import OptionError
from training.config import load
from training.engine import finetune, plan
from training.engine.compile import (
    FullBatchAccelerator,
    accelerated_suffix,
    captured,
    check,
    compiled,
)
from training.run import checkpoint

CPU = torch.device("cpu")
STAGES = """
[[stage]]
name = "head"
lr = 0.01
[[stage]]
name = "all"
unfreeze = "all"
lr = 0.01
cycle_len = 2
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
ignore_warnings = pytest.mark.filterwarnings("ignore")  # torch.compile's own


@pytest.fixture
def lines():
    return []


def run(path, photos, out, lines, *overrides, device="cpu"):
    settings = load.read(path, overrides)
    return finetune.run(settings, str(photos), out=out, device=device, log=lines.append)


@pytest.fixture
def fake_compile(monkeypatch):
    """Replaces torch.compile; lists its options and the batch sizes of the calls."""
    seen = []

    def compile(function, **options):
        entry = {"options": options, "sizes": []}
        seen.append(entry)

        def run(inputs):
            entry["sizes"].append(len(inputs))
            return function(inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return seen


def test_only_batches_of_the_first_size_run_compiled(fake_compile):
    network = nn.Sequential(nn.Linear(4, 2))
    fast = FullBatchAccelerator(network, compiled)
    for size in (8, 8, 3, 8, 16):
        inputs = torch.randn(size, 4)
        assert torch.equal(fast(inputs), network(inputs))
    assert [entry["sizes"] for entry in fake_compile] == [[8, 8, 8]]
    assert fake_compile[0]["options"] == {"dynamic": False}
    assert [*fast.parameters()] == [*network.parameters()]


@pytest.fixture
def fake_capture(monkeypatch):
    """Replaces make_graphed_callables: runs its warm-up passes, lists the sizes of replays."""
    seen = {"replayed": [], "random": torch.zeros(1)}

    def record(module, samples, **_):
        assert not torch.is_autocast_cache_enabled()
        for _ in range(3):
            module(*samples)
        seen["random"] = seen["random"] + 1
        forward = module.forward

        def replay(inputs):
            seen["replayed"].append(len(inputs))
            return forward(inputs)

        module.forward = replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: seen["random"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, _: seen.update(random=s))
    return seen


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_capture_restores_statistics_and_random_state(fake_capture):
    network, plain = (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)
    )
    plain.load_state_dict(network.state_dict())
    fast = FullBatchAccelerator(network, captured)
    for size in (8, 8, 3):
        inputs = torch.randn(size, 4)
        assert torch.equal(fast(inputs), plain(inputs))
    assert fake_capture == {"replayed": [8, 8], "random": torch.zeros(1)}
    for name, value in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    assert [*fast.parameters()] == [*network.parameters()]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_failed_capture_is_an_error_with_a_remedy(fake_capture):
    class Odd(nn.Module):
        def forward(self, _):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(OptionError, match=r"^compile: [^\n]*is capturing; use compile = false$"):
        FullBatchAccelerator(nn.Sequential(Odd(), nn.Linear(4, 2)), captured)(torch.ones(8, 4))
    head = FullBatchAccelerator(nn.Sequential(nn.Linear(4, 2)), captured)
    assert head(torch.ones(8, 4)).shape == (8, 2)
    assert not fake_capture["replayed"]


def test_a_stage_is_compiled_once_and_the_classifier_does_not_change(fake_compile, recipe, lines):
    settings = load.read(recipe(STAGES), ["compile=true"])
    classifier, _ = plan.build_classifier(settings, 3, lines.append)
    keys, (head, body) = list(classifier.state_dict()), settings.stage
    images = torch.randn(4, 3, 32, 32)
    first = accelerated_suffix(classifier, head, settings)
    first(images)
    assert accelerated_suffix(classifier, head, settings) is first
    second = accelerated_suffix(classifier, body, settings)
    assert second is not first
    second(images)
    second(images)
    assert [entry["sizes"] for entry in fake_compile] == [[4], [4, 4]]
    assert list(classifier.state_dict()) == keys
    off = settings.model_copy(update={"compile": False})
    assert isinstance(accelerated_suffix(classifier, body, off), nn.Sequential)
    assert len(fake_compile) == 2


def test_a_failed_compilation_is_an_error_with_a_remedy(monkeypatch):
    def broken(*_, **__):
        def run(inputs):
            raise torch._dynamo.exc.TorchDynamoException("an odd layer\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(OptionError, match=r"^compile: [^\n]*an odd layer; use compile = false$"):
        FullBatchAccelerator(nn.Sequential(nn.Linear(4, 2)), compiled)(torch.ones(8, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compile=cuda_graphs"], r"compile = 'cuda_graphs' needs a GPU; use compile ="),
        (["compile=true"], r"compile: there is no C\+\+ compiler here; install g\+\+, or use comp"),
    ],
)
def test_a_missing_gpu_or_compiler_is_an_error_before_the_work_begins(
    recipe, photos, tmp_path, lines, monkeypatch, options, message
):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(OptionError, match=f"^{message}"):
        run(recipe(STAGES), photos, tmp_path / "run", lines, *options)
    assert not (tmp_path / "run").exists()


def test_a_broken_compiler_is_an_error_before_the_work_begins(recipe, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("ld: cannot find -lgomp\ncollect2: error")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("training.engine.compile._has_compiler", lambda: True)
    settings = load.read(recipe(STAGES), ["compile=true"])
    with pytest.raises(OptionError, match=r"^compile: [^\n]*-lgomp; use compile = false$"):
        check(settings, CPU)
    graphs = load.read(recipe(STAGES), ["compile=cuda_graphs", "optimizer.accumulate=2"])
    with pytest.raises(OptionError, match="accumulate = 2"):
        check(graphs, torch.device("cuda"))
    graphs = load.read(recipe(STAGES), ["compile=cuda_graphs"])
    check(graphs, torch.device("cuda"))
    with pytest.raises(OptionError, match="a single process"):
        check(graphs, torch.device("cuda"), 2)
    check(load.read(recipe(STAGES)), CPU)


@pytest.mark.slow
@needs_compiler
@ignore_warnings
def test_compiled_gradients_equal_those_of_the_network(recipe, lines):
    """They are compared in float32, up to rounding, for full and smaller batches."""
    settings = load.read(recipe(STAGES), ["compile=true", "head.dropout=0"])
    classifier, _ = plan.build_classifier(settings, 3, lines.append)
    stage = settings.stage[1]
    classifier.freeze(stage.unfreeze, batchnorm=stage.batchnorm)
    accelerated = accelerated_suffix(classifier, stage, settings)
    for size in (8, 8, 5):
        images, found = torch.randn(size, 3, 32, 32), []
        for network in (classifier.suffix, accelerated):
            classifier.train()
            classifier.zero_grad()
            network(images).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in classifier.named_parameters()})
        whole = max(gradient.abs().max() for gradient in found[0].values())
        for name, gradient in found[0].items():  # before a BatchNorm it is 0 up to rounding
            near = 1e-3 * gradient.abs().max() + 1e-5 * whole
            assert (gradient - found[1][name]).abs().max() <= near, name


@pytest.mark.slow
@needs_compiler
@ignore_warnings
def test_a_compiled_run_writes_the_usual_checkpoint(recipe, photos, tmp_path, lines):
    folder = run(recipe(STAGES), photos, tmp_path / "run", lines, "compile=true")
    trained, _ = checkpoint.load(folder / "stages" / "all.safetensors")
    plain, _ = plan.build_classifier(load.read(recipe(STAGES)), 3, lines.append)
    assert trained.state_dict().keys() == plain.state_dict().keys()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.gpu
@ignore_warnings
@pytest.mark.parametrize("compiled", ["true", "cuda_graphs"])
def test_a_compiled_run_on_a_gpu_has_the_same_losses(recipe, photos, tmp_path, lines, compiled):
    options = ["arch=resnet18", "arch_args={}", "head.dropout=0", "precision=fp32"]
    losses = []
    for number, value in enumerate(("false", compiled)):
        folder = run(
            recipe(STAGES), photos, tmp_path / str(number), lines,
            f"compile={value}", *options, device="cuda",
        )  # fmt: skip
        rows = (folder / "metrics.csv").read_text().splitlines()[1:]
        losses.append([float(row.split(",")[3]) for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.gpu
def test_replayed_gradients_equal_those_of_the_network():
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)]
    network = nn.Sequential(*layers).to(cuda).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    fast = FullBatchAccelerator(network, captured)
    ours, theirs = (torch.optim.SGD(n.parameters(), 0.01) for n in (network, plain))
    for size in (8, 8, 3, 8):
        images = torch.randn(size, 3, 8, 8, device=cuda).contiguous(
            memory_format=torch.channels_last
        )
        for run, optimizer in ((fast, ours), (plain, theirs)):
            run(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for name, value in plain.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, rtol=1e-3, atol=1e-5), name
