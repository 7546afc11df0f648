"""Convert a run's network for timm and transformers, and check that the logits are the same.

    OUT/timm.pth      weights of timm's mobilenetv2_100
    OUT/hf/           MobileNetV2ForImageClassification, written by `save_pretrained`
    OUT/network.json  labels, preprocessing

All three have the same layers in the same order, so the tensors are copied one by one. Only a
mobilenet_v2 with a linear head can be converted.
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
    """Write both networks, or exit with the reason."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    classifier, info = checkpoint.load(options.run)
    if info.arch != "mobilenet_v2" or info.arch_args or info.head.get("kind") != "linear":
        sys.exit(f"{options.run} is not a mobilenet_v2 with a linear head: timm lacks it")
    options.out.mkdir(parents=True, exist_ok=True)
    classes = len(info.classes)
    id2label = dict(enumerate(info.classes))
    config = MobileNetV2Config(
        num_labels=classes,
        id2label=id2label,
        label2id={name: number for number, name in id2label.items()},
        tf_padding=False,
        layer_norm_eps=1e-5,
        image_size=info.preprocess.size,
    )
    timm_network = timm.create_model("mobilenetv2_100", num_classes=classes).eval()
    hf_network = MobileNetV2ForImageClassification(config).eval()
    pixels = torch.randn(4, 3, info.preprocess.size, info.preprocess.size)
    with torch.inference_mode():
        expected: Tensor = classifier(pixels)
        for network in (timm_network, hf_network):
            copy_weights(classifier, network)
        outputs = {"timm": timm_network(pixels), "transformers": hf_network(pixels).logits}
        for name, logits in outputs.items():
            difference = float((logits - expected).abs().max())
            if difference > TOLERANCE:
                sys.exit(f"{name}: the logits differ from the run's by {difference:.2g}")
    torch.save(timm_network.state_dict(), options.out / "timm.pth")
    hf_network.save_pretrained(options.out / "hf")
    size = info.preprocess.size
    MobileNetV2ImageProcessor(
        size={"shortest_edge": round(size / info.preprocess.crop)},
        crop_size={"height": size, "width": size},
        image_mean=list(info.preprocess.mean),
        image_std=list(info.preprocess.std),
    ).save_pretrained(options.out / "hf")
    about = {"labels": info.classes, "run": str(options.run), **asdict(info.preprocess)}
    (options.out / "network.json").write_text(json.dumps(about, indent=2) + "\n")


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters and buffers in their order; the shapes must agree."""
    tensors, keys = list(source.state_dict().values()), list(target.state_dict())
    if len(tensors) != len(keys):
        sys.exit(f"the run has {len(tensors)} tensors, the other network {len(keys)}")
    target.load_state_dict(dict(zip(keys, tensors, strict=True)))


if __name__ == "__main__":
    main()
