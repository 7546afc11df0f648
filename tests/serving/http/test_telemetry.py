"""Spans of the routes of `App` reach a real OTLP receiver if tracing is on."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serving.http.telemetry import traced
from tests.support.live_server import get, live, post
from tests.support.tiny_bundle import photo, tiny_bundle

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Span]]]:
    """The URL of an OTLP receiver, and the spans that it has received."""
    spans: list[Span] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_of_the_clients_trace(receiver: tuple[str, list[Span]], tmp_path: Path):
    address, spans = receiver
    options = {"exporter_type": "otlp", "sample_rate": 1.0}
    options |= {"otlp.protocol": "http", "otlp.endpoint": address}
    config = " ".join(
        f"services.tracing.{name}={json.dumps(value)}" for name, value in options.items()
    )
    folder = tiny_bundle(tmp_path / "bundle")
    with live(folder, tmp_path / "log", BENTOML_CONFIG_OPTIONS=config) as server:
        url = f"{server.url}/predict"
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        assert post(url, photo(1), headers).status_code == 200
        assert post(url, b"no image", headers).status_code == 415
        get(f"{server.url}/livez")
        server.stop()  # exports the buffered spans
    own = [span for span in spans if span.trace_id.hex() == TRACE]
    assert {span.name for span in own} == {"POST /predict"}
    statuses = [
        item.value.int_value
        for span in own
        for item in span.attributes
        if item.key in ("http.status_code", "http.response.status_code")
    ]
    assert sorted(statuses) == [200, 415]
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line[:1] == "{"]
    logged = [line for line in lines if line["path"] == "/predict"]
    assert [line["trace"] for line in logged] == [TRACE, TRACE]


def test_without_tracing_there_is_no_middleware():
    async def app(scope, receive, send) -> None: ...

    assert traced(app) is app
