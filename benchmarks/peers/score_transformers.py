"""Hugging Face's pipeline for image classification over a list of paths.

As in https://huggingface.co/docs/transformers/main_classes/pipelines: `pipeline(task, model)`, then
a call with all inputs, a batch size and a number of workers.
"""

from __future__ import annotations

from score_common import option_parser, write
from transformers import pipeline


def main() -> None:
    """Score the folder, then write the table."""
    options = option_parser(__doc__).parse_args()
    classify = pipeline("image-classification", model=str(options.network / "hf"), device="cpu")
    paths = [str(path) for path in sorted(options.photos.iterdir())]
    answers = classify(paths, batch_size=options.batch, num_workers=options.workers, top_k=1)
    best = (answer[0] for answer in answers)
    write(
        options.out,
        ((path, one["label"], one["score"]) for path, one in zip(paths, best, strict=True)),
    )


if __name__ == "__main__":
    main()
