"""A plain torch loop: a Dataset, a DataLoader, eager PyTorch; everything is kept until the end.

As https://docs.pytorch.org/tutorials/beginner/basics/data_tutorial.html has it. The network is the
run's own; crop and resize are one pass of Pillow, so that the pixels are Fledge's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from score_common import options, write
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from serving.imaging.preprocess import Preprocess
from training.run import checkpoint


class Photos(Dataset[Tensor]):
    """Decoded one by one, in the loader's processes."""

    def __init__(self, paths: list[Path], preprocess: Preprocess) -> None:
        self.paths, self.cut = paths, preprocess
        self.finish = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(preprocess.mean, preprocess.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            # A copy: Pillow's own memory can't be written to, of which torch warns.
            pixels: Tensor = self.finish(self.cut(image.convert("RGB")).copy())
        return pixels


def main() -> None:
    """Score, then write."""
    chosen = options(__doc__).parse_args()
    model, info = checkpoint.load(chosen.network)
    if chosen.channels_last:
        model = model.to(memory_format=torch.channels_last)
    paths = sorted(chosen.photos.iterdir())
    photos = Photos(paths, info.preprocess)
    loader = DataLoader(photos, batch_size=chosen.batch, num_workers=chosen.workers)
    found: list[tuple[str, float]] = []
    with torch.inference_mode():
        for images in loader:
            best = torch.softmax(model(images), dim=1).max(dim=1)
            labels = [info.classes[index] for index in best.indices.tolist()]
            found += zip(labels, best.values.tolist(), strict=True)
    write(chosen.out, ((str(path), *one) for path, one in zip(paths, found, strict=True)))


if __name__ == "__main__":
    main()
