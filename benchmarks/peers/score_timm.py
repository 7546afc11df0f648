"""timm, as its script `inference.py` scores a folder: the package has the parts, not the script.

Written after https://huggingface.co/docs/timm and the script's own description: `create_model` with
a checkpoint, `create_dataset` on a folder, `create_loader` with the prefetcher and the data
configuration, softmax and the best class of each batch, one table at the end.
"""

from __future__ import annotations

import json

import timm
import torch
from score_common import options, write
from timm.data import create_dataset, create_loader, resolve_data_config


def main() -> None:
    """Score, then write."""
    chosen = options(__doc__).parse_args()
    about = json.loads((chosen.network / "network.json").read_text())
    labels = about["labels"]
    model = timm.create_model(
        "mobilenetv2_100",
        num_classes=len(labels),
        checkpoint_path=str(chosen.network / "timm.pth"),
    ).eval()
    if chosen.channels_last:
        model = model.to(memory_format=torch.channels_last)
    stated = {
        "input_size": (3, about["size"], about["size"]),
        "crop_pct": about["crop"],
        **{key: about[key] for key in ("interpolation", "mean", "std")},
    }
    dataset = create_dataset("", root=str(chosen.photos), split="validation")
    loader = create_loader(
        dataset,
        batch_size=chosen.batch,
        use_prefetcher=True,
        num_workers=chosen.workers,
        device=torch.device("cpu"),
        **resolve_data_config(stated, model=model),
    )
    found: list[tuple[str, float]] = []
    with torch.inference_mode():
        for images, _ in loader:
            best = model(images).softmax(-1).max(dim=-1)
            chosen_labels = [labels[index] for index in best.indices.tolist()]
            found += zip(chosen_labels, best.values.tolist(), strict=True)
    names = dataset.filenames(absolute=True)
    write(chosen.out, ((str(name), *one) for name, one in zip(names, found, strict=True)))


if __name__ == "__main__":
    main()
