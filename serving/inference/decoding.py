"""Decode the images of concurrent requests within a budget of memory.

Most images are decoded in this process. An image that is expensive by its head, or that may need
more than its head states, is decoded in a process of its own, which is stopped when the image is no
longer needed. The two kinds have a half of the budget each, so that expensive images wait for each
other, and others don't wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

from serving.errors import TooLarge
from serving.imaging import isolated
from serving.imaging.cost import Cost
from serving.imaging.decode import LargerThanStated, memory_limit, memory_message
from serving.inference.predictor import Predictor, Prepared
from serving.utils.memory import MemoryBudget

Prepare = Callable[[bytes, int], Prepared]
PrepareIsolated = Callable[[bytes, int, Cost, Callable[[], bool]], Prepared]


request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request whose images are decoded and the address of its caller, for the log."""

_log = logging.getLogger("bentoml.fledge")


def log_isolated(size: int, cost: Cost, request: str) -> None:
    """Log an expensive image before it is decoded, so that it can be found after a crash."""
    _log.info(
        "request %s: %d x %d pixels in %d bytes are decoded in a process of their own, "
        "with at most about %d MB",
        *(request or "-", cost.width, cost.height, size, cost.bytes >> 20),
    )


class NeedsIsolation(Exception):
    """An image is too expensive or unusual to be decoded in this process.

    Attributes:
        cost: Estimate of what decoding costs.
    """

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost


class ImageDecoder(NamedTuple):
    """The two ways to decode an image: in this process, or in one that can be stopped.

    Attributes:
        prepare: Function of the encoded file and the number of TTA views; raises `NeedsIsolation`.
        prepare_isolated: Function of the same, the estimated cost, and a function that returns True
            once the image is no longer needed.
        threads: Number of threads that call `prepare_isolated`.
    """

    prepare: Prepare
    prepare_isolated: PrepareIsolated
    threads: int = isolated.PROCESSES


class DecodingBudget(NamedTuple):
    """Memory for decoding, which the engines of all models of a service share.

    Attributes:
        common: For images that are decoded in this process.
        expensive: For images that are decoded in processes of their own.
    """

    common: MemoryBudget
    expensive: MemoryBudget

    @classmethod
    def of(cls, memory: int) -> DecodingBudget:
        """Divide a number of bytes into two halves."""
        return cls(MemoryBudget(memory // 2), MemoryBudget(memory // 2))


def image_decoder(predictor: Predictor, max_pixels: int, budget: DecodingBudget) -> ImageDecoder:
    """Return the functions that decode images for a predictor.

    Args:
        predictor: Predictor of the model.
        max_pixels: Largest accepted width times height of an image.
        budget: Bytes that decoding may take, for all images in progress together.
    """
    common, expensive = budget

    def prepare(data: bytes, tta: int) -> Prepared:
        cost = predictor.estimate(data, tta, max_pixels=max_pixels)
        if cost.isolated or cost.bytes > common.total:
            raise NeedsIsolation(cost)  # whose limit of memory is that of its process
        with common.reserve(cost.bytes):
            try:
                return predictor.prepare(data, tta, max_pixels=max_pixels, estimated=cost)
            except LargerThanStated:
                raise NeedsIsolation(Cost(unusual=True)) from None

    def prepare_isolated(
        data: bytes, tta: int, cost: Cost, cancelled: Callable[[], bool]
    ) -> Prepared:
        size = memory_limit(cost, max_pixels)
        if cost.pixels and size > expensive.total:
            raise TooLarge(
                f"decoding {cost.width} x {cost.height} pixels may need {size >> 20} MB; "
                f"{expensive.total >> 20} MB are allowed (FLEDGE_MAX_MEMORY)"
            )
        setting = "FLEDGE_MAX_MEMORY" if size > expensive.total else ""
        size = min(size, expensive.total)
        with expensive.reserve(size, cancelled):
            return predictor.prepare_isolated(
                data,
                tta,
                max_pixels=max_pixels,
                memory=size,
                too_large=memory_message(cost, size, setting),
                cancelled=cancelled,
            )

    return ImageDecoder(prepare, prepare_isolated)
