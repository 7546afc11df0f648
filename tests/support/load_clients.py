"""Callers who never pause, and what became of each of their requests."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable

CALLERS = 8
REFUSED = "refused"


def told_while(
    port: int, data: bytes, stop: Callable[[], None], *, before: float = 1.0
) -> tuple[Counter[str], Counter[str]]:
    """Outcomes of requests begun before `stop` was called, and after.

    An outcome is an answer's status, REFUSED where nobody listened any more, after which a caller
    goes home, or else what went wrong. Every second caller keeps his connection for as long as the
    service lets him.
    """
    told: list[tuple[float, str]] = []
    until = time.monotonic() + 60

    def call(keep: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while time.monotonic() < until:
            begun = time.monotonic()
            outcome = _ask(connection, data)
            told.append((begun, outcome))
            if outcome == REFUSED:
                return
            if not keep:
                connection.close()

    callers = [threading.Thread(target=call, args=(i % 2 == 0,)) for i in range(CALLERS)]
    for caller in callers:
        caller.start()
    time.sleep(before)
    stopped = time.monotonic()
    stop()
    for caller in callers:
        caller.join()
    return (
        Counter(outcome for begun, outcome in told if begun < stopped),
        Counter(outcome for begun, outcome in told if begun >= stopped),
    )


def _ask(connection: http.client.HTTPConnection, data: bytes) -> str:
    try:
        if connection.sock is None:
            connection.connect()
    except ConnectionRefusedError:
        return REFUSED
    except OSError as error:
        return f"connecting: {error!r}"
    try:
        connection.request("POST", "/predict", data)
        answer = connection.getresponse()
        answer.read()  # which closes the connection where the service said so
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return repr(error)
    return str(answer.status)
