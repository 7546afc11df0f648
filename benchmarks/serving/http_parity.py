"""Ask a running service for every validation photo of a run, and compare with the checkpoint.

    fledge serve bundle --port 3000 &
    python benchmarks/serving/http_parity.py runs/latest http://127.0.0.1:3000

Prints how many photos have the checkpoint's best class and the largest difference of a probability.
The checkpoint answers in float32, unfused, in PyTorch, at the bundle's temperature; the service as
it was started, so start it with `--precision fp32` for a like comparison. Exit status 1 when a best
class differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import torch

from serving.imaging import decode as images
from serving.imaging.tta import View, average, count, render, softmax
from training.evaluation import evaluate
from training.run import checkpoint
from training.run.dataset import of_run


def main() -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("url")
    parser.add_argument("--tta", type=int, default=0)
    options = parser.parse_args()
    classifier, info = checkpoint.load(options.run)
    samples = of_run(options.run).valid
    ask = build_opener(ProxyHandler({}))  # the service is near; a proxy would not find it
    with ask.open(f"{options.url}/model", timeout=60) as response:
        manifest = json.load(response)
    known = tuple(View(**view) for view in manifest["views"])
    views = known[: count(options.tta, known)]
    same, worst = 0, 0.0
    for path, _ in samples:
        content = path.read_bytes()
        pixels = render(images.decode(content).image, info.preprocess, views)
        logits = evaluate.logits_of(classifier, torch.from_numpy(pixels.copy()), info.preprocess)
        expected = average(softmax(logits.numpy(), manifest["temperature"]), manifest["average"])
        query = f"tta={options.tta}&top_k={len(info.classes)}"
        request = Request(f"{options.url}/predict?{query}", content, {"Content-Type": "image/jpeg"})
        with ask.open(request, timeout=60) as response:
            answer = json.load(response)
        got = {item["label"]: item["probability"] for item in answer["predictions"]}
        actual = np.array([got[name] for name in info.classes])
        worst = max(worst, float(np.abs(actual - expected).max()))
        same += answer["predictions"][0]["label"] == info.classes[int(expected.argmax())]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.processor() or platform.machine()}, {versions}, views {len(views)}")
    print(f"same best class: {same} of {len(samples)}; largest difference: {worst:.2e}")
    return int(same != len(samples))


if __name__ == "__main__":
    sys.exit(main())
