"""`fledge` with small shards, which Ctrl-C interrupts however the tests were started.

python -m tests.support.ray_interrupt score …
"""

import signal
import sys

import fledge
from serving.scoring import journal, ray_backend, ray_cluster
from tests.support.ray_patience import patient

IMAGES = 50
"""Images of a shard."""

connect = ray_cluster.connect


def connect_patiently(device: str, workers: int | None) -> ray_cluster.ActorPool:
    """Connect as often as a busy machine needs."""

    def start() -> ray_cluster.ActorPool:
        ray_cluster.disconnect()  # of an attempt before
        return connect(device, workers)

    return patient(start)


if __name__ == "__main__":
    # A process that is started in the background inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    journal.SIZE = ray_backend.SIZE = IMAGES  # type: ignore[misc]
    ray_cluster.connect = connect_patiently
    sys.argv[0] = "fledge"
    fledge.program()
