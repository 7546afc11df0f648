"""Bare training steps: a recipe's network on random tensors. Prints one JSON line per epoch.

`ours` is Fledge's network in the recipe's precision, channels-last, with the recipe's optimiser;
`float32` is torchvision's network, contiguous, in float32, with plain SGD.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from training.config import load
from training.engine import plan
from training.optim.optimizer import build_optimizer
from training.utils.precision import choose_precision


def main() -> None:
    """Train, validate and print the seconds of every epoch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("ours", "float32"))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--train", type=int, required=True, help="training photos per epoch")
    parser.add_argument("--valid", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    recipe = load.read(options.recipe)
    precision = choose_precision(options.device, recipe.precision)
    device, size = precision.device, recipe.preprocess.size
    stage = recipe.stage[-1]
    network: nn.Module
    if options.kind == "ours":
        classifier, _ = plan.build_classifier(recipe, options.classes, print)
        classifier.freeze(stage.unfreeze, batchnorm=stage.batchnorm)
        network = classifier.to(device).to(memory_format=torch.channels_last)
        lr = 1e-3 if stage.lr == "find" else stage.lr
        optimizer = build_optimizer(classifier, recipe.optimizer, stage, lr)
    else:
        network = models.get_model(recipe.arch, num_classes=options.classes).to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def forward(images: Tensor) -> Tensor:
        with nullcontext() if options.kind == "float32" else precision.autocast():
            logits: Tensor = network(images)
        return logits.float()

    def batches(photos: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of an epoch with `photos` photos, made from a few tensors that repeat."""
        full, rest = divmod(photos, recipe.batch_size)
        pool = []
        for count in (*[recipe.batch_size] * min(full, 4), *([rest] if rest > 1 else [])):
            images = torch.randn(count, 3, size, size, device=device)
            if options.kind == "ours":
                images = images.contiguous(memory_format=torch.channels_last)
            pool.append((images, torch.randint(options.classes, (count,), device=device)))
        return [pool[i % min(full, 4)] for i in range(full)] + pool[min(full, 4) :]

    train, valid = batches(options.train), batches(options.valid)
    synchronize: Callable[[], None] = (
        torch.cuda.synchronize if device.type == "cuda" else lambda: None
    )
    for _ in range(options.epochs):
        synchronize()
        started = time.perf_counter()
        network.train()
        for images, labels in train:
            F.cross_entropy(forward(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize()
        trained = time.perf_counter()
        network.eval()
        with torch.no_grad():
            for images, _ in valid:
                forward(images)
        synchronize()
        ended = time.perf_counter()
        times = {"seconds": ended - started, "train": trained - started, "valid": ended - trained}
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
