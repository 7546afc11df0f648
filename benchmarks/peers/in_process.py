"""No server: from encoded photos in memory to the five best labels, in a bare loop, one thread.

The limit of any service on the same cores. Says `ready`, waits for a line on stdin, loops for
--warm seconds that do not count and for --seconds that do, and prints one line of JSON. With
--labels it prints the best label of each photo instead.
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
from PIL import Image


def main() -> None:
    """Loop, and tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a JSON list of paths")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--warm", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--labels", action="store_true")
    chosen = parser.parse_args()
    os.environ["PEER_THREADS"] = "1"
    network = Network(chosen.precision)
    photos = [Path(path).read_bytes() for path in json.loads(chosen.photos.read_text())]

    def answer(data: bytes) -> dict[str, Any]:
        return network([network.pixels(Image.open(io.BytesIO(data)))])[0]

    if chosen.labels:
        print(json.dumps([answer(data)["predictions"][0]["label"] for data in photos]))
        return
    answer(photos[0])
    print("ready", flush=True)
    sys.stdin.readline()
    turns = cycle(photos)
    until = time.perf_counter() + chosen.warm
    while time.perf_counter() < until:
        answer(next(turns))
    latencies: list[float] = []
    cpu, begun = time.process_time(), time.perf_counter()
    now, until = begun, begun + chosen.seconds
    while now < until:
        json.dumps(answer(next(turns)))
        before, now = now, time.perf_counter()
        latencies.append(now - before)
    told = {
        "seconds": now - begun,
        "latencies": latencies,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
