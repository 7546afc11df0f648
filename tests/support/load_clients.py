"""Clients that send requests without a pause, and the outcome of each request."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable

CLIENTS = 8
REFUSED = "refused"


def outcomes_around(
    port: int, data: bytes, stop: Callable[[], None]
) -> tuple[Counter[str], Counter[str]]:
    """Outcomes of the requests that began before `stop` was called, and of those after it.

    `stop` is called when each client has had an answer, so each has another request in flight.
    An outcome is the status of a response; or REFUSED, after which a client ends; or the error.
    Every second client keeps its connection open for as long as the service does.
    """
    outcomes: list[tuple[float, str]] = []
    answered = [threading.Event() for _ in range(CLIENTS)]
    deadline = time.monotonic() + 60

    def run_client(number: int) -> None:
        keep = number % 2 == 0
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while time.monotonic() < deadline:
            begun = time.monotonic()
            outcome = _post(connection, data)
            outcomes.append((begun, outcome))
            answered[number].set()
            if outcome == REFUSED:
                return
            if not keep:
                connection.close()

    clients = [threading.Thread(target=run_client, args=(i,)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for one in answered:
        one.wait(60)
    stopped = time.monotonic()
    stop()
    for client in clients:
        client.join()
    return (
        Counter(outcome for begun, outcome in outcomes if begun < stopped),
        Counter(outcome for begun, outcome in outcomes if begun >= stopped),
    )


def _post(connection: http.client.HTTPConnection, data: bytes) -> str:
    try:
        if connection.sock is None:
            connection.connect()
    except ConnectionRefusedError:
        return REFUSED
    except OSError as error:
        return f"connecting: {error!r}"
    try:
        connection.request("POST", "/predict", data)
        response = connection.getresponse()
        response.read()  # closes the connection if the service asks for it
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return repr(error)
    return str(response.status)
