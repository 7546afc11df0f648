"""What operators see: counters in BentoML's `/metrics`, and one JSON line a request in the log."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from prometheus_client import Counter, Gauge, Histogram

from serving.http.tracing import trace_id

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4, 8, 16)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

CLASSES: Final = 100
"""Classes that have a counter of their own; the others share one."""


class Telemetry:
    """This process's metrics; BentoML's `/metrics` adds those of all workers up.

    Make it once, in the worker: prometheus_client looks for its shared folder when imported, and
    BentoML names that folder just before it starts several workers. No label comes from a caller:
    they are of a fixed set, or of a bundle, of which few are served in a process's life.
    """

    def __init__(self) -> None:
        """Register the metrics."""
        self._outcomes = Counter(
            "fledge_requests", "Images by outcome: ok or an error's code", ["outcome"]
        )
        self._latency = Histogram(
            "fledge_latency_seconds", "Seconds an image by phase", ["phase"], buckets=_SECONDS
        )
        self._rows = Histogram("fledge_batch_rows", "Rows of one run of the graph", buckets=_ROWS)
        self._model = Gauge(
            "fledge_model",
            "1 for what is served, 0 for what was",
            ["model", "precision", "provider"],
            multiprocess_mode="livemax",
        )
        self._refused = Counter("fledge_bundles_refused", "Bundles that could not be served")
        phases = ("read", "queue", "decode", "infer", "total")
        self._phases: dict[str, Callable[[float], None]] = {
            phase: self._latency.labels(phase).observe for phase in phases
        }
        self._phases["rows"] = self._rows.observe
        self._phases["waiting"] = Gauge(
            "fledge_images_waiting", "Images held unanswered", multiprocess_mode="livesum"
        ).set
        self._probability = Histogram(
            "fledge_probability", "Probability of the best class", buckets=_SHARES
        ).observe
        self._classes = Counter(
            "fledge_predictions", f"Answers by best class, of the first {CLASSES}", ["class"]
        )
        self._strange = Counter("fledge_out_of_distribution", "Answers flagged as strange").inc
        self._known: dict[str, Counter] = {}
        self._log = _access_log()

    def observe(self, phase: str, value: float) -> None:
        """Seconds of a phase (read, queue, decode, infer, total); or a count: `rows`, `waiting`."""
        self._phases[phase](value)

    def count(self, outcome: str) -> None:
        """One image answered (`ok`) or refused (the error's code)."""
        self._outcomes.labels(outcome).inc()

    def answered(self, answer: Mapping[str, Any]) -> None:
        """One image answered: count it, its best class and how sure the model was."""
        self.count("ok")
        best = answer["predictions"][0]
        self._probability(best["probability"])
        counter = self._known.get(best["label"])
        (counter or self._classes.labels("other")).inc()
        if answer["out_of_distribution"]:
            self._strange()

    def serving(self, model: str, precision: str, provider: str, labels: Sequence[str]) -> None:
        """Say what is served now; its first classes are counted by name."""
        self._known = {label: self._classes.labels(label) for label in labels[:CLASSES]}
        self._model.labels(model, precision, provider).set(1)

    def retired(self, model: str, precision: str, provider: str) -> None:
        """Say what is served no more."""
        self._model.labels(model, precision, provider).set(0)

    def refused(self) -> None:
        """Count a bundle that could not be served."""
        self._refused.inc()

    def log(
        self, request_id: str, method: str, path: str, status: int, code: str, seconds: float
    ) -> None:
        """The access log's line; `trace` is there while the request is traced."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": request_id,
            "method": method,
            "path": path,
            "status": status,
            "code": code,
            "ms": round(seconds * 1000, 2),
        }
        if trace := trace_id():
            line["trace"] = trace
        self._log.info(json.dumps(line))


def _access_log() -> logging.Logger:
    log = logging.getLogger("fledge.access")
    if not log.handlers:  # another process-wide set-up may have brought its own
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
