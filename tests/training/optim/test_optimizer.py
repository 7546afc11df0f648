import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from serving.errors import OptionError
from training.config.schema import ALL, Spread, Stage
from training.config.sections import OptimizerConfig
from training.models.classifier import create_classifier
from training.optim.optimizer import (
    apply_schedule,
    build_optimizer,
    current_rates,
    group_rates,
    norms_and_biases,
    optimizer_step,
)
from training.optim.schedules import SchedulePoint


@pytest.fixture(scope="module")
def resnet34():
    with torch.device("meta"):
        return create_classifier("resnet34", 3, head={"hidden": 8})


def stage(**options):
    return Stage(name="tail", **options)


def named(classifier, stage, lr=1.0, **config):
    """The learning rate of each group of a new optimizer."""
    return current_rates(build_optimizer(classifier, OptimizerConfig(**config), stage, lr))


class Small(nn.Module):
    """A network with the methods of a Classifier that `build_optimizer` calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def trainable_groups(self):
        return [("stem", list(self.stem.parameters())), ("head", list(self.head.parameters()))]

    def forward(self, x):
        return self.head(self.frozen(self.stem(x)))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        labels = torch.randint(0, 3, (16,), generator=generator)
        yield torch.randn(16, 4, generator=generator) + labels[:, None], labels


def trained(config, count=8, lr=0.1, **stage_options):
    model = Small()
    optimizer = build_optimizer(model, config, stage(lr_divide=2, **stage_options), lr)
    for inputs, labels in batches(count):
        F.cross_entropy(model(inputs), labels).backward()
        optimizer_step(optimizer, config)
        assert all(p.grad is None for p in model.parameters())
    return model


def reference(make, count=8, before=lambda model: None, decay=1e-2, all_decay=False):
    """The same network trained by a torch optimizer with explicit parameter groups."""
    model = Small()
    groups = []
    for part, lr in ((model.stem, 0.05), (model.head, 0.1)):
        for p in part.parameters():
            decays = decay if p.ndim > 1 or all_decay else 0.0
            groups.append({"params": [p], "lr": lr, "weight_decay": decays})
    optimizer = make(groups)
    for inputs, labels in batches(count):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        before(model)
        optimizer.step()
    return model


def assert_same(a, b, **tolerance):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def sgd(**options):
    return lambda groups: optim.SGD(groups, **options)


# Fused as in `build_optimizer`: rounding differences in a gradient near 0 change Adam's whole step.
ADAMW = functools.partial(optim.AdamW, fused=True)
adam = functools.partial(functools.partial, optim.Adam, fused=True)
EQUAL = [
    ({"kind": "sgd"}, sgd(momentum=0.9, nesterov=True)),
    ({"kind": "sgd", "decay": "l2"}, sgd(momentum=0.9, nesterov=True)),
    ({"kind": "sgd", "nesterov": False}, sgd(momentum=0.9)),
    ({"kind": "sgd", "momentum": 0}, sgd()),
    ({"kind": "adam"}, adam(betas=(0.9, 0.999))),
    (
        {"kind": "adam", "momentum": 0.8},
        adam(betas=(0.8, 0.999)),
    ),
    ({"kind": "adamw"}, ADAMW),
    ({"kind": "adamw", "decay": "decoupled"}, ADAMW),
    ({"kind": "adam", "decay": "decoupled"}, ADAMW),
]


@pytest.mark.parametrize(("options", "make"), EQUAL)
def test_optimizers_equal_torch(options, make):
    config = OptimizerConfig(weight_decay=1e-2, **options)
    assert_same(trained(config), reference(make), rtol=1e-6, atol=1e-7)


def test_decay_norms_applies_decay_to_norms_and_biases():
    config = OptimizerConfig(weight_decay=1e-2, decay_norms=True)
    make = sgd(momentum=0.9, nesterov=True)
    assert_same(trained(config), reference(make, all_decay=True), rtol=1e-6, atol=1e-7)
    with pytest.raises(AssertionError):
        assert_same(trained(config), reference(make), rtol=1e-6, atol=1e-7)


def test_decoupled_decay_of_sgd_multiplies_weights_by_1_minus_lr_times_decay():
    config = OptimizerConfig(decay="decoupled", weight_decay=0.1)

    @torch.no_grad()
    def shrink(model):
        model.stem[0].weight.mul_(1 - 0.05 * 0.1)
        model.head.weight.mul_(1 - 0.1 * 0.1)

    expected = reference(sgd(momentum=0.9, nesterov=True), before=shrink, decay=0)
    assert_same(trained(config), expected, rtol=1e-6, atol=1e-7)


def test_decoupled_and_l2_decay_are_equal_only_without_momentum():
    for momentum, same in ((0.0, True), (0.9, False)):
        models = [
            trained(OptimizerConfig(decay=decay, weight_decay=0.1, momentum=momentum))
            for decay in ("l2", "decoupled")
        ]
        difference = (models[0].head.weight - models[1].head.weight).abs().max()
        assert (difference < 1e-6) == same


def test_l1_adds_the_sign_of_decaying_weights_to_their_gradients():
    config = OptimizerConfig(l1=0.01, weight_decay=0)

    def add(model):
        for weight in (model.stem[0].weight, model.head.weight):
            weight.grad += 0.01 * weight.detach().sign()

    expected = reference(sgd(momentum=0.9, nesterov=True), before=add, decay=0)
    assert_same(trained(config), expected, rtol=1e-6, atol=1e-7)


def test_clipping_bounds_the_norm_of_all_gradients_and_keeps_their_direction():
    config = OptimizerConfig(momentum=0, weight_decay=0, clip_norm=0.05)
    model = Small()
    optimizer = build_optimizer(model, config, stage(lr_divide=1), 1.0)
    for inputs, labels in batches(3):
        before = copy.deepcopy(model.state_dict())
        F.cross_entropy(model(inputs), labels).backward()
        moving = {n: p for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.sqrt(sum(p.grad.square().sum() for p in moving.values()))
        expected = {n: p.grad * min(0.05 / float(norm), 1) for n, p in moving.items()}
        assert norm > 0.05
        optimizer_step(optimizer, config)
        for name, parameter in moving.items():
            torch.testing.assert_close(
                before[name] - parameter.detach(), expected[name], rtol=1e-3, atol=1e-6
            )


def test_a_small_gradient_is_not_clipped():
    config = OptimizerConfig(clip_norm=1e6)
    assert_same(trained(config), trained(OptimizerConfig()), rtol=0, atol=0)


def test_parameters_are_exactly_the_trainable_ones():
    model = Small()
    optimizer = build_optimizer(model, OptimizerConfig(), stage(), 0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(parameters) == 6
    optimizer = build_optimizer(model, OptimizerConfig(decay_norms=True), stage(), 0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]


@pytest.mark.parametrize("arch", ["convnext_tiny", "swin_t", "vit_b_16"])
def test_norms_biases_and_layer_scales_do_not_decay(arch):
    with torch.device("meta"):
        classifier = create_classifier(arch, 3, head={"kind": "linear"})
    exempt = norms_and_biases(classifier)
    for module in classifier.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d) or "bias" in name:
                assert parameter in exempt, name
            elif isinstance(module, nn.Linear | nn.Conv2d):
                assert parameter not in exempt, name
            elif name == "layer_scale":
                assert parameter in exempt


def test_rates_are_divided_from_the_head_to_the_deepest_group(resnet34):
    resnet34.freeze(2)
    made = named(resnet34, stage(lr_divide=10))
    assert list(made) == ["layer3", "layer4", "head"]
    assert list(made.values()) == pytest.approx([0.01, 0.1, 1.0])
    resnet34.freeze(0)
    assert named(resnet34, stage(), 0.5) == {"head": 0.5}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (1, ["conv1..head"]),
        (2, ["conv1..layer4", "head"]),
        (3, ["conv1..layer2", "layer3..layer4", "head"]),  # fast.ai's three
        (4, ["conv1..layer1", "layer2..layer3", "layer4", "head"]),
    ],
)
def test_groups_are_merged_as_evenly_as_possible(resnet34, groups, names):
    resnet34.freeze(ALL)
    made = named(resnet34, stage(groups=groups, lr_divide=2))
    assert list(made) == names
    assert list(made.values()) == [0.5**i for i in reversed(range(groups))]
    parameters = build_optimizer(
        resnet34, OptimizerConfig(), stage(groups=groups), 1.0
    ).param_groups
    assert sum(len(g["params"]) for g in parameters) == len(list(resnet34.parameters()))


def test_a_list_needs_one_rate_per_group(resnet34):
    resnet34.freeze(ALL)
    made = named(resnet34, stage(groups=3), (1e-4, 1e-3, 1e-2))
    assert list(made.values()) == [1e-4, 1e-3, 1e-2]
    with pytest.raises(OptionError, match=r"stage tail: lr has 3 rates, but 6 groups .*, head"):
        named(resnet34, stage(), (1e-4, 1e-3, 1e-2))
    resnet34.freeze(1)
    with pytest.raises(OptionError, match=r"groups = 3, but only 2 train \(layer4, head\)"):
        named(resnet34, stage(groups=3), (1e-4, 1e-3, 1e-2))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_spread_is_geometric_from_low_to_high(count):
    made = group_rates(count, Spread(low=1e-6, high=1e-2), 3.0)
    expected = np.geomspace(1e-6, 1e-2, count) if count > 1 else [1e-2]
    assert made == pytest.approx(list(expected))
    assert made[-1] == 1e-2


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_apply_schedule_sets_rates_and_momentum(kind):
    optimizer = build_optimizer(Small(), OptimizerConfig(kind=kind), stage(lr_divide=4), 0.4)

    def momenta():
        return {g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.param_groups}

    apply_schedule(optimizer, SchedulePoint(0.5))
    assert current_rates(optimizer) == {"stem": 0.05, "head": 0.2}
    assert momenta() == {0.9}
    apply_schedule(optimizer, SchedulePoint(0.25, 0.85))
    assert current_rates(optimizer) == {"stem": 0.025, "head": 0.1}
    assert momenta() == {0.85}
    assert all(g["betas"][1] == 0.999 for g in optimizer.param_groups if "betas" in g)


def test_a_state_loaded_into_a_new_optimizer_continues_exactly():
    config = OptimizerConfig(decay="decoupled", l1=1e-3, clip_norm=1.0)
    whole = trained(config, 6)
    model = Small()
    optimizer = build_optimizer(model, config, stage(lr_divide=2), 0.1)
    for number, (inputs, labels) in enumerate(batches(6)):
        if number == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(model, config, stage(lr_divide=2), 7.0)
            optimizer.load_state_dict(state)
        F.cross_entropy(model(inputs), labels).backward()
        optimizer_step(optimizer, config)
    assert_same(model, whole, rtol=0, atol=0)
