"""Traces by OpenTelemetry, exported as OTLP over HTTP: the extra `tracing`.

Stands before the gateway where `trace_endpoint` is set; without it nothing of
this runs or is loaded. A request is traced when its traceparent says so, or by
lot: then it has a span of its own, one for Redis, and one for each SQL
statement it led to. Spans leave by a thread of the library, from a queue that
drops what does not fit.

A trace costs several times what a command does, so not everybody may ask for
one: whose credential is known may, and who comes by a trusted proxy, and all
of them together `MAX_WANTED_TRACES` times a second. Others are left to the lot.

    https://www.w3.org/TR/trace-context/
    https://opentelemetry.io/docs/specs/semconv/http/http-spans/
    https://opentelemetry.io/docs/specs/semconv/database/redis/
"""

import asyncio
import contextlib
import importlib.util
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import redisgate
from redisgate.config import ConfigError, Settings
from redisgate.counters import PIPELINE, TRANSACTION
from redisgate.logs import safe_target

if TYPE_CHECKING:
    from redisgate.access import Backend
    from redisgate.exchange import Exchange
    from redisgate.http_head import Head
    from redisgate.http_protocol import AccessLog, Handler, HttpConnection

MAX_WAITING_SPANS: Final = 4096
"""Of one process that wait to be exported; more are dropped."""
EXPORT_SECONDS: Final = 1.0
"""Between two exports."""
EXPORT_TIMEOUT: Final = 5.0
"""For the collector to take one."""
STOP_SECONDS: Final = 2.0
"""For the last spans to leave when a worker stops."""
MAX_WANTED_TRACES: Final = 100
"""Of one worker in a second because clients want them; beyond it the lot decides."""
MAX_QUERY_LENGTH: Final = 1000
"""Characters of a statement that its span shows; it has no values, since those are parameters."""

_CURRENT: ContextVar["Trace | None"] = ContextVar("redisgate_trace", default=None)
_tracer: Any = None  # of this process


def check(settings: Settings) -> None:
    """Refuse to start without what is needed. Raises ConfigError."""
    if settings.trace_endpoint and importlib.util.find_spec("opentelemetry.exporter") is None:
        raise ConfigError("trace_endpoint is set, but OpenTelemetry is not installed: pip install redisgate[tracing]")


def enabled() -> bool:
    """Whether this process traces at all."""
    return _tracer is not None


class Trace:
    """One request that is traced."""

    __slots__ = ("header", "redis", "span", "trace_id")

    def __init__(self, span: Any, header: bytes) -> None:
        self.span = span
        self.redis: Any = None  # the span of what was sent to Redis
        self.header = header
        """A header line that tells the client of a trace that we began."""
        self.trace_id = b"%032x" % span.get_span_context().trace_id
        """32 hexadecimal digits."""


def _start_provider(settings: Settings, who: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    global _tracer
    resource = Resource.create(
        {
            "service.name": "redisgate",
            "service.version": redisgate.__version__,
            "service.instance.id": f"{socket.gethostname()}/{os.getpid()}",
            "redisgate.process": who,
        }
    )
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    url = f"{settings.trace_endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT),
            max_queue_size=MAX_WAITING_SPANS,
            schedule_delay_millis=EXPORT_SECONDS * 1000,
            export_timeout_millis=EXPORT_TIMEOUT * 1000,
        )
    )
    _tracer = provider.get_tracer("redisgate", redisgate.__version__)
    return provider


async def _stop_provider(provider: Any) -> None:
    global _tracer
    _tracer = None
    leaving = asyncio.get_running_loop().run_in_executor(None, provider.force_flush, int(STOP_SECONDS * 1000))
    await asyncio.wait([leaving], timeout=STOP_SECONDS)


@contextlib.asynccontextmanager
async def process(settings: Settings, who: str) -> AsyncIterator[None]:
    """Trace what a process that serves no requests does, where the settings want it."""
    if not settings.trace_endpoint:
        yield
        return
    provider = _start_provider(settings, who)
    try:
        yield
    finally:
        await _stop_provider(provider)


@contextlib.contextmanager
def work(name: str, **attributes: str) -> Iterator[None]:
    """A span for a piece of work that no request asked for, and what it leads to; always traced, since it is rare."""
    if _tracer is None:
        yield
        return
    span = _tracer.start_span(name, attributes={key.replace("_", "."): value for key, value in attributes.items()})
    token = _CURRENT.set(Trace(span, b""))
    try:
        yield
    except BaseException as error:
        from opentelemetry.trace import StatusCode

        span.set_attribute("error.type", type(error).__name__)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        _CURRENT.reset(token)
        span.end()


class Tracing:
    """Stands before the gateway and behind the answers of one worker; `settings.trace_endpoint` is set.

    See `redisgate.http_protocol.Handler` and `AccessLog`: all answers leave the way that this hears of.
    """

    def __init__(
        self,
        handler: "Handler",
        access_log: "AccessLog | None",
        settings: Settings,
        who: str,
        trusts: Callable[["HttpConnection", bytes, "Head"], bool],
    ) -> None:
        """`trusts` says whether the sender of a request (its target, its head) may want it traced."""
        from opentelemetry import trace

        self._provider = _start_provider(settings, who)
        self._api = trace
        self._handler = handler
        self._access_log = access_log
        self._trusts = trusts
        self._wanted = 0  # traces that clients wanted and got in this second
        self._second = 0
        self._ratio = settings.trace_ratio
        self._scheme = "https" if settings.tls_cert_file else "http"

    # Requests

    def prepare(self, head: "Head") -> None:
        self._handler.prepare(head)

    def handle(self, connection: "HttpConnection", method: bytes, target: bytes, head: "Head", body: bytes) -> None:
        chosen = self._chosen(connection, target, head)
        connection.trace = found = self._begin(connection, method, target, head) if chosen else None
        token = _CURRENT.set(found)
        try:
            self._handler.handle(connection, method, target, head, body)
        finally:
            _CURRENT.reset(token)
            connection.trace = None

    def _chosen(self, connection: "HttpConnection", target: bytes, head: "Head") -> bool:
        if head.traceparent:
            if head.traceparent[-1] not in b"13579bdf":
                return False  # its sender knows that nobody wants it
            if self._may_want(connection, target, head):
                return True
        return random.random() < self._ratio

    def _may_want(self, connection: "HttpConnection", target: bytes, head: "Head") -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._wanted = second, 0
        if self._wanted >= MAX_WANTED_TRACES or not self._trusts(connection, target, head):
            return False
        self._wanted += 1
        return True

    def _begin(self, connection: "HttpConnection", method: bytes, target: bytes, head: "Head") -> Trace:
        api = self._api
        context = None
        if head.traceparent:
            _, trace_id, span_id, flags = head.traceparent.split(b"-")
            parent = api.SpanContext(
                int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=api.TraceFlags(int(flags, 16))
            )
            context = api.set_span_in_context(api.NonRecordingSpan(parent))
        peer = connection.transport.get_extra_info("peername")
        name = method.decode("latin-1")
        attributes = {
            "http.request.method": name,
            "url.scheme": self._scheme,
            "url.path": safe_target(target),
            "network.protocol.version": head.version[5:].decode("latin-1"),
            "server.address": head.host.decode("latin-1"),
        }
        if isinstance(peer, tuple):
            attributes["network.peer.address"] = str(peer[0])
        if head.request_id:
            attributes["redisgate.request_id"] = head.request_id.decode("ascii")
        span = _tracer.start_span(name, context=context, kind=api.SpanKind.SERVER, attributes=attributes)
        own = span.get_span_context()
        header = b"" if head.traceparent else b"Traceparent: 00-%032x-%016x-01\r\n" % (own.trace_id, own.span_id)
        return Trace(span, header)

    def submitted(self, exchange: "Exchange", backend: "Backend", payload: bytes) -> None:
        """A request's commands go to Redis now; for `Gateway.on_submit`."""
        found: Trace | None = exchange.trace
        if found is None or found.redis is not None:
            return
        address = backend.pool.address
        operation, size = _operation(exchange.route, payload), exchange.count
        attributes: dict[str, Any] = {
            "db.system.name": "redis",
            "db.operation.name": operation,
            "db.namespace": str(address.database),
            "server.address": address.path or address.host,
        }
        if not address.path:
            attributes["server.port"] = address.port
        if size > 1:
            attributes["db.operation.batch.size"] = size
        found.redis = _tracer.start_span(
            operation,
            context=self._api.set_span_in_context(found.span),
            kind=self._api.SpanKind.CLIENT,
            attributes=attributes,
        )
        found.span.update_name(f"{exchange.method.decode('latin-1')} {operation}")

    # Answers

    def slow(self, exchange: "Exchange", seconds: float) -> None:
        """See `redisgate.http_protocol.AccessLog`."""
        if self._access_log is not None:
            self._access_log.slow(exchange, seconds)

    def answered(self, exchange: "Exchange", status: int, answer: bytes) -> None:
        """See `redisgate.http_protocol.AccessLog`."""
        found: Trace | None = exchange.trace
        if found is not None:
            exchange.trace = None
            self._end(found, exchange, status)
        if self._access_log is not None:
            self._access_log.answered(exchange, status, answer)

    def _end(self, found: Trace, exchange: "Exchange", status: int) -> None:
        span, api = found.span, self._api
        if found.redis is not None:
            if status >= 400:
                found.redis.set_attribute("error.type", str(status))
                found.redis.set_status(api.StatusCode.ERROR)
            found.redis.end()
        span.set_attribute("http.response.status_code", status)
        if exchange.instance_id is not None:
            span.set_attribute("redisgate.instance", exchange.instance_id)
        if status >= 500:  # what the client did wrong is no error of a server
            span.set_attribute("error.type", str(status))
            span.set_status(api.StatusCode.ERROR)
        span.end()

    async def stop(self) -> None:
        """Let the last spans leave, for `STOP_SECONDS` at most."""
        await _stop_provider(self._provider)


def _operation(route: int, payload: bytes) -> str:
    """The name of what is sent: the command's, as a client might write it in any case, or of the several."""
    if route == PIPELINE:
        return "PIPELINE"
    if route == TRANSACTION:
        return "MULTI"
    # *<n>\r\n$<length>\r\n<name>\r\n
    name = payload.split(b"\r\n", 3)[2]
    return name[:64].decode("latin-1").upper()


# What the control plane tells


def name_route(method: str, route: str) -> None:
    """Name the request that is under way after its route."""
    found = _CURRENT.get()
    if found is not None:
        found.span.update_name(f"{method} {route}")
        found.span.set_attribute("http.route", route)


def on_query(record: Any) -> None:
    """One SQL statement has ended; for `asyncpg.Connection.add_query_logger`."""
    found = _CURRENT.get()
    if found is None or _tracer is None:
        return
    from opentelemetry import trace

    ended = time.time_ns()
    words = record.query.split(None, 1)
    operation = words[0].upper()[:32] if words else "SQL"
    span = _tracer.start_span(
        operation,
        context=trace.set_span_in_context(found.span),
        kind=trace.SpanKind.CLIENT,
        start_time=ended - int(record.elapsed * 1e9),
        attributes={
            "db.system.name": "postgresql",
            "db.operation.name": operation,
            "db.query.text": record.query[:MAX_QUERY_LENGTH],
        },
    )
    if record.exception is not None:
        span.set_attribute("error.type", type(record.exception).__name__)
        span.set_status(trace.StatusCode.ERROR)
    span.end(ended)
