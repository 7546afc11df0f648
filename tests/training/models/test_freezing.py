"""Freezing: what trains, what stays in eval mode, and that earlier freezing has no effect."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

from serving.errors import OptionError
from tests.training.conftest import BLOCKS
from training.config.schema import Stage
from training.models import freezing
from training.models.classifier import create_classifier
from training.models.freezing import is_batchnorm, plan_freezing

SIZE = 32
MODES = [
    {"batchnorm": batchnorm, "frozen_batchnorm": frozen}
    for batchnorm in ("fixed", "train")
    for frozen in ("eval", "stats", "train")
]
CHOICES = [0, 1, 3, 99, ("6",), ("5.conv.*", "*.bias"), ("2.*",), ()]


def small(kind="concat_pool", arch="mobilenet_v2"):
    """A new classifier with always the same weights."""
    return copy.deepcopy(_built(kind, arch))


@functools.cache
def _built(kind, arch):
    torch.manual_seed(0)
    options = {"width_mult": 0.25, "inverted_residual_setting": BLOCKS}
    args = options if arch == "mobilenet_v2" else {}
    return create_classifier(arch, 3, arch_args=args, head={"kind": kind, "hidden": 16})


def state_of(classifier):
    """Everything that `freeze` sets."""
    modes = {name: m.training for name, m in classifier.named_modules()}
    grads = {name: p.requires_grad for name, p in classifier.named_parameters()}
    return modes, grads, classifier.freezing


def steps(classifier, count=2, lr=0.1):
    """Train for some steps; returns the keys of the state dict that changed."""
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    classifier.train()
    parameters = [p for _, group in classifier.trainable_groups() for p in group]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(count):
        classifier(torch.randn(4, 3, SIZE, SIZE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = classifier.state_dict()
    return {k for k in after if not torch.equal(after[k], before[k])}


def norms(classifier):
    """Names of the BatchNorms, relative to the body."""
    return {n for n, m in classifier.body.named_modules() if is_batchnorm(m)}


@pytest.mark.parametrize("arch", ["mobilenet_v2", "resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("kind", ["concat_pool", "deep", "linear"])
@pytest.mark.parametrize("unfreeze", [0, 1, 3, 99, ["*.bias"]])
def test_prefix_and_suffix_compute_the_classifier(arch, kind, unfreeze):
    classifier = small(kind, arch).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected_logits = classifier(images)
        classifier.freeze(unfreeze)
        inputs = classifier.prefix(images)
        copy = inputs.clone()
        assert torch.equal(classifier.suffix(inputs), expected_logits)
        assert torch.equal(inputs, copy)  # the suffix does not modify its inputs
        assert torch.equal(classifier.head(classifier.features(images)), expected_logits)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("unfreeze", [0, 2, 99, ("5", "2.*")])
def test_training_changes_exactly_what_is_unfrozen(unfreeze, modes):
    classifier = small()
    classifier.freeze(unfreeze, **modes)
    body, names = classifier.body, norms(classifier)
    if isinstance(unfreeze, int):
        first = [*classifier.groups, len(body)][max(len(classifier.groups) - unfreeze, 0)]
        children = {str(i) for i in range(first, len(body))}
    else:
        children = {"5", "2"}
    changed = {k.removeprefix("body.") for k in steps(classifier) if k.startswith("body.")}
    for key in body.state_dict():
        module, _, own = key.rpartition(".")
        live, affine = key.partition(".")[0] in children, own in ("weight", "bias")
        if module in names and live:
            expected = affine or modes["batchnorm"] == "train"
        elif module in names:
            expected = modes["frozen_batchnorm"] in (("train",) if affine else ("stats", "train"))
        else:
            expected = live
        assert (key in changed) == expected, key


@pytest.mark.parametrize("unfreeze", CHOICES)
def test_freezing_for_a_stage_changes_nothing_until_it_is_applied(unfreeze):
    planned, frozen = small(), small()
    for modes in MODES:
        stage = Stage(name="one", unfreeze=unfreeze, **modes)
        frozen.freeze(unfreeze, **modes)
        before = state_of(planned)
        decided = planned.freezing_for(stage)
        groups = planned.trainable_groups(decided)
        assert state_of(planned) == before
        assert decided == frozen.freezing
        shapes = [[(name, [p.shape for p in ps]) for name, ps in own]
                  for own in (groups, frozen.trainable_groups())]  # fmt: skip
        assert shapes[0] == shapes[1]
    planned.freeze_for(stage)
    assert state_of(planned) == state_of(frozen)


@pytest.mark.parametrize(("one", "other"), list(itertools.pairwise([*CHOICES, *CHOICES[::2]])))
def test_earlier_freezing_has_no_effect(one, other):
    fresh, used = small(), small()
    for modes in MODES:
        used.freeze(one, **modes)
        used.train(modes["batchnorm"] == "train")
        used.freeze(other, **modes)
        used.freeze(other, **modes)
        fresh.freeze(other, **modes)
        for mode in (True, False, True):
            used.train(mode)
            fresh.train(mode)
            assert state_of(used) == state_of(fresh)


def test_freezing_changes_no_weight_and_clears_gradients():
    classifier = small()
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    classifier(torch.randn(2, 3, SIZE, SIZE)).sum().backward()
    classifier.load_state_dict(before)
    for unfreeze, modes in itertools.product(CHOICES, MODES):
        classifier.freeze(unfreeze, **modes)
    after = classifier.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad or p.grad is None for p in classifier.parameters())


def test_dropout_and_stochastic_depth_are_off_in_frozen_layers():
    classifier = create_classifier("efficientnet_b0", 3, head={"hidden": 16})
    classifier.freeze(1, frozen_batchnorm="train")
    classifier.train()
    start = classifier.groups[-1]
    depths = [
        (index, m.training)
        for index, child in enumerate(classifier.body)
        for m in child.modules()
        if type(m).__name__ == "StochasticDepth"
    ]
    assert {training for index, training in depths if index < start} == {False}
    assert {training for index, training in depths if index >= start} == {True}
    assert all(m.training for m in classifier.head.modules())


def test_all_modules_are_in_eval_mode_for_evaluation():
    classifier = small()
    for unfreeze, modes in itertools.product(CHOICES, MODES):
        classifier.freeze(unfreeze, **modes)
        assert not any(m.training for m in classifier.eval().modules())


@pytest.mark.parametrize(
    ("unfreeze", "frozen_batchnorm", "prefix"),
    [
        (0, "eval", 13),
        (1, "eval", 9),
        (0, "stats", 0),
        (1, "train", 0),
        (("denseblock2",), "eval", 6),
        (("*.bias",), "eval", 1),
        (("conv0",), "eval", 0),
    ],
)
def test_the_prefix_has_the_frozen_layers_without_changing_state(
    unfreeze, frozen_batchnorm, prefix
):
    classifier = create_classifier("densenet121", 3, head={"hidden": 16})
    classifier.freeze(unfreeze, frozen_batchnorm=frozen_batchnorm)
    assert classifier.freezing.prefix == prefix
    assert (len(classifier.prefix) > 0) == (prefix > 0)


def test_without_batchnorm_the_prefix_does_not_depend_on_the_mode():
    classifier = small(arch="squeezenet1_1")
    for frozen in ("eval", "stats", "train"):
        classifier.freeze(0, frozen_batchnorm=frozen)
        assert classifier.freezing.prefix == len(classifier.body)
        assert [name for name, _ in classifier.trainable_groups()] == ["head"]


def test_without_modes_batchnorms_keep_their_statistics():
    body = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.ReLU())
    body.append(nn.BatchNorm2d(1))
    found = plan_freezing(body, (0, 2), 1)
    assert found == plan_freezing(body, (0, 2), 1, batchnorm="fixed", frozen_batchnorm="eval")
    assert found.trainable == {"2.weight", "2.bias", "4.weight", "4.bias"}
    assert found.eval_modules == {"0", "1", "4"}
    assert found.prefix == 2


def test_patterns_name_parameters_or_modules():
    body, groups = small(arch="resnet18").body, (0,)

    def trains(*patterns):
        return plan_freezing(body, groups, patterns).trainable

    parameters = {name for name, _ in body.named_parameters()}
    fourth = {name for name in parameters if name.startswith("layer4.")}
    assert trains("layer4") == trains("layer4.*") == trains("layer4*") == fourth
    assert trains("layer4.0", "layer4.1.*") == fourth
    assert trains("layer4.1.conv2.weight") == {"layer4.1.conv2.weight"}
    assert trains("*.bias") == {name for name in parameters if name.endswith(".bias")}
    assert trains("*") == parameters
    assert trains() == set()


def test_the_error_for_a_pattern_without_match_names_similar_ones():
    classifier = small(arch="resnet18")
    with pytest.raises(OptionError, match=r"'layer5\.\*' matches no parameter.*use 'layer[1-4]'"):
        classifier.freeze(["layer4", "layer5.*"])
    with pytest.raises(OptionError, match="use one of conv1, bn1, layer1, "):
        classifier.freeze(["denseblock9999"])
    before = state_of(small(arch="resnet18"))
    assert state_of(classifier) == before  # an error changes nothing


@pytest.mark.parametrize("unfreeze", CHOICES)
@pytest.mark.parametrize("frozen", ["eval", "train"])
def test_groups_contain_each_trainable_parameter_once(unfreeze, frozen):
    classifier = small()
    classifier.freeze(unfreeze, frozen_batchnorm=frozen)
    groups = classifier.trainable_groups()
    ids = [id(p) for _, parameters in groups for p in parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in classifier.parameters() if p.requires_grad}
    assert all(parameters for _, parameters in groups)
    assert groups[-1][0] == "head"
    order = [id(p) for p in classifier.parameters()]
    assert ids == sorted(ids, key=order.index)  # deepest first


def test_groups_are_named_after_their_layers():
    classifier = create_classifier("mobilenet_v2", 3, arch_args={"width_mult": 0.25})
    names = ["0..1", "2..3", "4..6", "7..13", "14..18", "head"]
    for n in range(6):
        classifier.freeze(n)
        assert [name for name, _ in classifier.trainable_groups()] == names[5 - n :]
    classifier = small(arch="resnet18")
    names = ["conv1..bn1", "layer1", "layer2", "layer3", "layer4", "head"]
    assert [name for name, _ in classifier.trainable_groups()] == names


def test_all_parameters_of_a_new_classifier_train():
    classifier = small()
    assert all(p.requires_grad for p in classifier.parameters())
    assert all(m.training for m in classifier.modules())
    assert len(classifier.prefix) == 0


def test_batchnorms_of_any_dimension_are_found():
    assert all(map(is_batchnorm, (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2))))
    assert not is_batchnorm(nn.LayerNorm(2))


def flat_body(*sizes):
    """A body of children with this number of convolutions each, and a BatchNorm behind each."""
    return nn.Sequential(
        *(
            nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(n)))
            if n
            else nn.ReLU()
            for n in sizes
        )
    )


@pytest.mark.parametrize(
    ("share", "start"),
    [(0.01, 4), (0.2, 4), (0.34, 4), (0.35, 4), (0.36, 3), (0.5, 3), (0.8, 1), (0.96, 0)],
)
def test_a_share_cuts_at_the_nearest_layer(share, start):
    body = flat_body(1, 4, 0, 3, 2)
    assert freezing.shares_from(body) == {0: 1.0, 1: 0.9, 3: 0.5, 4: 0.2}
    assert freezing.share_start(body, share) == start
    trained = freezing.plan_freezing(body, (0,), share).trainable
    assert {int(name.partition(".")[0]) for name in trained} == {0, 1, 3, 4} & set(range(start, 5))


def test_a_number_behind_patterns_is_for_bodies_without_such_layers():
    body = flat_body(1, 1, 1)
    for unfreeze, meant in ((["2.*", 1], ["2.*"]), (["9.*", 2], 2), (["2.*", "9.*", 0.3], 0.3)):
        by_list = freezing.plan_freezing(body, (0, 1, 2), unfreeze)
        assert by_list == freezing.plan_freezing(body, (0, 1, 2), meant)
        assert freezing.uses_fallback(body, unfreeze) == (meant != ["2.*"])
    with pytest.raises(OptionError, match=r"'9\.\*' matches no parameter .* 1 is the last layer"):
        freezing.plan_freezing(body, (0, 1, 2), ["9.*"])
