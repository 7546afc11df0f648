"""Decode expensive or unusual images in processes that can be stopped.

    decode --request, file--> decoder process --pixels or error--> decode

A decoder process is started when the first such image comes, and kept. It has a limit of memory for
each image, and is killed when the image takes too long or is no longer needed. It reads requests
from its standard input and writes answers to its standard output:

    request: one line of JSON, then the encoded file
    answer: one line of JSON, then the pixels as uint8 [height, width, 3] or [views, size, size, 3]

No answer is trusted more than the image: its head is JSON, and its size is checked.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from serving.errors import BrokenImage, DeadlineExceeded, ImageError, TooLarge
from serving.utils.cpu import cores
from serving.utils.memory import Cancelled

PROCESSES: Final = max(1, cores() // 2)
"""Largest number of decoder processes."""

PROCESS_BYTES: Final = 48 * 2**20
"""Memory of a decoder process between two images."""

MAX_SECONDS: Final = 60.0
"""Time after which decoding one image is stopped where the caller sets no limit."""

_POLL_SECONDS: Final = 0.05
_ROOT: Final = Path(__file__).parent.parent.parent
_PIECE: Final = 2**20

Pixels = npt.NDArray[np.uint8]


class DecoderPool:
    """Decoder processes; each decodes one image at a time."""

    def __init__(self, processes: int = PROCESSES) -> None:
        """Create a pool without starting a process.

        Args:
            processes: Largest number of processes.
        """
        self._number = processes
        self._reset()
        # A forked process must not talk to the decoder processes of its parent.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._free = threading.Semaphore(self._number)
        self._idle: list[_Process] = []

    def decode(
        self,
        data: bytes,
        request: dict[str, Any],
        *,
        memory: int,
        seconds: float = MAX_SECONDS,
        cancelled: Callable[[], bool] = bool,
    ) -> tuple[Pixels, tuple[str, ...]]:
        """Decode one image in a decoder process; wait for a free process before.

        Args:
            data: The encoded file.
            request: `max_pixels` and `background` of `decode.decode`. With `preprocess` (the fields
                of `Preprocess`) and `views` (the fields of each `View`), the views are returned.
            memory: Bytes that decoding may take.
            seconds: Time until the process is killed, from now.
            cancelled: Function that returns True once the image is no longer needed.

        Returns:
            Pixels, and the names of the conversions that were applied.

        Raises:
            ImageError: As `decode.decode`. `TooLarge`: more memory than `memory` was needed.
            DeadlineExceeded: Decoding took longer than `seconds`.
            Cancelled: `cancelled` returned True.
        """
        end = time.monotonic() + seconds
        while not self._free.acquire(timeout=_POLL_SECONDS):
            _check(end, seconds, cancelled)
        try:
            process = self._idle.pop() if self._idle else _Process()
            try:
                answer = process.run(data, request, memory, end, seconds, cancelled)
            except BaseException:
                process.kill()
                raise
            self._idle.append(process)
        finally:
            self._free.release()
        return _result(*answer)

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            self._idle.pop().kill()


class _Process:
    """A running decoder process."""

    def __init__(self) -> None:
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        environ.pop("COVERAGE_PROCESS_CONFIG", None)  # its memory would not be the decoder's
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "serving.imaging.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,  # Ctrl-C in a terminal ends it through its closed input
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input: IO[bytes] = self._process.stdin
        self._output: IO[bytes] = self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)

    def run(
        self,
        data: bytes,
        request: dict[str, Any],
        memory: int,
        end: float,
        seconds: float,
        cancelled: Callable[[], bool],
    ) -> tuple[dict[str, Any], bytearray]:
        """Send one image and return the answer: its head, and the pixels.

        Raises:
            TooLarge: The process ended, for want of memory or by a fault of a decoder.
            DeadlineExceeded, Cancelled: As `DecoderPool.decode`.
        """
        head = json.dumps({**request, "memory": memory, "bytes": len(data)}).encode() + b"\n"
        pieces = [memoryview(head), memoryview(data)]
        received = bytearray()
        answer: dict[str, Any] | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._input, selectors.EVENT_WRITE)
            selector.register(self._output, selectors.EVENT_READ)
            while answer is None or len(received) < answer["bytes"]:
                _check(end, seconds, cancelled)
                for key, _ in selector.select(_POLL_SECONDS):
                    if key.fileobj is self._input:
                        if not self._send(pieces):
                            selector.unregister(self._input)
                        continue
                    piece = self._output.read(_PIECE)
                    if not piece:
                        raise TooLarge("decoding the image needs more memory than is allowed")
                    received += piece
                    if answer is None and b"\n" in received:
                        line, _, rest = bytes(received).partition(b"\n")
                        answer, received = _head(line), bytearray(rest)
        return answer, received

    def _send(self, pieces: list[memoryview]) -> bool:
        """Write as much as the pipe takes; return whether something is left."""
        try:
            written = os.write(self._input.fileno(), pieces[0][:_PIECE])
        except BlockingIOError:
            return True
        except BrokenPipeError:  # reading finds the end
            return False
        pieces[0] = pieces[0][written:]
        if not pieces[0]:
            pieces.pop(0)
        return bool(pieces)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()


def _check(end: float, seconds: float, cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled
    if time.monotonic() > end:
        raise DeadlineExceeded(f"decoding the image took more than {seconds:g} s")


def _head(line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
        size = 1
        for side in head.get("shape", [0]):
            size *= side
        return {**head, "bytes": size}
    except (ValueError, AttributeError, TypeError) as error:
        raise BrokenImage("the image is broken: its decoder gave no answer") from error


def _result(head: dict[str, Any], pixels: bytearray) -> tuple[Pixels, tuple[str, ...]]:
    if "error" in head:
        kinds = {kind.code: kind for kind in _subclasses(ImageError)}
        raise kinds.get(head["error"], BrokenImage)(str(head["message"])[:300])
    return np.frombuffer(pixels, np.uint8).reshape(head["shape"]), tuple(map(str, head["applied"]))


def _subclasses(kind: type[ImageError]) -> Sequence[type[ImageError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in _subclasses(child))]
