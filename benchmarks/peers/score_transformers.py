"""Hugging Face's pipeline for image classification over a list of paths.

As https://huggingface.co/docs/transformers/main_classes/pipelines has it: `pipeline(task, model)`,
then a call with all inputs, a batch size and a number of workers.
"""

from __future__ import annotations

from score_common import options, write
from transformers import pipeline


def main() -> None:
    """Score, then write."""
    chosen = options(__doc__).parse_args()
    classify = pipeline("image-classification", model=str(chosen.network / "hf"), device="cpu")
    paths = [str(path) for path in sorted(chosen.photos.iterdir())]
    answers = classify(paths, batch_size=chosen.batch, num_workers=chosen.workers, top_k=1)
    best = (answer[0] for answer in answers)
    write(
        chosen.out,
        ((path, one["label"], one["score"]) for path, one in zip(paths, best, strict=True)),
    )


if __name__ == "__main__":
    main()
