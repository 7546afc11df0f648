"""Start Ray on a machine that is too busy for Ray's own time limits."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import psutil

Started = TypeVar("Started")

LATE = "timed out during startup"
"""Part of Ray's error when one of its processes needs more than 30 s. No option changes this."""
ATTEMPTS = 5
COVERAGE = "COVERAGE_PROCESS_CONFIG"
"""With this variable Ray's own processes are measured, too, and start slowly."""
PORTS = {
    "metrics_agent_port": "--dashboard-agent-grpc-port",
    "metrics_export_port": "--metrics-export-port",
    "dashboard_agent_listen_port": "--dashboard-agent-listen-port",
    "runtime_env_agent_port": "--runtime-env-agent-port",
}
"""Ports of Ray's agents, and the options of `ray start` for them.

Where a port is not given, Ray waits only 15 s for the agent to choose it.
"""


def free_ports() -> list[int]:
    """Return a free port for each of `PORTS`."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in bound:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in bound]


def patient(start: Callable[[], Started]) -> Started:
    """Call `start`; while Ray is too late, end what it left behind and call `start` again.

    This process must have no other child processes.
    """
    os.environ.pop(COVERAGE, None)
    _give_ports()
    for _ in range(ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:
            if LATE not in str(error):
                raise
            left = psutil.Process().children(recursive=True)
            for process in left:
                process.kill()
            psutil.wait_procs(left)
    return start()


def _give_ports() -> None:
    from ray._private.parameter import RayParams

    init = RayParams.__init__

    def with_ports(self: RayParams, *given: Any, **options: Any) -> None:
        for name, port in zip(PORTS, free_ports(), strict=True):
            options[name] = options.get(name) or port
        init(self, *given, **options)

    RayParams.__init__ = with_ports  # type: ignore[method-assign]
