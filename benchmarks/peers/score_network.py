"""The trained network for timm and for transformers: a run's own in two other shapes.

    OUT/timm.pth      weights of timm's mobilenetv2_100
    OUT/hf/           a folder as `save_pretrained` writes it: MobileNetV2ForImageClassification
    OUT/network.json  labels, preprocessing

All have the same layers in the same order, so weights go over one by one; that all give the same
logits is checked here. Only a mobilenet_v2 with a linear head fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
)

from training.run import checkpoint

TOLERANCE = 1e-3


def main() -> None:
    """Write both, or say why not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    classifier, info = checkpoint.load(chosen.run)
    if info.arch != "mobilenet_v2" or info.arch_args or info.head.get("kind") != "linear":
        sys.exit(f"{chosen.run} is no mobilenet_v2 with a linear head: timm has no such network")
    chosen.out.mkdir(parents=True, exist_ok=True)
    classes = len(info.classes)
    names = dict(enumerate(info.classes))
    config = MobileNetV2Config(
        num_labels=classes,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        tf_padding=False,
        layer_norm_eps=1e-5,
        image_size=info.preprocess.size,
    )
    theirs = timm.create_model("mobilenetv2_100", num_classes=classes).eval()
    wrapped = MobileNetV2ForImageClassification(config).eval()
    pixels = torch.randn(4, 3, info.preprocess.size, info.preprocess.size)
    with torch.inference_mode():
        expected: Tensor = classifier(pixels)
        for network in (theirs, wrapped):
            carry_over(classifier, network)
        for name, found in (("timm", theirs(pixels)), ("transformers", wrapped(pixels).logits)):
            off = float((found - expected).abs().max())
            if off > TOLERANCE:
                sys.exit(f"{name} computes something else: logits are off by {off:.2g}")
    torch.save(theirs.state_dict(), chosen.out / "timm.pth")
    wrapped.save_pretrained(chosen.out / "hf")
    size = info.preprocess.size
    MobileNetV2ImageProcessor(
        size={"shortest_edge": round(size / info.preprocess.crop)},
        crop_size={"height": size, "width": size},
        image_mean=list(info.preprocess.mean),
        image_std=list(info.preprocess.std),
    ).save_pretrained(chosen.out / "hf")
    about = {"labels": info.classes, "run": str(chosen.run), **asdict(info.preprocess)}
    (chosen.out / "network.json").write_text(json.dumps(about, indent=2) + "\n")


def carry_over(ours: nn.Module, other: nn.Module) -> None:
    """Copy every weight and statistic in order; the shapes have to agree."""
    mine, keys = list(ours.state_dict().values()), list(other.state_dict())
    if len(mine) != len(keys):
        sys.exit(f"{len(mine)} tensors here, {len(keys)} there")
    other.load_state_dict(dict(zip(keys, mine, strict=True)))


if __name__ == "__main__":
    main()
