"""What trains, compiled: the same function, the same weights, and one line where it can't be."""

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
quietly = pytest.mark.filterwarnings("ignore")  # torch's own, of its own parts


@pytest.fixture
def lines():
    return []


def run(path, photos, out, lines, *overrides, device="cpu"):
    settings = load.read(path, overrides)
    return finetune.run(settings, str(photos), out=out, device=device, log=lines.append)


@pytest.fixture
def counted(monkeypatch):
    """torch.compile without the compiling: says what is compiled, and how often it is run."""
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


def test_whole_batches_run_compiled_and_the_odd_one_as_ever(counted):
    network = nn.Sequential(nn.Linear(4, 2))
    fast = FullBatchAccelerator(network, compiled)
    for size in (8, 8, 3, 8, 16):
        inputs = torch.randn(size, 4)
        assert torch.equal(fast(inputs), network(inputs))
    assert [entry["sizes"] for entry in counted] == [[8, 8, 8]]
    assert counted[0]["options"] == {"dynamic": False}
    assert [*fast.parameters()] == [*network.parameters()]


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda's recording without a GPU: warms up as it does, then says what was replayed."""
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
def test_a_recording_leaves_statistics_and_random_state_as_they_are(recorder):
    network, plain = (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)
    )
    plain.load_state_dict(network.state_dict())
    fast = FullBatchAccelerator(network, captured)
    for size in (8, 8, 3):
        inputs = torch.randn(size, 4)
        assert torch.equal(fast(inputs), plain(inputs))
    assert recorder == {"replayed": [8, 8], "random": torch.zeros(1)}
    for name, value in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    assert [*fast.parameters()] == [*network.parameters()]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_what_cannot_be_recorded_says_what_to_do(recorder):
    class Odd(nn.Module):
        def forward(self, _):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(OptionError, match=r"^compile: [^\n]*is capturing; use compile = false$"):
        FullBatchAccelerator(nn.Sequential(Odd(), nn.Linear(4, 2)), captured)(torch.ones(8, 4))
    head = FullBatchAccelerator(nn.Sequential(nn.Linear(4, 2)), captured)
    assert head(torch.ones(8, 4)).shape == (8, 2)
    assert not recorder["replayed"]


def test_a_stage_is_compiled_once_and_the_classifier_stays_as_it_was(counted, recipe, lines):
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
    assert [entry["sizes"] for entry in counted] == [[4], [4, 4]]
    assert list(classifier.state_dict()) == keys
    off = settings.model_copy(update={"compile": False})
    assert isinstance(accelerated_suffix(classifier, body, off), nn.Sequential)
    assert len(counted) == 2


def test_a_network_that_cannot_be_compiled_says_what_to_do(monkeypatch):
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
def test_what_is_not_there_is_known_before_the_work(
    recipe, photos, tmp_path, lines, monkeypatch, options, message
):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(OptionError, match=f"^{message}"):
        run(recipe(STAGES), photos, tmp_path / "run", lines, *options)
    assert not (tmp_path / "run").exists()


def test_a_tool_that_does_not_work_is_known_before_the_work(recipe, monkeypatch):
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
@quietly
def test_compiled_gradients_are_those_of_the_network(recipe, lines):
    """Of whole batches and odd ones, in float32: to rounding."""
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
        for name, gradient in found[0].items():  # 0 but for rounding, before a BatchNorm
            near = 1e-3 * gradient.abs().max() + 1e-5 * whole
            assert (gradient - found[1][name]).abs().max() <= near, name


@pytest.mark.slow
@needs_compiler
@quietly
def test_a_compiled_run_ends_as_any_other(recipe, photos, tmp_path, lines):
    folder = run(recipe(STAGES), photos, tmp_path / "run", lines, "compile=true")
    trained, _ = checkpoint.load(folder / "stages" / "all.safetensors")
    plain, _ = plan.build_classifier(load.read(recipe(STAGES)), 3, lines.append)
    assert trained.state_dict().keys() == plain.state_dict().keys()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.gpu
@quietly
@pytest.mark.parametrize("compiled", ["true", "cuda_graphs"])
def test_a_gpu_learns_compiled(recipe, photos, tmp_path, lines, compiled):
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
def test_replayed_gradients_are_those_of_the_network():
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
