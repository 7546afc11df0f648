"""Peak memory of decoding large photos: at their full size, and at a reduced one.

    python -m benchmarks.serving.decode_memory --bundle bundle

The first table has bytes per pixel for each format, upright and turned by EXIF: the growth of the
resident memory of a process while it decodes a photo of 12 megapixels and cuts the plain view. The
second has the growth for one request to the service, as it is started by `fledge serve`: the sum of
the peaks of all its processes over their memory before the request, after one request with a small
photo. For that, copies of the bundle are made whose `preprocess.decode` is full and scaled.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import psutil
from PIL import Image

from benchmarks import machine
from benchmarks.serving.processes import HOST, RunningServer, free_port, serving
from serving.bundle import storage
from serving.bundle.manifest import content_version
from serving.imaging.preprocess import DECODES, Preprocess
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime

FP32: Final = "model.onnx"
SMALL: Final = (640, 480)
SIZES: Final = {"12 MP": (4032, 3024), "48 MP": (8064, 6048)}
FORMATS: Final = {
    "JPEG": ("RGB", "JPEG", {}),
    "JPEG, progressive": ("RGB", "JPEG", {"progressive": True}),
    "JPEG, CMYK": ("CMYK", "JPEG", {}),
    "PNG, RGB": ("RGB", "PNG", {"compress_level": 1}),
    "PNG, RGBA": ("RGBA", "PNG", {"compress_level": 1}),
    "TIFF, LZW": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "WebP": ("RGB", "WEBP", {"method": 0}),
    "AVIF": ("RGB", "AVIF", {"speed": 10}),
}
_TURNED: Final = {"upright": 1, "turned": 6}


def photo(
    size: tuple[int, int],
    mode: str = "RGB",
    kind: str = "JPEG",
    turn: int = 1,
    **options: object,
) -> bytes:
    """A photo-like picture with camera noise."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (size[1] // 64, size[0] // 64, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC), np.int16)
    image = image + rng.integers(-6, 7, (size[1], size[0], 1), dtype=np.int16)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert(mode)
    picture.save(file, kind, exif=exif, **options)
    return file.getvalue()


_MEASURE: Final = """
import sys
from pathlib import Path
from serving.imaging.decode import decode_here
from serving.imaging.preprocess import Preprocess
from serving.utils.malloc import return_large_blocks

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024

def answer(path, preprocess):
    decoded = decode_here(Path(path).read_bytes(), max_pixels=10**8, preprocess=preprocess)
    preprocess(decoded.image, decoded.area)

return_large_blocks()
preprocess = Preprocess(decode=sys.argv[1])
answer(sys.argv[2], preprocess)
before = status("VmRSS")
answer(sys.argv[3], preprocess)
print(status("VmHWM") - before)
"""


def peak_of_decoding(folder: Path, mode: str, kind: str, turn: int, how: str, **o: object) -> float:
    """Peak of resident memory in bytes per pixel, without the encoded file."""
    paths, size = [], SIZES["12 MP"]
    for name, one in (("small", SMALL), ("large", size)):
        paths.append(folder / f"{name}-{mode}-{turn}-{'-'.join(map(str, o))}.{kind}")
        if not paths[-1].exists():
            paths[-1].write_bytes(photo(one, mode, kind, turn, **o))
    command = [sys.executable, "-c", _MEASURE, how, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return (int(done.stdout) - paths[1].stat().st_size) / (size[0] * size[1])


def with_decode(bundle: Path, folder: Path, how: str) -> Path:
    """A copy of a bundle in float32 with another `preprocess.decode`, and golden images for it."""
    shutil.copytree(bundle, folder)
    old = storage.read(folder).manifest
    preprocess = Preprocess.from_dict({**old.preprocess.to_dict(), "decode": how})
    manifest = old.model_copy(
        update={"preprocess": preprocess, "precisions": {"fp32": old.precisions["fp32"]}}
    )
    payload = folder / old.version
    predictor = Predictor(manifest, OnnxRuntime(payload / FP32, device="cpu"))
    golden = []
    for one in old.golden:
        prepared = predictor.prepare((payload / one["file"]).read_bytes())
        probabilities = predictor.predict([prepared])[0].probabilities.tolist()
        golden.append({**one, "probabilities": {"fp32": probabilities}})
    digests = {name: manifest.files[name]["sha256"] for name in manifest.graphs}
    version = content_version(manifest, digests)
    manifest = manifest.model_copy(update={"version": version, "golden": tuple(golden)})
    if version != old.version:
        payload.rename(folder / version)
    storage.publish(manifest, folder)
    return folder


@contextmanager
def service(bundle: Path, log: Path) -> Iterator[RunningServer]:
    """The service as shipped, with one worker in float32."""
    port = free_port()
    command = [sys.executable, "-m", "fledge", "serve", str(bundle), "--port", str(port)]
    env = {**os.environ, "FLEDGE_DEVICE": "cpu", "FLEDGE_PRECISION": "fp32", "FLEDGE_WORKERS": "1"}
    with serving(command, env, port, "/readyz", log) as running:
        yield running


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    root = psutil.Process(pid)
    return [pid, *(child.pid for child in root.children(recursive=True))]


def memory(pid: int, field: str) -> int:
    """A field of a process's status in bytes; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(text.split(field + ":")[1].split()[0]) * 1024


def post(port: int, data: bytes) -> None:
    """Send a photo to the service; an answer that is no JSON, or an error, is raised."""
    request = Request(f"http://{HOST}:{port}/predict", data, {"content-type": "image/jpeg"})
    with build_opener(ProxyHandler({})).open(request, timeout=60) as response:
        json.load(response)


def peak_of_request(running: RunningServer, data: bytes) -> float:
    """Growth of all processes' peaks over their memory before the request, in MB.

    The decoder process, if the photo needs one, is started by a request before.
    """
    post(running.port, photo(SMALL))
    post(running.port, data)
    pids = tree(running.pid)
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = {pid: memory(pid, "VmRSS") for pid in pids}
    post(running.port, data)
    return sum(memory(pid, "VmHWM") - before[pid] for pid in pids) / 1e6


def main() -> int:
    """Print both tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="without: the first table alone")
    parser.add_argument("--rounds", type=int, default=3, help="of each request; the median counts")
    options = parser.parse_args()
    described = machine.describe(os.cpu_count() or 1, "cpu")
    print(f"{described}, Pillow {Image.__version__}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(
            "| bytes per pixel | full, upright | full, turned | scaled, upright | scaled, turned |"
        )
        print("|---|---:|---:|---:|---:|", flush=True)
        for name, (mode, kind, given) in FORMATS.items():
            cells = [
                f"{peak_of_decoding(folder, mode, kind, turn, how, **given):.2f}"
                for how in DECODES
                for turn in _TURNED.values()
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if not options.bundle:
            return 0
        print("\n| one request, MB | full | scaled | share |\n|---|---:|---:|---:|", flush=True)
        peaks: dict[tuple[str, str], list[float]] = {}
        for how in DECODES:
            bundle = with_decode(options.bundle, folder / how, how)
            for name, size in SIZES.items():
                for turned, turn in _TURNED.items():
                    data = photo(size, turn=turn)
                    with service(bundle, folder / "log") as running:
                        peaks[how, f"{name}, {turned}"] = [
                            peak_of_request(running, data) for _ in range(options.rounds)
                        ]
        for name in dict.fromkeys(name for _, name in peaks):
            full, scaled = (statistics.median(peaks[how, name]) for how in DECODES)
            print(f"| {name} | {full:.1f} | {scaled:.1f} | {scaled / full:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
