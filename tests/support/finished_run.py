"""A finished run folder without training: an untrained network and the usual files."""

from __future__ import annotations

import torch

from serving.imaging.preprocess import Preprocess
from training.config.sections import DataConfig, HeadConfig
from training.data.dataset import SPLIT_FILE, load_dataset, write_split
from training.models.classifier import create_classifier
from training.run import checkpoint

RECIPE = """
name = "tiny"
arch = "mobilenet_v2"
seed = 3
arch_args = { width_mult = 0.25, inverted_residual_setting = [[1, 16, 1, 1], [6, 32, 1, 2]] }
preprocess = { size = 32, crop = 0.875 }
tta = { kind = "flip" }
[[stage]]
name = "head"
lr = 0.01
"""
METRICS = """stage,epoch,lr,train_loss,valid_loss,accuracy,seconds
head,1,0.01,1.5,1.25,0.5,2.0
head,2,0.01,0.75,0.5,0.875,2.5
tail,1,0.01,0.5,0.25,0.9375,70.0
"""


def finished(folder, photos, valid=0.5, name="tiny", **preprocessing):
    """Write a run folder on `photos` whose network has different outputs for different photos.

    `preprocessing` are fields of `Preprocess`.
    """
    folder.mkdir(parents=True)
    found = load_dataset(str(photos), config=DataConfig(valid=valid))
    torch.manual_seed(0)
    blocks = [[1, 16, 1, 1], [6, 32, 1, 2]]  # [expansion, channels, repeats, stride]
    arch_args = {"width_mult": 0.25, "inverted_residual_setting": blocks}
    head = HeadConfig(hidden=16)
    classifier = create_classifier(
        "mobilenet_v2", len(found.classes), arch_args=arch_args, head=head
    )
    with torch.no_grad():  # with initial statistics the outputs would hardly differ
        for module in classifier.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(0.05)
    info = checkpoint.CheckpointInfo(
        name=name,
        arch="mobilenet_v2",
        classes=found.classes,
        preprocess=Preprocess(size=32, **preprocessing),
        arch_args=arch_args,
        head=head.model_dump(),
        data={
            "source": str(photos),
            "root": str(photos),
            "fingerprint": found.fingerprint,
            "train": len(found.train),
            "valid": len(found.valid),
        },
        metrics={"accuracy": 0.5, "loss": 1.0, "stage": "tail", "epoch": 1},
        versions=checkpoint.versions(),
    )
    checkpoint.save(folder / checkpoint.BEST, classifier, info)
    write_split(found, folder / SPLIT_FILE)
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "metrics.csv").write_text(METRICS)
    return found
