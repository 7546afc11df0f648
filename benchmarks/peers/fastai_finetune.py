"""fastai's `fine_tune` as in its documentation; run in its own virtual environment.

`ImageDataLoaders` with `Resize(460)` and `aug_transforms(size=224)`, `vision_learner`, `fine_tune`
with its default rates and schedule, `tta` with its defaults. The pretrained weights come from the
same file as the other competitors'; fastai would download them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from common import Sample, emit, option_parser, read_split, versions, write_answers
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


class EmitEpochs(Callback):
    """Emits the validation accuracy at the end of each epoch."""

    order = 99  # after the Recorder

    def after_epoch(self) -> None:
        """Emit the last recorded value, which is the metric."""
        if not hasattr(self, "gather_preds"):  # get_preds runs an epoch, too
            emit("epoch", accuracy=float(self.recorder.values[-1][-1]))


def trained(name: str, weights: str) -> Any:
    """A torchvision network with given weights, registered with fastai.

    fastai knows where to cut ResNets and how to normalise for them. It has no entry for
    MobileNetV2, which is cut before its classifier and normalised with ImageNet's statistics.
    """

    def arch(pretrained: bool = False) -> nn.Module:
        network: nn.Module = models.get_model(name)
        if pretrained:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return network

    registered = model_meta.get(models.get_model_builder(name))
    meta = registered or {"cut": -1, "split": default_split, "stats": imagenet_stats}
    model_meta[arch] = {key: value for key, value in meta.items() if key != "weights"}
    return arch


def main() -> None:
    """Train, emit every epoch, then write the answers for the validation photos."""
    parser = option_parser(__doc__)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    set_seed(options.seed)
    train, valid = read_split(options.split, options.fold)
    rows = [(*sample, part is valid) for part in (train, valid) for sample in part]
    dls = ImageDataLoaders.from_df(
        pd.DataFrame(rows, columns=["path", "label", "is_valid"]),
        path=options.data,
        valid_col="is_valid",
        item_tfms=Resize(PRESIZE),
        batch_tfms=aug_transforms(size=options.size),
        bs=options.batch,
        num_workers=options.workers,
        device=torch.device(options.device),
    )
    emit("begin", train=len(dls.train_ds), valid=len(dls.valid_ds), classes=len(dls.vocab))
    learn = vision_learner(
        dls,
        trained(options.arch, options.weights),
        pretrained=options.weights != "none",
        metrics=accuracy,
        cbs=EmitEpochs(),
        path=options.out.resolve(),
    )
    if options.channels_last:
        learn.to_channelslast(use_amp=False)
    if options.device == "cuda":
        learn.to_fp16()
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(options.epochs)
        learn.export("model.pkl")
        emit("done", versions=versions("fastai", "torch", "torchvision", "pillow"))
        plain, truth = learn.get_preds()
        emit("answered", views="plain", accuracy=float(accuracy(plain, truth)))
        write_predictions(options.out / "plain.csv", valid, plain, dls.vocab)
        if options.tta:
            averaged, _ = learn.tta()
            emit("answered", views="tta", accuracy=float(accuracy(averaged, truth)))
            write_predictions(options.out / "tta.csv", valid, averaged, dls.vocab)


def write_predictions(path: Any, valid: list[Sample], probabilities: Tensor, names: Any) -> None:
    """Write the most probable class of every validation photo."""
    best = probabilities.argmax(dim=1).tolist()
    write_answers(path, [(s.path, s.label, names[i]) for s, i in zip(valid, best, strict=True)])


if __name__ == "__main__":
    main()
