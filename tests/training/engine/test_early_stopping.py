import pytest
import torch

from training.engine.early_stopping import EarlyStopping, is_overfitting
from training.models.classifier import create_classifier
from training.optim.ema import Ema
from training.run.resume_state import ResumeTensors


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return create_classifier("mobilenet_v2", 2, arch_args={"width_mult": 0.25})


def change(classifier, ema=None):
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1)
    if ema:
        ema.update()


def copies(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [([], 1, False), ([1.0], 1, False), ([1.0, 2.0], 1, True), ([1.0, 1.0], 1, True),
     ([1.0, 2.0, 0.5], 2, False), ([1.0, 2.0, 3.0], 2, True), ([1.0, 2.0, 3.0], 0, False)],
)  # fmt: skip
def test_is_overfitting_after_patience_epochs_without_a_lower_loss(losses, patience, over):
    assert is_overfitting(losses, patience) is over


def test_weights_and_averages_of_the_lowest_loss_are_restored(classifier):
    ema = Ema(classifier, 0.9)
    stopping = EarlyStopping(2, classifier, ema, ResumeTensors())
    losses, states = [], []
    for loss in (3.0, 1.0, 1.0, 2.0):
        change(classifier, ema)
        losses.append(loss)
        stopping.update(losses)
        states.append((copies(classifier.state_dict()), copies(ema.state())))
    assert stopping.should_stop(losses)
    stopping.restore()
    assert equal(classifier.state_dict(), states[1][0])
    assert equal(ema.state(), states[1][1])
    assert (stopping.kept, stopping.kept_ema) == ({}, {})


def test_copies_of_a_resumed_run_are_restored(classifier):
    kept = copies(classifier.state_dict())
    change(classifier)
    stopping = EarlyStopping(1, classifier, None, ResumeTensors(kept=kept))
    stopping.update([1.0, 2.0])
    stopping.restore()
    assert equal(classifier.state_dict(), kept)


def test_without_patience_nothing_is_kept_or_restored(classifier):
    stopping = EarlyStopping(0, classifier, None, ResumeTensors())
    stopping.update([1.0])
    assert stopping.kept == {}
    change(classifier)
    before = copies(classifier.state_dict())
    stopping.restore()
    assert equal(classifier.state_dict(), before)
    assert not stopping.should_stop([1.0, 2.0, 3.0])
