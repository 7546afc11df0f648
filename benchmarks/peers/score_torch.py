"""A plain torch loop: a Dataset, a DataLoader, eager PyTorch; the table is written at the end.

As in https://docs.pytorch.org/tutorials/beginner/basics/data_tutorial.html. The network is
the run's; crop and resize are Fledge's single pass of Pillow, so that the pixels are the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from score_common import option_parser, write
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from serving.imaging.preprocess import Preprocess
from training.run import checkpoint


class Photos(Dataset[Tensor]):
    """Photos that are decoded one by one in the loader's processes."""

    def __init__(self, paths: list[Path], preprocess: Preprocess) -> None:
        self.paths, self.preprocess = paths, preprocess
        self.to_tensor = v2.Compose(
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
            # Copied because Pillow's memory is read-only, for which torch emits a warning.
            pixels: Tensor = self.to_tensor(self.preprocess(image.convert("RGB")).copy())
        return pixels


def main() -> None:
    """Score the folder, then write the table."""
    options = option_parser(__doc__).parse_args()
    model, info = checkpoint.load(options.network)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    paths = sorted(options.photos.iterdir())
    photos = Photos(paths, info.preprocess)
    loader = DataLoader(photos, batch_size=options.batch, num_workers=options.workers)
    answers: list[tuple[str, float]] = []
    with torch.inference_mode():
        for images in loader:
            best = torch.softmax(model(images), dim=1).max(dim=1)
            labels = [info.classes[index] for index in best.indices.tolist()]
            answers += zip(labels, best.values.tolist(), strict=True)
    write(options.out, ((str(path), *one) for path, one in zip(paths, answers, strict=True)))


if __name__ == "__main__":
    main()
