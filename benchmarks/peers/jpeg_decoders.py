"""Ways from the bytes of a JPEG to the network's square of uint8; run by its name, on one thread.

Prints a line of JSON: `failed` with the reason, or the versions. Then it answers lines on stdin:
`time FILE RUNS` with the ms of CPU of each run, `save FILE OUT` after writing the square to OUT,
`peak FILE` with the most MB that one run takes above the memory before it.

Packages that decode at a reduced size are given the reduction that Pillow's draft takes, and all
but libvips' thumbnail and torch's are resized by Pillow, so that times differ by the decoder.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

SIZE, CROP = 224, 0.875
BILINEAR = Image.Resampling.BILINEAR
Square = npt.NDArray[np.uint8]
Decoder = Callable[[bytes], Square]


def reduction(size: tuple[int, int], factor: float) -> int:
    """The largest of 8, 4, 2 and 1 by which the kept part stays `factor` times the square."""
    side = min(size) * CROP
    return next((n for n in (8, 4, 2) if side / n >= factor * SIZE), 1)


def square(image: Image.Image, size: tuple[float, float], gap: float | None = None) -> Square:
    """Crop and resize an image that the picture covers to `size`, which may be fractional."""
    side = min(size) * CROP
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIZE, SIZE), BILINEAR, box=box, reducing_gap=gap))


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height, from the head."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def pillow(data: bytes, gap: float | None = None) -> Square:
    """All pixels; `gap`: a box reduction first, so that the filter sees `gap` times the square."""
    image = _rgb(Image.open(io.BytesIO(data)))
    return square(image, image.size, gap)


def pillow_draft(data: bytes, factor: float) -> Square:
    """Decoded at 1/2, 1/4 or 1/8, so that the kept part stays `factor` times the square."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    by = reduction(image.size, factor)
    image.draft("RGB", (width // by, height // by))
    return square(_rgb(image), (width / by, height / by))


def _rgb(image: Image.Image) -> Image.Image:
    """Without the copy that `convert` makes of an image that has the mode already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def fledge(decode: str) -> Decoder:
    """The service's decoder with all of its checks; `decode`: full or scaled."""
    from serving.imaging import decode as imaging
    from serving.imaging.preprocess import Preprocess

    preprocess = Preprocess(size=SIZE, crop=CROP, decode=decode)

    def run(data: bytes) -> Square:
        decoded = imaging.decode(data, preprocess=preprocess)
        return preprocess(decoded.image, decoded.area)

    return run


def simplejpeg() -> Decoder:
    """libjpeg-turbo, with its reduction."""
    from simplejpeg import decode_jpeg

    def run(data: bytes) -> Square:
        width, height = size_of(data)
        by = reduction((width, height), 2)
        pixels = decode_jpeg(data, "RGB", min_height=height // by, min_width=width // by)
        return square(Image.fromarray(pixels), (width / by, height / by))

    return run


def pyturbojpeg() -> Decoder:
    """The system's libjpeg-turbo, with its reduction."""
    from turbojpeg import TJPF_RGB, TurboJPEG

    library = TurboJPEG()

    def run(data: bytes) -> Square:
        width, height = size_of(data)
        by = reduction((width, height), 2)
        pixels = library.decode(data, pixel_format=TJPF_RGB, scaling_factor=(1, by))
        return square(Image.fromarray(pixels), (width / by, height / by))

    return run


def pyvips_shrink() -> Decoder:
    """libvips, with the reduction of libjpeg-turbo; resized by Pillow."""
    import pyvips

    def run(data: bytes) -> Square:
        width, height = size_of(data)
        by = reduction((width, height), 2)
        image = pyvips.Image.new_from_buffer(data, "", shrink=by, access="sequential")
        return square(Image.fromarray(image.numpy()), (width / by, height / by))

    return run


def pyvips_thumbnail() -> Decoder:
    """The thumbnail of libvips: its own choice of reduction and filter."""
    import pyvips

    def run(data: bytes) -> Square:
        side = round(SIZE / CROP)
        image = pyvips.Image.thumbnail_buffer(data, side, height=side, crop="centre")
        margin = (side - SIZE) // 2
        return np.asarray(image.extract_area(margin, margin, SIZE, SIZE).numpy())

    return run


def imagecodecs() -> Decoder:
    """libjpeg-turbo; it has no reduction."""
    from imagecodecs import jpeg8_decode

    def run(data: bytes) -> Square:
        image = Image.fromarray(jpeg8_decode(data))
        return square(image, image.size)

    return run


def _torch(decode: Callable[[Any], Any]) -> Decoder:
    import torch
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)

    def run(data: bytes) -> Square:
        pixels = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        side = round(min(pixels.shape[1:]) * CROP)
        resized = functional.resize(functional.center_crop(pixels, [side]), [SIZE, SIZE])
        return np.asarray(resized.permute(1, 2, 0))

    return run


def torchvision() -> Decoder:
    """libjpeg-turbo; it has no reduction. Resized by torch."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return _torch(partial(decode_jpeg, mode=ImageReadMode.RGB))


def torchcodec() -> Decoder:
    """libjpeg-turbo; it has no reduction. Resized by torch."""
    from torchcodec.decoders import decode_jpeg

    return _torch(partial(decode_jpeg, mode="RGB"))


DECODERS: dict[str, Callable[[], Decoder]] = {
    "pillow": lambda: pillow,
    "pillow-gap3": lambda: partial(pillow, gap=3.0),
    "pillow-gap2": lambda: partial(pillow, gap=2.0),
    "pillow-draft2": lambda: partial(pillow_draft, factor=2),
    "pillow-draft1.5": lambda: partial(pillow_draft, factor=1.5),
    "pillow-draft1": lambda: partial(pillow_draft, factor=1),
    "fledge-full": partial(fledge, "full"),
    "fledge-scaled": partial(fledge, "scaled"),
    "simplejpeg": simplejpeg,
    "pyturbojpeg": pyturbojpeg,
    "pyvips": pyvips_shrink,
    "pyvips-thumbnail": pyvips_thumbnail,
    "imagecodecs": imagecodecs,
    "torchvision": torchvision,
    "torchcodec": torchcodec,
}


def main() -> None:
    """Answer the lines on stdin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=DECODERS)
    parser.add_argument("packages", nargs="*", help="whose versions and licences are printed")
    options = parser.parse_args()
    # What a library prints must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        decoder = DECODERS[options.name]()
        probe = io.BytesIO()
        Image.new("RGB", (64, 64)).save(probe, "JPEG")
        decoder(probe.getvalue())  # loads what is loaded at the first use
        found: Any = {"packages": [about(name) for name in options.packages]}
    except Exception as error:  # whatever a package that doesn't work here raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = {"failed": lines[0]}
    print(json.dumps(found), file=answers, flush=True)
    for line in sys.stdin:
        verb, file, *rest = json.loads(line)
        data = Path(file).read_bytes()
        answer: Any = None
        if verb == "time":
            answer = [milliseconds(decoder, data) for _ in range(rest[0])]
        elif verb == "save":
            np.save(rest[0], decoder(data))
        else:
            answer = peak(decoder, data)
        print(json.dumps(answer), file=answers, flush=True)


def about(package: str) -> list[str]:
    """Name, version and licence of an installed package."""
    info = metadata.metadata(package)
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in info.get_all("Classifier") or []
        if value.startswith("License")
    ]
    licence = info["License-Expression"] or ", ".join(classifiers) or info["License"] or "?"
    return [package, info["Version"], licence.splitlines()[0]]


def milliseconds(decoder: Decoder, data: bytes) -> float:
    """CPU time of one run: on one core the time that it takes there alone."""
    children, begun = _cpu_of_children(), time.process_time()
    decoder(data)
    own = time.process_time() - begun
    return 1000 * (own + _cpu_of_children() - children)


def _cpu_of_children() -> float:
    """Seconds of the processes in which Fledge decodes very large images."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(one.user + one.system for one in times)


def peak(decoder: Decoder, data: bytes) -> float:
    """MB of one run above the memory before it; only right for the first large image.

    A process in which Fledge decodes is counted whole.
    """
    before = _reset_peak()
    decoder(data)
    children = [_memory(child.pid)[1] for child in psutil.Process().children()]
    return (_memory()[1] + sum(children) - before) / 1e6


def _reset_peak() -> int:
    """Bytes of memory; the peak starts anew here, where the system can do that (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return _memory()[1]
    clear.write_text("5")
    return _memory()[0]


def _memory(pid: int | str = "self") -> tuple[int, int]:
    """Bytes of resident memory: now and at most."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, most = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now, most
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most, most


if __name__ == "__main__":
    main()
