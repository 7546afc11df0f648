"""Decode expensive or unusual images in processes that can be stopped.

    decode --request, file--> decoder process --pixels or error--> decode

A decoder process is started when the first such image comes, and kept. It has a limit of memory for
each image, and is killed when the image takes too long or is no longer needed. It reads requests
from its standard input and writes answers to its standard output:

    request: one line of JSON, then the encoded file
    answer: one line of JSON, then the pixels as uint8 [height, width, 3] or [views, size, size, 3]

No answer is trusted more than the image: its head is JSON of at most 64 KB, and its shape is
checked.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from serving.errors import BrokenImage, DeadlineExceeded, ImageError, TooLarge
from serving.imaging.preprocess import Box, Pixels
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
_MAX_HEAD: Final = 2**16  # bytes of the head of an answer
_NO_ANSWER: Final = "the image is broken: its decoder gave no answer"


class Answer(NamedTuple):
    """What a decoder process answers.

    Attributes:
        pixels: uint8 [height, width, 3], or [views, size, size, 3].
        applied, mode, size, area: As in `decode.Decoded`.
    """

    pixels: Pixels
    applied: tuple[str, ...]
    mode: str
    size: tuple[int, int]
    area: Box


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
        atexit.register(self.close)

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
    ) -> Answer:
        """Decode one image in a decoder process; wait for a free process before.

        Args:
            data: The encoded file.
            request: `max_pixels` and `preprocess` (its fields) of `decode.decode`, and `too_large`,
                the message where `memory` is not enough. With `views` (the fields of each `View`),
                the views are returned.
            memory: Bytes that decoding may take.
            seconds: Time until the process is killed, from when it begins.
            cancelled: Function that returns True once the image is no longer needed.

        Returns:
            The pixels, and what else `decode.Decoded` states.

        Raises:
            ImageError: As `decode.decode`. `TooLarge`: more memory than `memory` was needed, or no
                process could be started.
            DeadlineExceeded: Decoding took longer than `seconds`.
            Cancelled: `cancelled` returned True.
        """
        while not self._free.acquire(timeout=_POLL_SECONDS):
            if cancelled():
                raise Cancelled
        try:
            end = time.monotonic() + seconds
            idle = self._take()
            process = idle or _Process()
            try:
                answer = process.run(data, request, memory, end, cancelled)
            except _Ended:
                if idle is None:
                    raise
                # It may have ended between two images.
                process = _Process()
                answer = process.run(data, request, memory, end, cancelled)
            self._idle.append(process)
        except _Ended:
            raise _error_of(process.status, request["too_large"]) from None
        except _TimeUp:
            raise DeadlineExceeded(f"decoding the image took more than {seconds:g} s") from None
        except OSError as error:
            reason = error.strerror or error
            raise TooLarge(f"the process that decodes the image can't be used: {reason}") from error
        finally:
            self._free.release()
        return _result(*answer)

    def _take(self) -> _Process | None:
        """Return an idle process that runs, or None."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return None
            if process.status is None:
                return process
            process.kill()

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            self._idle.pop().kill()


class _Ended(Exception):
    """The decoder process has ended without an answer."""


class _TimeUp(Exception):
    """The time limit of an image has passed."""


class _Process:
    """A running decoder process."""

    def __init__(self) -> None:
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        environ.pop("COVERAGE_PROCESS_CONFIG", None)  # its memory would not be the decoder's
        # The threads of libde265 would leave address space reserved (64 MB each) that the next
        # image could use beyond its limit.
        environ["MALLOC_ARENA_MAX"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "serving.imaging.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environ,
            start_new_session=True,  # Ctrl-C in a terminal ends it through its closed input
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        return self._process.poll()

    def run(
        self,
        data: bytes,
        request: dict[str, Any],
        memory: int,
        end: float,
        cancelled: Callable[[], bool],
    ) -> tuple[dict[str, Any], bytearray]:
        """Send one image and return the answer: its head, and the pixels.

        After any exception the process can't be used any more; `kill` ends it.

        Raises:
            BrokenImage: The answer is not of the expected form.
            Cancelled, _Ended, _TimeUp: As their names say.
        """
        try:
            return self._exchange(data, request, memory, end, cancelled)
        except BaseException:
            self.kill()
            raise

    def _exchange(
        self,
        data: bytes,
        request: dict[str, Any],
        memory: int,
        end: float,
        cancelled: Callable[[], bool],
    ) -> tuple[dict[str, Any], bytearray]:
        head = json.dumps({**request, "memory": memory, "bytes": len(data)}).encode() + b"\n"
        pieces = [memoryview(head), memoryview(data)]
        received = bytearray()
        answer: dict[str, Any] | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._input, selectors.EVENT_WRITE)
            selector.register(self._output, selectors.EVENT_READ)
            while answer is None or len(received) < answer["bytes"]:
                if cancelled():
                    raise Cancelled
                if time.monotonic() > end:
                    raise _TimeUp
                for key, _ in selector.select(_POLL_SECONDS):
                    if key.fd == self._input:
                        if not self._send(pieces):
                            selector.unregister(self._input)
                        continue
                    piece = os.read(self._output, _PIECE)
                    if not piece:
                        raise _Ended
                    received += piece
                    if answer is None:
                        answer, received = _split_head(received, request)
        if len(received) > answer["bytes"] or pieces:
            raise BrokenImage(_NO_ANSWER)
        return answer, received

    def _send(self, pieces: list[memoryview]) -> bool:
        """Write as much as the pipe takes; return whether something is left."""
        try:
            written = os.write(self._input, pieces[0][:_PIECE])
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
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()


def _error_of(status: int | None, too_large: str) -> ImageError:
    """Return the error of an image whose decoder process has ended."""
    if status in (-signal.SIGKILL, 1):  # by the system, for want of memory
        return TooLarge(too_large)
    if status == -signal.SIGXCPU:
        limit = f"the {MAX_SECONDS:g} s of processor time that an image may take"
        return TooLarge(f"decoding the image takes more than {limit}")
    how = f"signal {-status}" if status and status < 0 else f"exit status {status}"
    return BrokenImage(f"the image is broken: its decoder ended with {how}")


def _split_head(
    received: bytearray, request: dict[str, Any]
) -> tuple[dict[str, Any] | None, bytearray]:
    """Split the head of an answer from its pixels, once it has arrived, and check it."""
    line, newline, rest = received.partition(b"\n")
    if not newline:
        if len(received) > _MAX_HEAD:
            raise BrokenImage(_NO_ANSWER)
        return None, received
    try:
        head = json.loads(line)
        if "error" in head:
            return {"error": str(head["error"]), "message": str(head["message"]), "bytes": 0}, rest
        shape = [side for side in head["shape"] if type(side) is int and side > 0]
        wide, tall = (side for side in head["size"] if type(side) is int and side > 0)
        fits = wide * tall <= request["max_pixels"]
        if "views" in request:
            size = request["preprocess"]["size"]
            fits &= shape == [len(request["views"]), size, size, 3]
        else:
            fits &= len(shape) == 3 and shape[0] * shape[1] <= request["max_pixels"]
        left, top, right, bottom = (float(edge) for edge in head["area"])
        if "views" not in request:
            fits &= 0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]
        if not fits or shape[-1] != 3 or len(shape) != len(head["shape"]):
            raise BrokenImage(_NO_ANSWER)
        applied, mode = tuple(map(str, head["applied"])), str(head["mode"])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise BrokenImage(_NO_ANSWER) from error
    told = {"size": (wide, tall), "area": (left, top, right, bottom)}
    answer = {"shape": shape, "applied": applied, "mode": mode, "bytes": math.prod(shape)}
    return answer | told, rest


def _result(head: dict[str, Any], pixels: bytearray) -> Answer:
    if "error" in head:
        kinds = {kind.code: kind for kind in _subclasses(ImageError)}
        raise kinds.get(head["error"], BrokenImage)(head["message"][:300])
    shaped = np.frombuffer(pixels, np.uint8).reshape(head["shape"])
    return Answer(shaped, head["applied"], head["mode"], head["size"], head["area"])


def _subclasses(kind: type[ImageError]) -> Sequence[type[ImageError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in _subclasses(child))]
