"""No tool: from files to the best label in a bare loop, by processes or by threads.

The limit of scoring on the same cores. Each thread has its part of the photos, with Fledge's
decoder, preprocessing and session, and does nothing else: no order, no journal, no table until the
end. A broken photo would end it.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

Answer = tuple[str, str, float]


def main() -> None:
    """Share the photos out, and write what came of them in their order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="CSV: path, label, probability")
    chosen = parser.parse_args()
    photos = sorted(chosen.photos.iterdir())
    shared = (chosen.bundle, chosen.precision, chosen.threads, chosen.batch)
    parts = [(photos[k :: chosen.processes], *shared) for k in range(chosen.processes)]
    if len(parts) == 1:
        answers = [part(*parts[0])]
    else:
        with multiprocessing.get_context("fork").Pool(chosen.processes) as pool:
            answers = pool.starmap(part, parts, chunksize=1)
    with chosen.out.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "label", "probability"])
        out.writerows(sorted(answer for one in answers for answer in one))


def part(
    photos: list[Path], bundle: Path, precision: str, threads: int, batch: int
) -> list[Answer]:
    """Answers of one process, whose threads share a session."""
    # Here, not above: every process of its own opens the runtime for itself.
    from serving.bundle.storage import read
    from serving.imaging import decode as images
    from serving.imaging import tta
    from serving.inference.runtime import OnnxRuntime

    opened = read(bundle)
    cut, labels = opened.manifest.preprocess, opened.manifest.labels
    temperature = opened.manifest.temperature
    engine = OnnxRuntime(opened.graph(precision), device="cpu", threads=1)

    def loop(own: list[Path]) -> list[Answer]:
        found: list[Answer] = []
        for start in range(0, len(own), batch):
            names = own[start : start + batch]
            squares = [cut(images.decode(name.read_bytes()).image) for name in names]
            logits, _ = engine.run(np.stack(squares))
            for name, row in zip(names, tta.softmax(logits, temperature), strict=True):
                best = int(row.argmax())
                found.append((str(name), labels[best], float(row[best])))
        return found

    if threads == 1:
        return loop(photos)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(loop, (photos[k::threads] for k in range(threads)))
        return [answer for one in parts for answer in one]


if __name__ == "__main__":
    main()
