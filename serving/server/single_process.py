"""One worker needs no launcher: this process becomes BentoML's worker itself.

BentoML's launcher would import all that its worker imports, hold that memory, and then wait. What
it does for one worker is here: it has the socket, and it ends with 0 when it is told to stop. A
crash ends the service by itself.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from serving.utils.ending import end

ROOT: Final = Path(__file__).resolve().parents[2]
SERVICE: Final = "serving.service:ImageClassifier"


def serve(door: socket.socket, environ: Mapping[str, str], grace: int) -> NoReturn:
    """Serve until told to stop, then end this process with 0; with 1 where the server failed.

    Args:
        door: Bound already, and not listening yet.
        environ: What `serving.settings` reads; paths written out in full.
        grace: Seconds that requests in flight have after SIGTERM.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    hung_up = getattr(signal, "SIGHUP", None)
    if hung_up and signal.getsignal(hung_up) is not signal.SIG_IGN:  # `nohup` means it to stay
        signal.signal(hung_up, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    os.environ.update(environ)
    # One process keeps its metrics in memory; with this, in files that outlive a crash.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    # BentoML puts the current folder on the path; the operator's is not where modules come from.
    os.chdir(ROOT)
    gc.set_threshold(700, 10, 10)  # Python's own: a command ends before its garbage matters
    try:
        _work(door, grace)
    except SystemExit as error:  # uvicorn's, when it could not start
        end(1 if error.code else 0)
    except Exception:  # a fault of the server, and not of a command
        traceback.print_exc()
        end(1)
    end(0)


def _work(door: socket.socket, grace: int) -> None:
    from _bentoml_impl.worker.service import main  # type: ignore[import-untyped]
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.server.metrics.prometheus import PrometheusClient
    from prometheus_client import disable_created_metrics

    # As with several workers, where there are none.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    BentoMLContainer.metrics_client.set(PrometheusClient(multiproc=False))
    command = [SERVICE, "--fd", door.detach(), "--worker-id", 1]
    command += ["--timeout-graceful-shutdown", grace]
    main([*map(str, command)], standalone_mode=False)


def _stop(*_: Any) -> None:
    """End at once while it starts; later uvicorn has the signals, and repeats them when all ended.

    That is from within its event loop, which is to end in order.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Not by an exception: in the middle of an import one may be lost.
        end(0)
