import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from training.optim.ema import Ema


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model


def steps(model, count, on_step=lambda: None):
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        labels = torch.randint(0, 3, (8,), generator=generator)
        inputs = torch.randn(8, 4, generator=generator) + labels[:, None]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        on_step()


def floats(model):
    return {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_averages_are_the_exponential_mean_of_the_weights(decay):
    model = network()
    ema = Ema(model, decay)
    expected = floats(model)

    def check():
        d = min(decay, (1 + ema.updates) / (10 + ema.updates))
        ema.update()
        for name, weight in floats(model).items():
            expected[name] = d * expected[name] + (1 - d) * weight
            torch.testing.assert_close(ema.averages[name], expected[name])

    steps(model, 20, check)
    assert ema.updates == 20
    assert not torch.equal(model[1].running_mean, torch.zeros(8))
    if decay:
        assert not torch.equal(ema.averages["1.running_mean"], model[1].running_mean)


def test_averages_of_frozen_weights_stay_bit_equal():
    model = network()
    frozen = copy.deepcopy(model[0].state_dict())
    ema = Ema(model, 0.99)
    steps(model, 50, ema.update)
    assert torch.equal(ema.averages["0.weight"], frozen["weight"])
    assert torch.equal(ema.averages["0.bias"], frozen["bias"])
    assert not torch.equal(ema.averages["3.weight"], model[3].weight)


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_sets_the_averages_and_restores_the_weights_bit_for_bit(fails):
    model = network()
    ema = Ema(model, 0.9)
    steps(model, 5, ema.update)
    before = copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]

    def use_averages():
        with ema.swapped():
            for name, value in floats(model).items():
                assert torch.equal(value, ema.averages[name])
            assert int(model[1].num_batches_tracked) == 5
            if fails:
                model[3].weight.data.zero_()
                raise RuntimeError("the disk is full")

    if fails:
        with pytest.raises(RuntimeError, match="disk"):
            use_averages()
    else:
        use_averages()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parameters == [id(p) for p in model.parameters()]


def test_swapped_does_not_change_the_training():
    models = []
    for swaps in (False, True):
        model = network()
        ema = Ema(model, 0.9)

        def each(ema=ema, swaps=swaps):
            ema.update()
            if swaps:
                with ema.swapped():
                    pass

        steps(model, 10, each)
        models.append((model.state_dict(), ema.averages))
    for a, b in zip(*models, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_state_continues_exactly():
    whole = network()
    ema = Ema(whole, 0.9)
    steps(whole, 3, ema.update)
    state = copy.deepcopy(ema.state())
    weights = copy.deepcopy(whole.state_dict())
    steps(whole, 4, ema.update)

    resumed = network()
    again = Ema(resumed, 0.9)
    again.load(state)
    resumed.load_state_dict(weights)
    steps(resumed, 4, again.update)
    assert again.updates == ema.updates == 7
    assert all(torch.equal(again.averages[name], value) for name, value in ema.averages.items())


def test_the_state_of_another_module_is_an_error():
    with pytest.raises(KeyError):
        Ema(network(), 0.9).load(Ema(nn.Linear(2, 2), 0.9).state())


def test_equal_weights_compares_weights_and_averages():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = Ema(module, 0.9)
    assert ema.equal_weights(["0.weight", "1.weight"])
    with torch.no_grad():
        module[1].weight.add_(1)
    ema.update()
    assert ema.equal_weights(["0.weight"])
    assert not ema.equal_weights(["0.weight", "1.weight"])
