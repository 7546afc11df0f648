"""Make a complete small bundle in milliseconds: an ONNX graph with random weights.

Photos, graphs and their probabilities are functions of the arguments, so a process computes each
once.
"""

from __future__ import annotations

import functools
import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFilter

from serving.bundle import storage
from serving.bundle.manifest import Manifest, content_version
from serving.imaging import tta
from serving.imaging.decode import decode
from serving.imaging.preprocess import Preprocess

NAMES = ("daisy", "rose", "tulip", "violet", "poppy", "lily", "iris", "aster", "lotus", "pansy")
TOLERANCE = 1e-4
_GRID = 4


@functools.lru_cache(1000)
def photo(seed: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """A JPEG of coloured discs, `size` = (width, height); a different image for each seed."""
    rng = np.random.default_rng(seed)
    width, height = size
    image = Image.new("RGB", size, _colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(width), rng.integers(height)
        radius = int(rng.integers(max(2, min(size) // 8), max(3, min(size) // 2)))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))
    file = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(1)).save(file, "JPEG", quality=90)
    return file.getvalue()


def elongated(folder: Path, classes: str = "ab", count: int = 3) -> Path:
    """Write photos into a folder per class: 3:1, 1:3, and 3:1 turned to 1:3 by EXIF."""
    for label, number in itertools.product(classes, range(count)):
        size = (301, 903) if number % 3 == 1 else (903, 301)
        (folder / label).mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(photo(ord(label) + 50 * number, size))) as image:
            exif = image.getexif()
            exif[0x0112] = 6 if number % 3 == 2 else 1
            image.save(folder / label / f"{number}.jpg", exif=exif, quality=95)
    return folder


def tiny_bundle(
    folder: Path, *, classes: int = 3, size: int = 32, seed: int = 0, **preprocessing: Any
) -> Path:
    """Publish a bundle in `folder` and return it.

    Args:
        folder: Created if it is missing; a bundle in it is replaced.
        classes: Length of the logits.
        size: Side of the graph's square input, a multiple of 4.
        seed: Of the weights: each seed gives another version.
        preprocessing: Other fields of `Preprocess`.
    """
    preprocess = Preprocess(size=size, **preprocessing)
    labels = tuple(NAMES[i] if i < len(NAMES) else f"class-{i}" for i in range(classes))
    graph, probabilities = _graph_and_probabilities(classes, preprocess, seed)
    partial = folder / ".payload.partial"
    (partial / "golden").mkdir(parents=True)
    (partial / "model.onnx").write_bytes(graph)
    (partial / "README.md").write_text(f"# tiny\n\nRandom weights of seed {seed}, for tests.\n")
    golden = []
    for number, (data, values) in enumerate(zip(_golden(), probabilities, strict=True)):
        name = f"golden/{number}.jpg"
        (partial / name).write_bytes(data)
        golden.append({"file": name, "probabilities": {"fp32": list(values)}})
    manifest = Manifest(
        name="tiny",
        version="",
        arch="tiny",
        labels=labels,
        preprocess=preprocess,
        views=tta.views_for(preprocess),
        precisions={"fp32": {"file": "model.onnx", "accuracy": None, "tolerance": TOLERANCE}},
        files=storage.describe_files(partial),
        golden=tuple(golden),
        graph={
            "input": {"name": "pixels", "dtype": "uint8", "shape": ["batch", size, size, 3]},
            "outputs": {
                "logits": {"dtype": "float32", "shape": ["batch", classes]},
                "features": {"dtype": "float32", "shape": ["batch", 3 * _GRID * _GRID]},
            },
        },
    )
    graphs = {"model.onnx": storage.sha256(partial / "model.onnx")}
    manifest = manifest.model_copy(update={"version": content_version(manifest, graphs)})
    payload = folder / manifest.version
    if payload.exists():
        shutil.rmtree(partial)  # published before with the same arguments
    else:
        partial.rename(payload)
    storage.publish(manifest, folder)
    return folder


def altered(folder: Path, **changes: Any) -> Manifest:
    """Change fields of a bundle's manifest, and its version to match, as an export would."""
    old = storage.read(folder).manifest
    manifest = old.model_copy(update=changes)
    digests = {name: manifest.files[name]["sha256"] for name in manifest.graphs}
    manifest = manifest.model_copy(update={"version": content_version(manifest, digests)})
    (folder / old.version).rename(folder / manifest.version)
    storage.publish(manifest, folder)
    return manifest


def _golden() -> list[bytes]:
    return [photo(1000 + n, size) for n, size in enumerate(((80, 60), (60, 80), (97, 33)))]


@functools.cache
def _graph_and_probabilities(
    classes: int, preprocess: Preprocess, seed: int
) -> tuple[bytes, tuple[tuple[float, ...], ...]]:
    """The graph, and its answers to the golden images."""
    graph = _graph(classes, preprocess, seed).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    decoded = [decode(data, preprocess=preprocess) for data in _golden()]
    pixels = np.stack([preprocess(one.image, one.area) for one in decoded])
    logits = [session.run(["logits"], {"pixels": one[None]})[0] for one in pixels]
    return graph, tuple(tuple(tta.softmax(one)[0].tolist()) for one in logits)


def _graph(classes: int, preprocess: Preprocess, seed: int) -> onnx.ModelProto:
    """A network: cast, normalise, average over a 4 x 4 grid, one linear layer."""
    size, cell = preprocess.size, preprocess.size // _GRID
    if size % _GRID:
        raise ValueError(f"size = {size}: use a multiple of {_GRID}")
    width = 3 * _GRID * _GRID
    rng = np.random.default_rng(seed)
    # Features vary by about 1 between images, so logits vary by about 3 and answers differ clearly.
    weight = rng.normal(scale=3 / np.sqrt(width), size=(width, classes)).astype(np.float32)
    constants = {
        "mean": 255 * np.array(preprocess.mean, np.float32).reshape(1, 3, 1, 1),
        "std": 255 * np.array(preprocess.std, np.float32).reshape(1, 3, 1, 1),
        "weight": weight,
        "bias": np.zeros(classes, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node(
            "AveragePool", ["normal"], ["cells"], kernel_shape=[cell, cell], strides=[cell, cell]
        ),
        helper.make_node("Flatten", ["cells"], ["features"]),
        helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [info("pixels", TensorProto.UINT8, ["batch", size, size, 3])],
        [
            info("logits", TensorProto.FLOAT, ["batch", classes]),
            info("features", TensorProto.FLOAT, ["batch", width]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10, producer_name="fledge"
    )
    onnx.checker.check_model(model)
    return model


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue
