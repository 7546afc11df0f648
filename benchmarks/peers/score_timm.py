"""timm, with the calls of its script `inference.py`, which is not part of the package.

As described in https://huggingface.co/docs/timm: `create_model` with a checkpoint, `create_dataset`
on a folder, `create_loader` with the prefetcher and the data configuration, softmax and the best
class of each batch, one table at the end.
"""

from __future__ import annotations

import json

import timm
import torch
from score_common import option_parser, write
from timm.data import create_dataset, create_loader, resolve_data_config


def main() -> None:
    """Score the folder, then write the table."""
    options = option_parser(__doc__).parse_args()
    network = json.loads((options.network / "network.json").read_text())
    labels = network["labels"]
    model = timm.create_model(
        "mobilenetv2_100",
        num_classes=len(labels),
        checkpoint_path=str(options.network / "timm.pth"),
    ).eval()
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    data_config = {
        "input_size": (3, network["size"], network["size"]),
        "crop_pct": network["crop"],
        **{key: network[key] for key in ("interpolation", "mean", "std")},
    }
    dataset = create_dataset("", root=str(options.photos), split="validation")
    loader = create_loader(
        dataset,
        batch_size=options.batch,
        use_prefetcher=True,
        num_workers=options.workers,
        device=torch.device("cpu"),
        **resolve_data_config(data_config, model=model),
    )
    answers: list[tuple[str, float]] = []
    with torch.inference_mode():
        for images, _ in loader:
            best = model(images).softmax(-1).max(dim=-1)
            names = [labels[index] for index in best.indices.tolist()]
            answers += zip(names, best.values.tolist(), strict=True)
    paths = dataset.filenames(absolute=True)
    write(options.out, ((str(path), *one) for path, one in zip(paths, answers, strict=True)))


if __name__ == "__main__":
    main()
