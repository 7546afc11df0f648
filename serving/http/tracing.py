"""Spans for the routes of the model, by BentoML's own tracer and settings.

BentoML traces what passes its middleware, and the hot routes don't. So they get the same
OpenTelemetry middleware, with the same provider, sampler and exporter, but only where an operator
asked for traces: it costs a request more than all else that is not the model.
"""

from __future__ import annotations

from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.util.http import parse_excluded_urls

from serving.http.messages import ASGIApp

# What BentoML answers it traces itself; probes and scrapes are nobody's request.
_EXCLUDED = "/(livez|healthz|readyz|metrics|docs|docs.json|schema.json)$,/static_content/"

_FLUSH_MS = 5000


def traced(app: ASGIApp) -> ASGIApp:
    """`app` with a span a request where `services.tracing.sample_rate` is above 0, else `app`."""
    if not _asked_for():
        return app
    return OpenTelemetryMiddleware(
        app,
        excluded_urls=parse_excluded_urls(_EXCLUDED),
        tracer_provider=BentoMLContainer.tracer_provider.get(),
        # One span a request: those of each ASGI message say nothing that an operator asks for.
        exclude_spans=["receive", "send"],
    )


def flush() -> None:
    """Send what is not sent yet: a worker that ends would take it along."""
    if _asked_for():
        BentoMLContainer.tracer_provider.get().force_flush(_FLUSH_MS)


def trace_id() -> str:
    """The trace that the current request belongs to, 32 hexadecimal digits, or empty."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def _asked_for() -> bool:
    return bool(BentoMLContainer.tracing.sample_rate.get())
