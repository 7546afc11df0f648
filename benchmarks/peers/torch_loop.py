"""A plain torch loop, as torchvision's reference for classification is written.

Photos are decoded in every epoch by worker processes: random resized crop and flip to train on,
resize and centre crop to validate. The pretrained network has a new last layer and trains whole, by
SGD with momentum, a cosine schedule and weight decay, in float32.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import Sample, options, read_split, tell, versions, write_answers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE_AT_256 = 0.1  # the references' rate, for 8 processes of 32 photos; it scales with the batch


class Photos(Dataset[tuple[Tensor, int]]):
    """Decoded anew each time."""

    def __init__(
        self, root: Path, samples: list[Sample], classes: list[str], view: v2.Transform
    ) -> None:
        self.root, self.samples, self.classes, self.view = root, samples, classes, view

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        image = Image.open(self.root / sample.path).convert("RGB")
        return self.view(image), self.classes.index(sample.label)


def build(arch: str, weights: str, classes: int) -> nn.Module:
    """A network of torchvision with trained weights and a new last layer."""
    network: nn.Module = models.get_model(arch)
    if weights != "none":
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    where, last = list(network.named_modules())[-1]
    assert isinstance(last, nn.Linear), f"{arch} does not end in a linear layer"
    above, _, name = where.rpartition(".")
    setattr(network.get_submodule(above), name, nn.Linear(last.in_features, classes))
    return network


def main() -> None:
    """Train, telling of every epoch."""
    chosen = options(__doc__).parse_args()
    torch.manual_seed(chosen.seed)
    train, valid = read_split(chosen.split, chosen.fold)
    classes = sorted({sample.label for sample in train})
    device = torch.device(chosen.device)
    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = v2.RandomResizedCrop(chosen.size, antialias=True)
    whole = v2.Resize(round(chosen.size / 0.875), antialias=True)
    views = (
        v2.Compose([crop, v2.RandomHorizontalFlip(), *tail]),
        v2.Compose([whole, v2.CenterCrop(chosen.size), *tail]),
    )
    loaders = [
        DataLoader(
            Photos(chosen.data, part, classes, view),
            batch_size=chosen.batch,
            shuffle=part is train,
            num_workers=chosen.workers,
            pin_memory=device.type == "cuda",
        )
        for part, view in zip((train, valid), views, strict=True)
    ]
    network = build(chosen.arch, chosen.weights, len(classes)).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=RATE_AT_256 * chosen.batch / 256, momentum=0.9, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=chosen.epochs)
    criterion = nn.CrossEntropyLoss()
    tell("begin", train=len(train), valid=len(valid), classes=len(classes))
    predicted = torch.empty(0)
    for _ in range(chosen.epochs):
        started = time.perf_counter()
        network.train()
        for images, labels in loaders[0]:
            outputs = network(images.to(device, non_blocking=True))
            loss = criterion(outputs, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        network.eval()
        with torch.inference_mode():
            answers = [network(images.to(device)).argmax(1).cpu() for images, _ in loaders[1]]
        predicted = torch.cat(answers)
        truth = torch.tensor([classes.index(sample.label) for sample in valid])
        accuracy = int((predicted == truth).sum()) / len(truth)
        tell("epoch", accuracy=accuracy, seconds=time.perf_counter() - started)
    torch.save(network.state_dict(), chosen.out / "model.pth")
    tell("done", versions=versions("torch", "torchvision", "pillow"))
    named = [(s.path, s.label, classes[i]) for s, i in zip(valid, predicted.tolist(), strict=True)]
    write_answers(chosen.out / "plain.csv", named)


if __name__ == "__main__":
    main()
