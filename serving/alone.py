"""One worker needs no launcher: this process becomes BentoML's worker itself.

BentoML's launcher would import all that its worker imports, hold that memory, and then wait. What
it does for one worker is here: it holds the listening socket, and it ends with 0 when it is told
to stop. A crash ends the service by itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

_ROOT: Final = Path(__file__).resolve().parent.parent
_SERVICE: Final = "serving.service:ImageClassifier"


def serve(door: socket.socket, environ: Mapping[str, str], grace: int) -> NoReturn:
    """Serve until told to stop, then end this process with 0.

    Args:
        door: Listens already.
        environ: What `serving.settings` reads; paths written out in full.
        grace: Seconds that requests in flight have after SIGTERM.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    os.environ.update(environ)
    # One process keeps its metrics in memory; with this, in files that outlive a crash.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    # BentoML puts the current folder on the path; the operator's is not where modules come from.
    os.chdir(_ROOT)

    from _bentoml_impl.worker.service import main  # type: ignore[import-untyped]
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.server.metrics.prometheus import PrometheusClient
    from prometheus_client import disable_created_metrics

    # As with several workers, where there are none.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    BentoMLContainer.metrics_client.set(PrometheusClient(multiproc=False))
    command = [_SERVICE, "--fd", door.detach(), "--timeout-graceful-shutdown", grace]
    main(list(map(str, command)), standalone_mode=False)
    sys.exit(0)


def _end(*_: Any) -> None:
    """End at once while it starts; later uvicorn has the signals, and repeats them when all ended.

    That is from within its event loop, which is to end in order.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        sys.exit(0)
