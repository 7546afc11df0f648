"""What the service needs of the container's memory, and what that leaves for requests."""

from __future__ import annotations

import resource
from typing import Final, NamedTuple

from serving.bundle.manifest import Manifest, measured_max_batch
from serving.errors import BundleError, OptionError
from serving.imaging import isolated
from serving.inference.admission import EXTRA_THREADS
from serving.server import connection_limits, log_queue
from serving.settings import Settings
from serving.utils.memory import container_memory, free_memory

LEAST_MEMORY: Final = 2**26
"""Least budget of a worker for requests, in bytes. An image of 6 megapixels fits into a half of it.
"""

_PROCESS_BYTES: Final = 136 * 2**20  # a worker without a model; BentoML's launcher has as much
_GRAPH_COPIES: Final = 2.5  # of the graph file in a session: the weights, and a packed copy
_ROW_FLOATS: Final = 16  # values between the layers for each value of the input
_MARGIN: Final = 16  # part of the limit for /tmp, the page cache and what the allocator keeps
_MB: Final = 2**20


class MemoryNeeds(NamedTuple):
    """Bytes that the service needs at most; see `memory_needs`."""

    processes: int
    model: int
    update: int
    runs: int
    decoders: int
    connections: int
    log: int
    margin: int
    requests: int

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(self)


def memory_needs(
    settings: Settings, manifest: Manifest, limit: int, base: int | None = None
) -> MemoryNeeds:
    """Return what the service needs at most, in bytes.

    The terms, each for all workers together:

    processes: Python and the modules of each worker; with several workers also BentoML's launcher.
    model: The sessions of the graph. There are two where a lone request may use all cores.
    update: The new model beside the old one, while a new version of the bundle takes over. 0 where
        there is no room for it: `check_update` refuses the new version.
    runs: Values between the layers, for the rows of a run in each thread; and decoded images that
        wait for a run.
    decoders: Idle decoder processes.
    connections: Each with a head of a usual size, and the memory that larger heads, and responses
        that are not read, share.
    log: Lines that wait for the log's reader.
    margin: A sixteenth of the limit.
    requests: Bodies, with the images that are decoded from base64 in them, and the decoding of
        images: FLEDGE_MAX_MEMORY, or what is left, at least `LEAST_MEMORY` for each worker.

    The child process that tries a bundle takes a part of what is free, and is the first to be ended
    where that is not enough. On a GPU, the driver's memory is not included.

    Args:
        settings: Settings of the service.
        manifest: Manifest of the bundle.
        limit: Bytes that the service may take.
        base: Bytes that a worker had without its model, as measured. None: an estimate.
    """
    workers, threads = settings.workers, settings.threads
    cap = settings.max_batch or measured_max_batch(manifest, "cpu") or 1
    lanes = threads + EXTRA_THREADS + isolated.PROCESSES
    model = model_bytes(settings, manifest)
    processes = workers * (_PROCESS_BYTES if base is None else base)
    fixed = MemoryNeeds(
        processes=processes + (_PROCESS_BYTES if workers > 1 else 0),
        model=workers * model,
        update=workers * model,
        runs=workers
        * (lanes * cap * _row_bytes(manifest) + _waiting_bytes(settings, manifest, cap)),
        decoders=workers * isolated.PROCESSES * isolated.PROCESS_BYTES,
        connections=workers * _connection_bytes(settings),
        log=workers * log_queue.MAX_BYTES,
        margin=limit // _MARGIN,
        requests=0,
    )
    if limit - fixed.total < workers * LEAST_MEMORY:
        fixed = fixed._replace(update=0)
    left = max(LEAST_MEMORY, (limit - fixed.total) // workers)
    return fixed._replace(requests=workers * (settings.max_memory or left))


def model_bytes(settings: Settings, manifest: Manifest) -> int:
    """Estimate the memory of a loaded model from the size of its graph file."""
    names = [
        str(entry["file"])
        for precision, entry in manifest.precisions.items()
        if settings.precision in ("auto", precision)
    ]
    if settings.runtime == "torchscript" and manifest.torchscript:
        names = list(manifest.graphs)
    graph = max(manifest.files[name]["bytes"] for name in names)
    sessions = 2 if settings.threads > 1 else 1
    return int(sessions * (_GRAPH_COPIES * graph + _row_bytes(manifest)))


def _waiting_bytes(settings: Settings, manifest: Manifest, cap: int) -> int:
    """Return the bytes of decoded images that wait for a batch, if images are batched at all."""
    views = max(1, len(manifest.views))
    return settings.max_queue * views * 3 * manifest.preprocess.size**2 if cap > 1 else 0


def _row_bytes(manifest: Manifest) -> int:
    return _ROW_FLOATS * 4 * 3 * int(manifest.preprocess.size) ** 2


def _connection_bytes(settings: Settings) -> int:
    tls = settings.tls_cert is not None
    default = connection_limits.MAX_TLS_CONNECTIONS if tls else connection_limits.MAX_CONNECTIONS
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = connection_limits.possible_descriptors(*limits)
    most, _ = connection_limits.connections_for(descriptors, settings.max_connections or default)
    each = connection_limits.CONNECTION_BYTES + connection_limits.FREE_HEAD_BYTES
    if tls:
        each += connection_limits.TLS_BYTES
    unread = connection_limits.MAX_BLOCKED * connection_limits.SEND_BUFFER_BYTES
    unread += connection_limits.MAX_UNREAD_BYTES
    return most * each + connection_limits.SHARED_HEAD_BYTES + unread


def check_update(settings: Settings, manifest: Manifest) -> None:
    """Check whether there is room for a new version of the bundle beside the one that is served.

    Raises:
        BundleError: There is not.
    """
    needed, free = model_bytes(settings, manifest), free_memory()
    if needed > free:
        raise BundleError(
            f"{settings.bundle} can't be loaded beside the version in service: it takes "
            f"{needed // _MB} MB of memory, and {free // _MB} MB are free; restart the service"
        )


def request_memory(settings: Settings, manifest: Manifest, base: int) -> int:
    """Return the bytes that one worker may take for requests.

    Args:
        settings: Settings of the service.
        manifest: Manifest of the bundle that is served.
        base: Resident memory of this process when it began to serve, less `model_bytes`.
    """
    needs = memory_needs(settings, manifest, container_memory(), base)
    return needs.requests // settings.workers


def check(settings: Settings, manifest: Manifest, limit: int | None = None) -> str:
    """Compare what the service needs with what it may have; return a line that says both.

    Args:
        settings: Settings of the service.
        manifest: Manifest of the bundle.
        limit: Bytes that the service may take. None: `container_memory`.

    Raises:
        OptionError: It needs more, and FLEDGE_MAX_MEMORY is not set.
    """
    limit = container_memory() if limit is None else limit
    needs = memory_needs(settings, manifest, limit)
    if needs.total > limit and settings.max_memory is None:
        # Without `margin`, which grows with the limit.
        least = (needs.total - needs.margin) * _MARGIN // (_MARGIN - 1)
        raise OptionError(
            f"the service may need {-(-least // _MB)} MB of memory, and this container has "
            f"{limit // _MB} MB: give it more (docker run --memory), lower FLEDGE_WORKERS or "
            f"FLEDGE_MAX_CONNECTIONS, or set FLEDGE_MAX_MEMORY to the bytes for requests to start "
            "nevertheless"
        )
    terms = zip(needs._fields, needs, strict=True)
    listed = ", ".join(f"{name} {size // _MB}" for name, size in terms)
    more = ": more than there is" if needs.total > limit else ""
    return f"memory: at most {needs.total // _MB} MB of {limit // _MB} MB{more} ({listed})"
