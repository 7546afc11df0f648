"""The program of a decoder process; see `serving.imaging.isolated`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, Final

from PIL import Image

from serving.errors import ImageError, TooLarge
from serving.imaging import decode, plugins
from serving.imaging.isolated import MAX_SECONDS
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import View, render
from serving.utils import malloc
from serving.utils.process import be_ended_first, end_with_parent

NICE: Final = 10
"""Added to the niceness of the process, so that common images and the network are not slowed down.
"""

_SLACK: Final = 32 * 2**20
"""Bytes that the process may take beside those for the image, such as for the answer."""
_STRIP: Final = 2**20  # pixels that are written at once


def main() -> None:
    """Answer requests from the standard input until it is closed."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    malloc.return_large_blocks()
    os.nice(NICE)
    end_with_parent()
    be_ended_first()
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        if len(data) < request["bytes"]:
            return
        plugins.load(data)  # its libraries are not the image's memory
        limit_memory(request["memory"] + _SLACK)
        limit_cpu_seconds(MAX_SECONDS)
        _write(answers, data, request)
        del data
        malloc.trim()
        limit_memory(None)  # the next file may be larger


def _write(answers: IO[bytes], data: bytes, request: Mapping[str, Any]) -> None:
    strips: Iterator[bytes] = iter(())
    preprocess = Preprocess.from_dict(request["preprocess"])
    try:
        decoded = decode.decode_here(
            data,
            max_pixels=request["max_pixels"],
            preprocess=preprocess,
            too_large=request["too_large"],
        )
        if "views" in request:
            views = [View(*view) for view in request["views"]]
            pixels = render(decoded.image, preprocess, views, decoded.area)
            shape, strips = pixels.shape, iter([pixels.tobytes()])
        else:
            shape, strips = (decoded.image.height, decoded.image.width, 3), _strips(decoded.image)
        head: dict[str, Any] = {
            **{"shape": shape, "applied": decoded.applied, "mode": decoded.mode},
            **{"size": decoded.size, "area": decoded.area},
        }
    except ImageError as error:
        head = {"error": error.code, "message": str(error)}
    except MemoryError:
        head = {"error": TooLarge.code, "message": request["too_large"]}
    answers.write(json.dumps(head).encode() + b"\n")
    answers.writelines(strips)
    answers.flush()


def _strips(image: Image.Image) -> Iterator[bytes]:
    """Yield the pixels of an image some rows at a time, so that they are not copied at once."""
    step = max(1, _STRIP // image.width)
    for top in range(0, image.height, step):
        yield image.crop((0, top, image.width, min(top + step, image.height))).tobytes()


def limit_memory(more: int | None) -> None:
    """Limit the address space of this process to what it has now and `more` bytes.

    An allocation beyond the limit fails in this process alone. Does nothing where the system
    doesn't say how much a process has (macOS).

    Args:
        more: Number of bytes; None for no limit.
    """
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = hard if more is None else pages * resource.getpagesize() + more
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def limit_cpu_seconds(more: float) -> None:
    """Limit the CPU time of this process to what it has taken and `more` seconds."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + more) + 2, hard))


if __name__ == "__main__":
    main()
