"""Ordered parallel map over a stream, with a bounded number of pending results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from serving.utils.cpu import cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    window: int = 0,
    name: str = "",
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in the order of the items, computed by threads.

    The first error of `function` or `items` is raised here and ends the map. Closing the
    generator drops the calls that have not started and waits for those that run.

    Args:
        function: Called by several threads at once.
        items: Read by the calling thread, as far ahead as `window` allows.
        workers: Number of threads; default: one for each core.
        window: Largest number of calls that are submitted and whose results are not yielded yet.
            A larger window hides slow calls and needs more memory. At least two for each thread.
        name: Prefix of the threads' names.
    """
    workers = workers or cores()
    window = max(window, 2 * workers)
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
