"""fastai's `fine_tune` as its documentation has it; run in an environment of its own.

`ImageDataLoaders` with `Resize(460)` and `aug_transforms(size=224)`, `vision_learner`, `fine_tune`
with its own rates and schedule, and `tta` with its own defaults. The trained weights come from the
same file as the others': fastai would download them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from common import Sample, options, read_split, tell, versions, write_answers
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    Resize,
    accuracy,
    aug_transforms,
    default_split,
    imagenet_stats,
    model_meta,
    set_seed,
    vision_learner,
)
from torch import Tensor, nn
from torchvision import models

PRESIZE = 460


class TellEpochs(Callback):
    """Accuracy at the end of each epoch, validation included."""

    order = 99  # behind the Recorder

    def after_epoch(self) -> None:
        """Tell the last recorded value: the metric."""
        if not hasattr(self, "gather_preds"):  # answers are given in an epoch, too
            tell("epoch", accuracy=float(self.recorder.values[-1][-1]))


def trained(name: str, weights: str) -> Any:
    """A network of torchvision that fastai takes for one of those it knows.

    It knows where to cut the ResNets and how to normalise for them. Of MobileNetV2 it knows
    neither, so it is told: without the classifier, with ImageNet's mean and deviation.
    """

    def arch(pretrained: bool = False) -> nn.Module:
        network: nn.Module = models.get_model(name)
        if pretrained:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return network

    known = model_meta.get(models.get_model_builder(name))
    meta = known or {"cut": -1, "split": default_split, "stats": imagenet_stats}
    model_meta[arch] = {key: value for key, value in meta.items() if key != "weights"}
    return arch


def main() -> None:
    """Train, tell of every epoch, then answer for the validation photos."""
    parser = options(__doc__)
    parser.add_argument("--channels-last", action="store_true")
    chosen = parser.parse_args()
    set_seed(chosen.seed)
    train, valid = read_split(chosen.split, chosen.fold)
    rows = [(*sample, part is valid) for part in (train, valid) for sample in part]
    dls = ImageDataLoaders.from_df(
        pd.DataFrame(rows, columns=["path", "label", "is_valid"]),
        path=chosen.data,
        valid_col="is_valid",
        item_tfms=Resize(PRESIZE),
        batch_tfms=aug_transforms(size=chosen.size),
        bs=chosen.batch,
        num_workers=chosen.workers,
        device=torch.device(chosen.device),
    )
    tell("begin", train=len(dls.train_ds), valid=len(dls.valid_ds), classes=len(dls.vocab))
    learn = vision_learner(
        dls,
        trained(chosen.arch, chosen.weights),
        pretrained=chosen.weights != "none",
        metrics=accuracy,
        cbs=TellEpochs(),
        path=chosen.out.resolve(),
    )
    if chosen.channels_last:
        learn.to_channelslast(use_amp=False)
    if chosen.device == "cuda":
        learn.to_fp16()
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(chosen.epochs)
        learn.export("model.pkl")
        tell("done", versions=versions("fastai", "torch", "torchvision", "pillow"))
        plain, truth = learn.get_preds()
        tell("answered", views="plain", accuracy=float(accuracy(plain, truth)))
        answer(chosen.out / "plain.csv", valid, plain, dls.vocab)
        if chosen.tta:
            averaged, _ = learn.tta()
            tell("answered", views="tta", accuracy=float(accuracy(averaged, truth)))
            answer(chosen.out / "tta.csv", valid, averaged, dls.vocab)


def answer(path: Any, valid: list[Sample], probabilities: Tensor, names: Any) -> None:
    """The most probable class of every validation photo."""
    best = probabilities.argmax(dim=1).tolist()
    write_answers(path, [(s.path, s.label, names[i]) for s, i in zip(valid, best, strict=True)])


if __name__ == "__main__":
    main()
