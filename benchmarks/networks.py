r"""Export every network of torchvision: folded BatchNorms, and differences to the checkpoint.

    python -m benchmarks.networks --photos DIR [--archs resnet50,vit_b_16] [--out DIR]

Weights are torchvision's initial ones with BatchNorm statistics and gains made random, logits
rescaled to a standard deviation of 2; photos are real. Such networks were never trained, and some
amplify rounding beyond the gate's 1e-4. The checkpoint is then also compared with itself in
float64, to distinguish rounding from a wrong graph. Each network runs in its own process: one that
does not fit into memory becomes a row with the error. Rows are appended to OUT/results.jsonl; the
same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine, results
from serving.utils.cpu import cores

CLASSES = 10
PHOTOS = 14  # for the BatchNorm statistics
GATE = 7  # of them go through the gate; its largest batch


def main() -> int:
    """Export the networks that have no row yet, then print the table; returns the exit status."""
    options = parse()
    if options.one:
        print(json.dumps(export(options.one, options.photos)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / results.FILE
    rows = read(path)
    for arch in options.archs.split(",") if options.archs else all_networks():
        if arch in rows:
            continue
        command = [sys.executable, "-m", "benchmarks.networks"]
        command += ["--photos", str(options.photos), "--one", arch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or ["killed: out of memory?"])[-1]
            rows[arch] = {"arch": arch, "failed": line}
        else:
            rows[arch] = json.loads(done.stdout.splitlines()[-1])
        print(rows[arch], file=sys.stderr, flush=True)
        with path.open("a") as file:
            file.write(json.dumps(rows[arch]) + "\n")
    print(machine.describe(cores(), "cpu"), "\n")
    print(table(list(rows.values())))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="any folder of photos")
    parser.add_argument(
        "--archs", help="comma-separated names; default: all that can be fine-tuned"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-networks"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def all_networks() -> list[str]:
    """All networks that can be fine-tuned, sorted by family and name."""
    from torchvision import models

    from training.models.families import FAMILIES, find_family

    return sorted(
        filter(find_family, models.list_models(module=models)),
        key=lambda name: (FAMILIES.index(find_family(name)), name),
    )


def read(path: Path) -> dict[str, dict]:
    """Rows of earlier runs, by network."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["arch"]: row for row in map(json.loads, lines)}


def export(arch: str, photos: Path) -> dict:
    """Fold one network, write its three graphs, compare them with the checkpoint; returns a row."""
    import numpy as np
    import torch

    from export import graph, parity
    from export.writers import onnx, torch_export, torchscript
    from serving.bundle.manifest import Manifest
    from serving.imaging.decode import read as read_image
    from serving.imaging.preprocess import Preprocess
    from serving.inference.predictor import Predictor
    from serving.inference.runtime import OnnxRuntime
    from serving.inference.torchscript import TorchScriptRuntime
    from tests.support.random_batchnorms import randomise_batchnorms, scale_logits
    from training.models import backbones
    from training.models.classifier import create_classifier, normalise

    start = time.perf_counter()
    torch.manual_seed(0)
    size = 299 if arch == "inception_v3" else backbones.family_of(arch).image_size({})
    preprocess = Preprocess(size=size)
    paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = paths[:: max(1, len(paths) // PHOTOS)][:PHOTOS]
    kind = "linear" if backbones.family_of(arch).pooled else "concat_pool"
    classifier = create_classifier(arch, CLASSES, head={"kind": kind}).eval()
    squares = np.stack([preprocess(read_image(path).image) for path in paths])
    x = normalise(torch.from_numpy(squares), preprocess)
    scale_logits(randomise_batchnorms(classifier, x), x)
    parameters = sum(p.numel() for p in classifier.parameters())
    fused, fusion = graph.assemble(classifier, preprocess)
    original = graph.CheckpointRuntime(classifier, preprocess)
    gate, parity.TOLERANCE = parity.TOLERANCE, 1.0  # record differences, refuse none
    labels = tuple(f"class {index}" for index in range(CLASSES))
    manifest = Manifest(
        name=arch,
        version="0",
        arch=arch,
        labels=labels,
        preprocess=preprocess,
        precisions={},
        files={},
    )
    writers = {
        "onnx": (onnx.write, "model.onnx", lambda path: OnnxRuntime(path, device="cpu")),
        "torchscript": (torchscript.write, "model.ts", TorchScriptRuntime),
        "torch.export": (torch_export.write, "model.pt2", torch_export.ExportedRuntime),
    }
    row = {"arch": arch, "size": size, "parameters": parameters, **fusion.to_dict()}
    row["left"] = len(fusion.left)
    with tempfile.TemporaryDirectory() as folder:
        for name, (write, file, runtime) in writers.items():
            path = Path(folder) / file
            write(fused, path, name=arch, labels=labels, preprocess=preprocess)
            graphs = {name: Predictor(manifest, runtime(path))}
            samples = [(path, 0) for path in paths[:GATE]]
            report = parity.gate(original, preprocess, graphs, samples)
            row[name] = report.graphs[name].difference
            path.unlink()
    if max(row[name] for name in writers) > gate:
        with torch.inference_mode():
            single = classifier(x[:GATE]).double().softmax(1)
            exact = classifier.double()(x[:GATE].double()).softmax(1)
        row["rounding"] = float((single - exact).abs().max())
    row["seconds"] = time.perf_counter() - start
    return row


def table(rows: list[dict]) -> str:
    """The rows as a markdown table."""
    families = {name: place for place, name in enumerate(all_networks())}
    rows = sorted(rows, key=lambda row: families[row["arch"]])
    lines = [
        "| network | parameters | BatchNorms | folded | left | ONNX | TorchScript | torch.export |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| `{row['arch']}` | {row['failed']} |" + " |" * 6)
            continue
        differences = (f"{row[name]:.0e}" for name in ("onnx", "torchscript", "torch.export"))
        counts = (f"{row[key]}" for key in ("before", "folded", "left"))
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        rounding = f" (rounding {row['rounding']:.0e})" if "rounding" in row else ""
        name = f"`{row['arch']}`{rounding}"
        lines.append(f"| {' | '.join([name, parameters, *counts, *differences])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
