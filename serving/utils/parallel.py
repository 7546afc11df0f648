"""Parallel `map` with threads: results in order, and a limited number of pending calls."""

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
    """Compute `function(item)` for all items in threads, and yield the results in order.

    The first error of `function` or `items` is raised to the consumer and ends the generator.
    Closing the generator cancels calls that have not started, and waits for running calls.

    Args:
        function: Function to call; several threads call it at the same time.
        items: Items, which the calling thread reads ahead by at most `window`.
        workers: Number of threads; None or 0: one per CPU core.
        window: Largest number of calls whose results have not been yielded. A larger window needs
            more memory, but a slow call then holds up fewer other calls. Values below two per
            thread are raised to two per thread.
        name: Prefix of the names of the threads.
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
