"""What the tests of metrics and traces look through: a scraper, and a collector that speaks OTLP over HTTP."""

import gzip
import json
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;q=0.5"
SERVER, CLIENT = 2, 3
"""Kinds of spans."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scraped:
    """The metrics port of a gateway."""

    def __init__(self, metrics_port: int) -> None:
        self.metrics_port = metrics_port

    def get(self, path: str, accept: str = "text/plain") -> tuple[str, str]:
        """Body and content type."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics_port}{path}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode(), answer.headers["Content-Type"]

    def samples(self) -> Samples:
        """Every series, by name and labels."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[0])
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series that have these labels."""
        wanted = labels.items()
        return sum(value for (found, has), value in self.samples().items() if found == name and wanted <= has)

    def gains(self) -> Callable[..., float]:
        """What a counter, as in `value`, has gained since now."""
        before = self.samples()

        def gained(name: str, **labels: str) -> float:
            wanted = labels.items()
            return sum(
                value - before.get((found, has), 0)
                for (found, has), value in self.samples().items()
                if found == name and wanted <= has
            )

        return gained

    def status(self) -> dict[str, Any]:
        """What `redisgate top` shows."""
        found: dict[str, Any] = json.loads(self.get("/status")[0])
        return found


class Span:
    """One span that arrived."""

    def __init__(self, found: Any, resource: dict[str, Any]) -> None:
        self.name = found.name
        self.kind = found.kind
        self.trace_id = found.trace_id.hex()
        self.span_id = found.span_id.hex()
        self.parent = found.parent_span_id.hex()
        self.failed = found.status.code == 2
        self.nanos = found.end_time_unix_nano - found.start_time_unix_nano
        self.attributes = _values(found.attributes)
        self.resource = resource

    def __repr__(self) -> str:
        return f"<{self.name} {self.attributes}>"


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


class Collector:
    """Takes what is exported."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            resource = _values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans.extend(Span(span, resource) for span in scope.spans)

    def of(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
