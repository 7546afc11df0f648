r"""Export every network of torchvision: what became of its BatchNorms, how far off its graphs are.

    python benchmarks/networks.py --photos DIR [--archs resnet50,vit_b_16] [--out DIR]

Weights are torchvision's initial ones with BatchNorm statistics and gains made random, logits
rescaled to a standard deviation of 2; photos are real. Such networks were never trained, and some
blow rounding up beyond the gate's 1e-4: then the checkpoint is compared with itself in float64,
too, which tells rounding from a wrong graph. Each network has a process of its own, so
one that does not fit into memory is a row that says so. Rows are appended to OUT/results.jsonl:
the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine

CLASSES = 10
PHOTOS = 14  # for BatchNorm's statistics
GATE = 7  # of them through the gate: its largest batch


def main() -> int:
    """Run what is missing, then print the table; returns the exit status."""
    options = parse()
    if options.one:
        print(json.dumps(export(options.one, options.photos)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    rows = read(results)
    for arch in options.archs.split(",") if options.archs else every():
        if arch in rows:
            continue
        command = [sys.executable, __file__, "--photos", str(options.photos), "--one", arch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or ["killed: out of memory?"])[-1]
            rows[arch] = {"arch": arch, "failed": line}
        else:
            rows[arch] = json.loads(done.stdout.splitlines()[-1])
        print(rows[arch], file=sys.stderr, flush=True)
        with results.open("a") as file:
            file.write(json.dumps(rows[arch]) + "\n")
    from serving.utils.cpu import cores

    print(machine.describe(cores(), "cpu"), "\n")
    print(table(list(rows.values())))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="any folder of photos")
    parser.add_argument("--archs", help="names, with commas; default: all that can be fine-tuned")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-networks"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def every() -> list[str]:
    """All networks, in the order of the families."""
    from torchvision import models

    from training.models import families as bodies

    names = models.list_models(module=models)
    return sorted(
        (name for name in names if bodies.family(name)),
        key=lambda name: (bodies.FAMILIES.index(bodies.family(name)), name),
    )


def read(path: Path) -> dict[str, dict]:
    """Rows of earlier calls, by network."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["arch"]: row for row in map(json.loads, lines)}


def export(arch: str, photos: Path) -> dict:
    """One network through fusing, the three writers, and the gate's comparison; its row."""
    import numpy as np
    import torch

    from export import graph, parity
    from export.writers import onnx, torch_export, torchscript
    from serving.bundle.manifest import Manifest
    from serving.imaging import decode
    from serving.imaging.preprocess import Preprocess
    from serving.inference.predictor import Predictor
    from serving.inference.runtime import OnnxRuntime
    from serving.inference.torchscript import TorchScriptRuntime
    from tests.support.random_batchnorms import lively, speaking
    from training.models import backbones
    from training.models import classifier as model

    start = time.perf_counter()
    torch.manual_seed(0)
    size = 299 if arch == "inception_v3" else backbones.family_of(arch).image_size({})
    preprocess = Preprocess(size=size)
    paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = paths[:: max(1, len(paths) // PHOTOS)][:PHOTOS]
    kind = "linear" if backbones.family_of(arch).pooled else "concat_pool"
    classifier = model.build(arch, CLASSES, head={"kind": kind}).eval()
    squares = np.stack([preprocess(decode.read(path).image) for path in paths])
    x = model.normalise(torch.from_numpy(squares), preprocess)
    speaking(lively(classifier, x), x)
    parameters = sum(p.numel() for p in classifier.parameters())
    fused, report = graph.assemble(classifier, preprocess)
    original = graph.CheckpointRuntime(classifier, preprocess)
    gate, parity.TOLERANCE = parity.TOLERANCE, 1.0  # differences are wanted, not a verdict
    labels = tuple(f"class {index}" for index in range(CLASSES))
    manifest = Manifest(arch, "0", arch, labels, preprocess, {}, {})
    ways = {
        "onnx": (onnx.write, "model.onnx", lambda path: OnnxRuntime(path, device="cpu")),
        "torchscript": (torchscript.write, "model.ts", TorchScriptRuntime),
        "torch.export": (torch_export.write, "model.pt2", torch_export.ExportedRuntime),
    }
    row = {"arch": arch, "size": size, "parameters": parameters, **report.to_dict()}
    row["left"] = len(report.left)
    with tempfile.TemporaryDirectory() as folder:
        for name, (write, file, runtime) in ways.items():
            path = Path(folder) / file
            write(fused, path, name=arch, labels=labels, preprocess=preprocess)
            graphs = {name: Predictor(manifest, runtime(path))}
            samples = [(path, 0) for path in paths[:GATE]]
            found = parity.gate(original, preprocess, graphs, samples).graphs[name]
            row[name] = found.difference
            path.unlink()
    if max(row[name] for name in ways) > gate:
        with torch.inference_mode():
            single = classifier(x[:GATE]).double().softmax(1)
            exact = classifier.double()(x[:GATE].double()).softmax(1)
        row["rounding"] = float((single - exact).abs().max())
    row["seconds"] = time.perf_counter() - start
    return row


def table(rows: list[dict]) -> str:
    """Markdown."""
    families = {name: place for place, name in enumerate(every())}
    rows = sorted(rows, key=lambda row: families[row["arch"]])
    lines = [
        "| network | parameters | BatchNorms | folded | left | ONNX | TorchScript | torch.export |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| `{row['arch']}` | {row['failed']} |" + " |" * 6)
            continue
        off = (f"{row[name]:.0e}" for name in ("onnx", "torchscript", "torch.export"))
        counts = (f"{row[key]}" for key in ("before", "folded", "left"))
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        rounding = f" (rounding {row['rounding']:.0e})" if "rounding" in row else ""
        name = f"`{row['arch']}`{rounding}"
        lines.append(f"| {' | '.join([name, parameters, *counts, *off])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
