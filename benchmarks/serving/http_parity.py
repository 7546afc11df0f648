"""Compare the answers of a running service with the checkpoint, for all validation photos.

    fledge serve bundle --port 3000 &
    python -m benchmarks.serving.http_parity runs/latest http://127.0.0.1:3000

Prints how many photos have the same best class, and the largest difference of a probability. The
checkpoint runs in PyTorch in float32, without BatchNorm folding, at the bundle's temperature. For
the same precision on both sides start the service with `--precision fp32`. The exit status is 1 if
a best class differs.
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

from serving.imaging.decode import decode
from serving.imaging.tta import View, average, count_views, render, softmax
from training.evaluation import evaluate
from training.run import checkpoint
from training.run.dataset import load_run_dataset


def main() -> int:
    """Compare the service with the checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the run that the bundle was exported from")
    parser.add_argument("url", help="of the service")
    parser.add_argument("--tta", type=int, default=0, help="views of test-time augmentation")
    options = parser.parse_args()
    classifier, info = checkpoint.load(options.run)
    samples = load_run_dataset(options.run).valid
    opener = build_opener(ProxyHandler({}))  # a proxy cannot reach the loopback
    with opener.open(f"{options.url}/model", timeout=60) as response:
        manifest = json.load(response)
    available = tuple(View(**view) for view in manifest["views"])
    views = available[: count_views(options.tta, available)]
    same, worst = 0, 0.0
    for path, _ in samples:
        content = path.read_bytes()
        decoded = decode(content, preprocess=info.preprocess)
        pixels = render(decoded.image, info.preprocess, views, decoded.area)
        logits = evaluate.logits_of(classifier, torch.from_numpy(pixels.copy()), info.preprocess)
        expected = average(softmax(logits.numpy(), manifest["temperature"]), manifest["average"])
        query = f"tta={options.tta}&top_k={len(info.classes)}"
        request = Request(f"{options.url}/predict?{query}", content, {"Content-Type": "image/jpeg"})
        with opener.open(request, timeout=60) as response:
            answer = json.load(response)
        probabilities = {item["label"]: item["probability"] for item in answer["predictions"]}
        actual = np.array([probabilities[name] for name in info.classes])
        worst = max(worst, float(np.abs(actual - expected).max()))
        same += answer["predictions"][0]["label"] == info.classes[int(expected.argmax())]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.processor() or platform.machine()}, {versions}, views {len(views)}")
    print(f"same best class: {same} of {len(samples)}; largest difference: {worst:.2e}")
    return int(same != len(samples))


if __name__ == "__main__":
    sys.exit(main())
