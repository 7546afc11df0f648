"""In-process limit of scoring: files to best labels in a loop, with processes or threads.

Each thread scores its share of the photos with Fledge's decoder, preprocessing and session, and
does nothing else: no ordering, no journal, and no table until the end. A broken photo ends the
program.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Answer = tuple[str, str, float]
"""Path, label, probability."""


def main() -> None:
    """Distribute the photos over the processes; write the answers sorted by path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--full", action="store_true", help="all pixels, decoded by Pillow alone: the reference"
    )
    parser.add_argument("--out", type=Path, required=True, help="CSV: path, label, probability")
    options = parser.parse_args()
    photos = sorted(options.photos.iterdir())
    shared = (options.bundle, options.precision, options.threads, options.batch, options.full)
    parts = [(photos[k :: options.processes], *shared) for k in range(options.processes)]
    if len(parts) == 1:
        answers = [score(*parts[0])]
    else:
        with multiprocessing.get_context("fork").Pool(options.processes) as pool:
            answers = pool.starmap(score, parts, chunksize=1)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "probability"])
        out.writerows(sorted(answer for group in answers for answer in group))


def score(
    photos: list[Path], bundle: Path, precision: str, threads: int, batch: int, full: bool
) -> list[Answer]:
    """Answers of one process; its threads share a session."""
    # Imported here so that each forked process loads ONNX Runtime itself.
    from serving.bundle.storage import read
    from serving.imaging.decode import decode
    from serving.imaging.tta import softmax
    from serving.inference.runtime import OnnxRuntime

    opened = read(bundle)
    preprocess, labels = opened.manifest.preprocess, opened.manifest.labels
    temperature = opened.manifest.temperature
    runtime = OnnxRuntime(opened.graph(precision), device="cpu", threads=1)

    def square(path: Path) -> npt.NDArray[np.uint8]:
        if not full:
            decoded = decode(path.read_bytes(), preprocess=preprocess)
            return preprocess(decoded.image, decoded.area)
        with Image.open(path) as image:
            return preprocess(ImageOps.exif_transpose(image).convert("RGB"))

    def loop(paths: list[Path]) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(paths), batch):
            group = paths[start : start + batch]
            pixels = [square(path) for path in group]
            logits, _ = runtime.run(np.stack(pixels))
            for path, row in zip(group, softmax(logits, temperature), strict=True):
                best = int(row.argmax())
                answers.append((str(path), labels[best], float(row[best])))
        return answers

    if threads == 1:
        return loop(photos)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(loop, (photos[k::threads] for k in range(threads)))
        return [answer for answers in parts for answer in answers]


if __name__ == "__main__":
    main()
