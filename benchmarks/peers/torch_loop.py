"""A plain torch loop, written like torchvision's reference for classification.

Worker processes decode the photos in every epoch: random resized crop and flip for training, resize
and centre crop for validation. The pretrained network gets a new last layer; all layers train in
float32 by SGD with momentum, weight decay and a cosine schedule.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import Sample, emit, option_parser, read_split, versions, write_answers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LR_AT_256 = 0.1  # the reference's rate for 8 processes of 32 photos; scales with the batch


class Photos(Dataset[tuple[Tensor, int]]):
    """Photos that are decoded at each access."""

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
    """A torchvision network with pretrained weights and a new last layer."""
    network: nn.Module = models.get_model(arch)
    if weights != "none":
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    name, last = list(network.named_modules())[-1]
    assert isinstance(last, nn.Linear), f"{arch} does not end in a linear layer"
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Linear(last.in_features, classes))
    return network


def main() -> None:
    """Train, emit every epoch, then write the answers for the validation photos."""
    options = option_parser(__doc__).parse_args()
    torch.manual_seed(options.seed)
    train, valid = read_split(options.split, options.fold)
    classes = sorted({sample.label for sample in train})
    device = torch.device(options.device)
    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = v2.RandomResizedCrop(options.size, antialias=True)
    resize = v2.Resize(round(options.size / 0.875), antialias=True)
    views = (
        v2.Compose([crop, v2.RandomHorizontalFlip(), *tail]),
        v2.Compose([resize, v2.CenterCrop(options.size), *tail]),
    )
    loaders = [
        DataLoader(
            Photos(options.data, part, classes, view),
            batch_size=options.batch,
            shuffle=part is train,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        for part, view in zip((train, valid), views, strict=True)
    ]
    network = build(options.arch, options.weights, len(classes)).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LR_AT_256 * options.batch / 256, momentum=0.9, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)
    criterion = nn.CrossEntropyLoss()
    emit("begin", train=len(train), valid=len(valid), classes=len(classes))
    predicted = torch.empty(0)
    for _ in range(options.epochs):
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
        emit("epoch", accuracy=accuracy, seconds=time.perf_counter() - started)
    torch.save(network.state_dict(), options.out / "model.pth")
    emit("done", versions=versions("torch", "torchvision", "pillow"))
    rows = [(s.path, s.label, classes[i]) for s, i in zip(valid, predicted.tolist(), strict=True)]
    write_answers(options.out / "plain.csv", rows)


if __name__ == "__main__":
    main()
