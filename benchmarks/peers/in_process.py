"""In-process limit of serving: encoded photos in memory to the five best labels, on one thread.

Prints `ready`, waits for a line on stdin, loops for --warm seconds and for --seconds measured ones,
and prints one line of JSON. With --labels it prints the best label of each photo instead.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from network import Network
from PIL import Image, ImageOps


def main() -> None:
    """Run the loop and print its measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a JSON list of paths")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--warm", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--labels", action="store_true")
    options = parser.parse_args()
    os.environ["PEER_THREADS"] = "1"
    network = Network(options.precision)
    photos = [Path(path).read_bytes() for path in json.loads(options.photos.read_text())]

    def answer(data: bytes) -> dict[str, Any]:
        image = Image.open(io.BytesIO(data))
        if network.manifest["preprocess"].get("decode") == "scaled" and not options.labels:
            reduce(image, network.manifest["preprocess"])
        ImageOps.exif_transpose(image, in_place=True)
        return network([network.pixels(image)])[0]

    if options.labels:
        print(json.dumps([answer(data)["predictions"][0]["label"] for data in photos]))
        return
    answer(photos[0])
    print("ready", flush=True)
    sys.stdin.readline()
    repeated = cycle(photos)
    end = time.perf_counter() + options.warm
    while time.perf_counter() < end:
        answer(next(repeated))
    latencies: list[float] = []
    cpu, begun = time.process_time(), time.perf_counter()
    now, end = begun, begun + options.seconds
    while now < end:
        json.dumps(answer(next(repeated)))
        before, now = now, time.perf_counter()
        latencies.append(now - before)
    measured = {
        "seconds": now - begun,
        "latencies": latencies,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(measured), flush=True)


def reduce(image: Image.Image, preprocess: dict[str, Any]) -> None:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, as the bundle says."""
    side = min(image.size) * preprocess["crop"]
    most = side / (2 * preprocess["size"])
    if scale := next((scale for scale in (8, 4, 2) if scale <= most), 0):
        image.draft(None, (image.width // scale, image.height // scale))


if __name__ == "__main__":
    main()
