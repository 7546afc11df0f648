"""Prometheus metrics, the access log, and OpenTelemetry spans of the service.

`Telemetry` registers the metrics, which BentoML reports at `/metrics`, and writes one JSON line per
request to the access log.

`traced` wraps the ASGI app `App` in OpenTelemetry's middleware. BentoML's own tracing covers only
requests that are passed on to BentoML. The spans go to BentoML's tracer provider, which is
configured under `services.tracing`. If tracing is off, no middleware is added, because the
middleware takes more time per request than all other work except the model.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.util.http import parse_excluded_urls
from prometheus_client import Counter, Gauge, Histogram

from serving.http.messages import ASGIApp
from serving.server import bentoml_compat, log_queue

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4, 8, 16)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

CLASSES: Final = 100
"""Number of classes with a metric of their own; predictions of the others count as `other`."""

# Paths without spans here: BentoML traces its own routes, and probes and scrapes need no span.
_UNTRACED: Final = "/(livez|healthz|readyz|metrics|docs|docs.json|schema.json)$,/static_content/"
_MAX_PATH: Final = 2048
"""Characters of a path in the access log."""
_FLUSH_MS: Final = 5000


class Telemetry:
    """The metrics and the access log of this process.

    BentoML's `/metrics` combines the metrics of all workers. Create one instance in each worker,
    not in the launcher: prometheus_client reads the variable PROMETHEUS_MULTIPROC_DIR when it is
    imported, and BentoML sets this variable just before it starts several workers.

    The values of metric labels are constants or come from a bundle, never from a request. Their
    number is therefore bounded.
    """

    def __init__(self) -> None:
        self._outcomes = Counter(
            "fledge_requests", "Images by outcome: ok, or the code of the error", ["outcome"]
        )
        self._latency = Histogram(
            "fledge_latency_seconds", "Seconds per image, by phase", ["phase"], buckets=_SECONDS
        )
        self._rows = Histogram("fledge_batch_rows", "Rows per run of the graph", buckets=_ROWS)
        self._model = Gauge(
            "fledge_model",
            "1 for the model that is served, 0 for earlier ones",
            ["model", "precision", "provider"],
            multiprocess_mode="livemax",
        )
        self._refused = Counter("fledge_bundles_refused", "New bundles that could not be served")
        phases = ("read", "queue", "decode", "infer", "total")
        self._phases: dict[str, Callable[[float], None]] = {
            phase: self._latency.labels(phase).observe for phase in phases
        }
        self._phases["rows"] = self._rows.observe
        self._phases["waiting"] = Gauge(
            "fledge_images_waiting",
            "Images accepted and not answered yet",
            multiprocess_mode="livesum",
        ).set
        self._phases["overdue"] = Gauge(
            "fledge_overdue",
            "Threads that work on an image whose request has ended",
            multiprocess_mode="livesum",
        ).set
        self._probability = Histogram(
            "fledge_probability", "Probability of the best class", buckets=_SHARES
        ).observe
        self._predictions = Counter(
            "fledge_predictions",
            f"Predictions by best class, for the first {CLASSES} classes",
            ["class"],
        )
        self._out_of_distribution = Counter(
            "fledge_out_of_distribution", "Images flagged as out of distribution"
        ).inc
        self._refused_connections = Counter(
            "fledge_connections_refused", "Connections refused or closed, by reason", ["reason"]
        )
        self._by_label: dict[str, Counter] = {}
        dropped = Counter("fledge_log_dropped", "Log lines dropped because the log was not read")
        log_queue.on_drop(dropped.inc)
        self._log = _access_log()

    def observe(self, phase: str, value: float) -> None:
        """Record a duration or a count.

        Args:
            phase: Name of the metric. `read`, `queue`, `decode`, `infer` and `total` are durations;
                `rows` (the batch size of a run), `waiting` (images not answered yet) and `overdue`
                (threads whose request has ended) are counts.
            value: Seconds for a duration, else the count.
        """
        self._phases[phase](value)

    def count(self, outcome: str) -> None:
        """Count one image by its outcome: "ok" or an error code."""
        self._outcomes.labels(outcome).inc()

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Record the answer for one image in the metrics.

        The metrics are the number of answers for each best class, the distribution of the best
        class's probability, and the number of answers with `out_of_distribution` set.

        Args:
            answer: JSON object from `Predictor.answer`.
        """
        self.count("ok")
        best = answer["predictions"][0]
        self._probability(best["probability"])
        counter = self._by_label.get(best["label"])
        (counter or self._predictions.labels("other")).inc()
        if answer["out_of_distribution"]:
            self._out_of_distribution()

    def serving(self, model: str, precision: str, provider: str, labels: Sequence[str]) -> None:
        """Mark a model as served.

        Args:
            model: The model as NAME:VERSION.
            precision: Precision of the model's graph, such as fp32.
            provider: Execution provider that runs the graph.
            labels: Class names. Each of the first `CLASSES` classes gets a counter of its own;
                all other classes share one.
        """
        self._by_label = {label: self._predictions.labels(label) for label in labels[:CLASSES]}
        self._model.labels(model, precision, provider).set(1)

    def retired(self, model: str, precision: str, provider: str) -> None:
        """Mark a model as no longer served; the arguments are those of `serving`."""
        self._model.labels(model, precision, provider).set(0)

    def refused(self) -> None:
        """Count a bundle that could not be served."""
        self._refused.inc()

    def refused_connection(self, reason: str) -> None:
        """Count a connection that was refused or closed, by a label of `connection_limits`."""
        self._refused_connections.labels(reason).inc()

    def log(
        self,
        request_id: str,
        method: str,
        path: str,
        status: int,
        code: str,
        seconds: float,
        client: str = "",
    ) -> None:
        """Write one request to the access log, as a JSON line.

        The line of a traced request has the trace id in the field `trace`.

        Args:
            request_id: Id of the request.
            method: HTTP method.
            path: Path of the request.
            status: HTTP status of the response.
            code: "ok" or an error code.
            seconds: Time from the request's headers to the response.
            client: Address of the caller; "" if it is not known.
        """
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": request_id,
            "method": method,
            "path": path[:_MAX_PATH],
            "status": status,
            "code": code,
            "ms": round(seconds * 1000, 2),
            "client": client,
        }
        if trace := trace_id():
            line["trace"] = trace
        self._log.info(json.dumps(line))


def _access_log() -> logging.Logger:
    log = logging.getLogger("fledge.access")
    if not log.handlers:  # a logging configuration of the user takes precedence
        handler = log_queue.handler(sys.stdout) or logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log


def traced(app: ASGIApp) -> ASGIApp:
    """Wrap `app` in middleware that creates one span per request, if tracing is on."""
    if not _tracing_is_on():
        return app
    return OpenTelemetryMiddleware(
        app,
        excluded_urls=parse_excluded_urls(
            ",".join(filter(None, (_UNTRACED, bentoml_compat.tracing_excluded_urls())))
        ),
        tracer_provider=bentoml_compat.tracer_provider(),
        # One span per request, without a span for each ASGI message.
        exclude_spans=["receive", "send"],
    )


def flush_spans() -> None:
    """Export the spans that are still buffered. Call this function before the worker exits."""
    if _tracing_is_on():
        bentoml_compat.tracer_provider().force_flush(_FLUSH_MS)


def trace_id() -> str:
    """Return the trace id of the current request: 32 hex digits, or "" if it is not traced."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def _tracing_is_on() -> bool:
    return bentoml_compat.tracing_sample_rate() > 0
