import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from training.optim import lr_range_test


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def batches(n=60):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        labels = torch.randint(0, 3, (16,), generator=generator)
        yield torch.randn(16, 4, generator=generator) + 2 * labels[:, None], labels


def optimizer_of(model):
    made = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for group in made.param_groups:
        group["base_lr"] = 0.1
    return made


def stepped(model, optimizer):
    """One step, so that the optimizer has momentum buffers."""
    inputs, labels = next(batches())
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def test_autocast_uses_the_updated_weights_in_every_step():
    """A cached cast of the weights that outlived a step would use the initial weights."""

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    curves = []
    for context in (autocast, nullcontext):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32, bias=False), nn.Linear(32, 3, bias=False))
        curve = lr_range_test.range_test(
            model,
            optimizer_of(model),
            batches(200),
            lambda logits, labels: F.cross_entropy(logits.float(), labels),
            low=1e-3,
            high=1.0,
            steps=150,
            autocast=context,
        )
        curves.append(curve)
    assert min(curves[0].losses) < 0.8
    assert min(curves[0].losses) == pytest.approx(min(curves[1].losses), abs=0.1)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_bit_for_bit(fails, direction):
    model = network()
    optimizer = optimizer_of(model)
    stepped(model, optimizer)
    model[3].eval()  # the mode of each module is restored, too
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    modes = [module.training for module in model.modules()]

    def broken():
        yield from batches(15)
        raise RuntimeError("the loader failed")

    if fails:
        with pytest.raises(RuntimeError, match="loader"):
            lr_range_test.range_test(
                model, optimizer, broken(), F.cross_entropy, direction=direction
            )
    else:
        curve = lr_range_test.range_test(
            model, optimizer, batches(), F.cross_entropy, steps=50, direction=direction
        )
        assert len(curve.rates) > 20
    assert_same(model.state_dict(), weights)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, momentum in state["state"].items():
        assert_same(momentum, after["state"][key])
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_never_falls_is_an_error():
    with pytest.raises(ValueError, match="never falls"):
        lr_range_test.suggest([1e-5, 1e-4, 1e-3], [1.0, 1.1, 1.2])
    with pytest.raises(ValueError, match="within two steps"):
        lr_range_test.suggest([1e-5], [1.0])


def test_the_given_train_function_sets_the_modes():
    model = network()
    modes = []

    def train():
        model.train()
        model[1].eval()

    def loss_of(logits, labels):
        modes.append([module.training for module in model])
        return F.cross_entropy(logits, labels)

    lr_range_test.range_test(
        model, optimizer_of(model), batches(), loss_of, high=1.0, steps=15, train=train
    )
    assert modes == [[True, False, True, True, True]] * 15


def test_rates_grow_exponentially_from_low_to_high():
    model = network()
    curve = lr_range_test.range_test(
        model, optimizer_of(model), batches(), F.cross_entropy, low=1e-4, high=1e-2, steps=20
    )
    assert curve.rates[0] == pytest.approx(1e-4)
    assert curve.rates[-1] == pytest.approx(1e-2)
    ratios = {round(b / a, 9) for a, b in zip(curve.rates, curve.rates[1:], strict=False)}
    assert len(ratios) == 1


def test_the_range_test_stops_when_the_loss_diverges():
    model = network()
    curve = lr_range_test.range_test(
        model, optimizer_of(model), batches(1000), F.cross_entropy, high=1e6, steps=200
    )
    assert len(curve.rates) < 200


def test_the_valley_is_on_the_descent_and_at_most_a_tenth_of_the_minimum():
    rates = [10 ** (-5 + i / 10) for i in range(60)]
    losses = [2.0] * 20 + [2.0 - 0.05 * i for i in range(30)] + [0.5 + 0.5 * i for i in range(10)]
    curve = lr_range_test.suggest(rates, losses)
    assert curve.minimum == pytest.approx(rates[50])  # 0.5 twice; the lowest is found
    assert rates[20] <= curve.steepest <= rates[50]
    assert curve.valley <= curve.minimum / 10
    assert rates[20] <= curve.valley <= rates[50]
    late = lr_range_test.suggest(rates, losses[:40])  # still falling: the last rate is the minimum
    assert late.valley == rates[26]


def test_the_limit_applies_to_a_sudden_descent():
    rates = [10 ** (-5 + i / 10) for i in range(60)]
    losses = [1.5] * 45 + [2.0] * 5 + [0.5] * 10
    curve = lr_range_test.suggest(rates, losses)
    assert curve.minimum == rates[50]
    assert curve.valley == pytest.approx(rates[50] / 10)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_only_the_minimum_exceeds_a_tenth_of_it(direction):
    rates = [10 ** (-5 + i / 10) for i in range(60)]
    losses = [2.0] * 45 + [2.0 - 0.15 * i for i in range(11)] + [3.0] * 4
    if direction == "down":
        rates = rates[::-1]
    curve = lr_range_test.suggest(rates, losses, direction)
    assert curve.rates == tuple(sorted(rates))
    assert curve.pick("minimum") == curve.minimum
    assert curve.pick("minimum/10") == curve.tenth_of_minimum == pytest.approx(curve.minimum / 10)
    assert curve.pick("valley") == curve.valley <= curve.tenth_of_minimum
    assert curve.pick("steepest") == min(curve.steepest, curve.tenth_of_minimum)
    if direction == "up":
        assert curve.steepest > curve.tenth_of_minimum  # so the limit applies


def test_steepest_is_the_fastest_fall_and_not_noise_at_the_start():
    rates = [10 ** (-5 + i / 15) for i in range(90)]
    # 2 until 1e-2, falling fastest at 1e-2.5 by a logistic curve, then up
    losses = [2 / (1 + math.exp(4 * (math.log10(r) + 2.5))) + max(0, math.log10(r)) for r in rates]
    clean = lr_range_test.suggest(rates, losses)
    assert math.log10(clean.steepest) == pytest.approx(-2.5, abs=0.1)
    losses[0], losses[1], losses[2] = 3.0, 2.5, 2.0  # an outlier in the first batch
    assert lr_range_test.suggest(rates, losses).steepest == clean.steepest


def test_downwards_the_minimum_is_where_the_loss_starts_to_fall():
    rates = [10 ** (1 - i / 10) for i in range(60)]
    losses = [2.0 + 0.01 * i for i in range(20)] + [2.2 - 0.1 * i for i in range(20)] + [0.2] * 20
    curve = lr_range_test.suggest(rates, losses, "down")
    assert curve.losses == tuple(reversed(losses))
    assert curve.minimum == rates[20]
    assert curve.valley <= curve.minimum / 10 * (1 + 1e-9)
    assert rates[39] <= curve.steepest <= rates[20]


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([], "within two steps"),
        ([1.0], "within two steps"),
        ([1.0, 1.1, 1.2], "never falls"),
        ([1.0] * 5, "never falls"),
    ],
)
def test_a_curve_without_descent_is_an_error(losses, reason):
    with pytest.raises(ValueError, match=reason):
        lr_range_test.suggest([10.0 ** (i - 5) for i in range(len(losses))], losses)


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("direction", ["up", "down"])
def test_suggestions_of_short_curves_are_tested_rates(count, direction):
    rates = [10.0 ** (i / 2 - 5) for i in range(count)]
    if direction == "down":
        rates = rates[::-1]
    curve = lr_range_test.suggest(rates, [1 - i / count for i in range(count)], direction)
    for name in ("valley", "steepest", "minimum/10", "minimum"):
        assert curve.rates[0] <= curve.pick(name) <= curve.rates[-1]


def test_downwards_a_diverged_model_is_restored_and_the_test_continues():
    model = network()
    before = copy.deepcopy(model.state_dict())
    seen = []
    curve = lr_range_test.range_test(
        model,
        optimizer_of(model),
        batches(200),
        F.cross_entropy,
        low=1e-4,
        high=1e8,
        steps=150,
        direction="down",
        on_step=lambda: seen.append(1),
    )
    assert len(seen) == 150
    assert curve.rates[0] == pytest.approx(1e-4)
    assert curve.rates[-1] < 1e6  # the largest rates diverged and are not part of the curve
    assert curve.rates == tuple(sorted(curve.rates))
    assert all(math.isfinite(loss) for loss in curve.losses)
    assert min(curve.losses) < 0.5 * curve.losses[-1]
    assert_same(model.state_dict(), before)


def test_groups_keep_their_proportions_to_the_tested_rate():
    model = network()
    optimizer = optim.SGD(
        [
            {"params": model[0].parameters(), "base_lr": 0.02},
            {"params": model[4].parameters(), "base_lr": 0.2},
        ],
        lr=1.0,
    )
    seen = []

    def take_step(optimizer):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()

    curve = lr_range_test.range_test(
        model, optimizer, batches(), F.cross_entropy, steps=30, high=0.1, take_step=take_step
    )
    assert [head for _, head in seen] == pytest.approx(list(curve.rates))
    assert [deep for deep, _ in seen] == pytest.approx([rate / 10 for rate in curve.rates])
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
