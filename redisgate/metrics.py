"""Metrics: what they are called, how a process publishes what it has counted, how all of it is put together.

The straight line adds to plain integers (`redisgate.counters`). Once a second
a process makes a *document* of them and puts it on the board; whoever answers
a scrape sums the documents of all. In a document a series is known by its name
and labels as Prometheus writes them, so that sums and the text format need to
know nothing else.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md
"""

import asyncio
import logging
import platform
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

import redisgate
from redisgate import logs
from redisgate.access import AccessTable
from redisgate.board import MAX_DOCUMENT_BYTES, Board, Entry
from redisgate.counters import COMMAND, EVERY_OTHER, MAX_COUNTED_INSTANCES, OCTAVES, ROUTES, Counters
from redisgate.http_protocol import HttpServer
from redisgate.metering import BUCKETS, bucket_of, bucket_start
from resp.connection import TOTALS

PUBLISH_SECONDS: Final = 1.0
"""Between two documents of a process."""
WINDOW: Final = 10
"""Documents that rates are taken over; as many times `PUBLISH_SECONDS`."""
LAG_SECONDS: Final = 0.1
"""Between two looks whether the event loop is late."""
MAX_SHOWN_BREAKERS: Final = 50
"""Instances out of reach that are named in the metrics."""

log = logging.getLogger(__name__)


# --- What there is ----------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """One metric. A counter's name ends in `_total`; `merge` says what becomes of several processes' gauges."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    merge: str = "sum"


_INSTANCE: Final = ("instance_id", "instance_name")

METRICS: Final[tuple[Metric, ...]] = (
    # traffic
    Metric("redisgate_http_requests_total", "counter", "Requests answered.", ("route", "method", "status")),
    Metric("redisgate_http_request_duration_seconds", "histogram", "From a whole request to its answer.", ("route",)),
    Metric("redisgate_http_received_bytes_total", "counter", "Bytes from clients."),
    Metric("redisgate_http_sent_bytes_total", "counter", "Bytes to clients."),
    Metric("redisgate_http_connections", "gauge", "Client connections that are open."),
    Metric("redisgate_http_connections_limit", "gauge", "Client connections that all workers together take."),
    Metric("redisgate_http_connections_accepted_total", "counter", "Client connections accepted."),
    Metric("redisgate_http_connections_refused_total", "counter", "Client connections closed at max_connections."),
    Metric("redisgate_http_requests_in_flight", "gauge", "Requests that are not answered yet; streams too."),
    Metric("redisgate_http_streams", "gauge", "Subscriptions and monitors that are open."),
    Metric("redisgate_commands_total", "counter", "Commands asked for, those of pipelines included.", ("family",)),
    Metric(
        "redisgate_command_errors_total",
        "counter",
        "Single commands answered with an error, and commands of a pipeline that were refused before Redis.",
        ("family",),
    ),
    Metric("redisgate_command_duration_seconds", "histogram", "Of single commands.", ("family",)),
    # tenants
    Metric("redisgate_instance_requests_total", "counter", "Requests to an instance.", _INSTANCE),
    Metric("redisgate_instance_errors_total", "counter", "Of those, answered with status 400 or above.", _INSTANCE),
    Metric("redisgate_instance_received_bytes_total", "counter", "Commands to an instance, in bytes.", _INSTANCE),
    Metric("redisgate_instance_sent_bytes_total", "counter", "Bodies of an instance's answers, in bytes.", _INSTANCE),
    Metric("redisgate_instance_request_duration_seconds", "histogram", "Of an instance's requests.", _INSTANCE),
    # Redis
    Metric("redisgate_redis_connections", "gauge", "Connections to Redis that are open or being made."),
    Metric("redisgate_redis_waiting_commands", "gauge", "Requests that wait for Redis."),
    Metric("redisgate_redis_received_bytes_total", "counter", "Bytes from Redis."),
    Metric("redisgate_redis_sent_bytes_total", "counter", "Bytes to Redis."),
    Metric("redisgate_redis_connects_total", "counter", "Connections to Redis that were made."),
    Metric("redisgate_redis_connect_failures_total", "counter", "Attempts to connect to Redis that failed."),
    Metric("redisgate_redis_connections_lost_total", "counter", "Connections that ended while requests waited."),
    Metric("redisgate_redis_instances", "gauge", "Instances that a worker is connected to, or tries to be.", (), "max"),
    Metric("redisgate_redis_instances_away", "gauge", "Instances to which the last connect failed.", (), "max"),
    Metric(
        "redisgate_redis_breaker_open",
        "gauge",
        "1 while an instance is away: the last connect failed, and commands are refused; absent otherwise.",
        _INSTANCE,
        "max",
    ),
    # access
    Metric("redisgate_access_hits_total", "counter", "Requests whose credential was known in memory."),
    Metric("redisgate_access_misses_total", "counter", "Requests whose credential was asked for."),
    Metric("redisgate_access_credentials", "gauge", "Credentials that workers know, over all workers."),
    Metric(
        "redisgate_access_table_age_seconds",
        "gauge",
        "Since the access table was last seen to be up to date with the database; the worst of all workers.",
        (),
        "max",
    ),
    Metric("redisgate_access_listening", "gauge", "Whether notifications arrive; 0 if not everywhere.", (), "min"),
    Metric("redisgate_limit_refusals_total", "counter", "Requests that a limit refused.", ("kind",)),
    # control plane
    Metric(
        "redisgate_control_requests_total", "counter", "Requests to the control plane.", ("path", "method", "status")
    ),
    Metric("redisgate_control_request_seconds_total", "counter", "Time that these took, together.", ("path", "method")),
    Metric("redisgate_database_errors_total", "counter", "Requests that found the database away."),
    Metric(
        "redisgate_provisioning_steps_total",
        "counter",
        "Steps taken for instances.",
        ("provisioner", "step", "outcome"),
    ),
    Metric("redisgate_provisioning_step_duration_seconds", "histogram", "Of such steps.", ("step",)),
    Metric("redisgate_instances", "gauge", "Instances of the deployment; told by the host that leads.", ("status",)),
    Metric("redisgate_steward_leads", "gauge", "1 where the deployment's own work is done."),
    # processes
    Metric("redisgate_event_loop_lag_seconds", "histogram", "How late timers of the workers were."),
    Metric("redisgate_event_loop_lag_max_seconds", "gauge", "The latest within ten seconds.", ("worker",), "max"),
    Metric("redisgate_workers", "gauge", "Workers that serve."),
    Metric("redisgate_workers_wanted", "gauge", "Workers that there should be."),
    Metric("redisgate_worker_restarts_total", "counter", "Processes that died and were replaced.", ("kind",)),
    Metric("redisgate_worker_silent_seconds", "gauge", "Since a process has last published.", ("worker",), "max"),
    Metric("redisgate_process_cpu_seconds_total", "counter", "CPU time.", ("worker",)),
    Metric("redisgate_process_resident_memory_bytes", "gauge", "Memory, shared pages included.", ("worker",)),
    Metric("redisgate_reloads_total", "counter", "Reloads of the configuration.", ("outcome",)),
    Metric("redisgate_log_lines_dropped_total", "counter", "Log lines that nobody took from standard error."),
    Metric("redisgate_documents_dropped_total", "counter", "Documents of metrics that were too large to publish."),
    Metric("redisgate_start_time_seconds", "gauge", "When the gateway was started, unix time.", (), "max"),
    Metric("redisgate_build_info", "gauge", "What runs here.", ("version", "form", "python"), "max"),
    Metric("redisgate_scrapes_total", "counter", "Answers of this endpoint."),
)
BY_NAME: Final = {metric.name: metric for metric in METRICS}


# --- Documents --------------------------------------------------------------------------------------------------------


class InstanceCount(msgspec.Struct, array_like=True):
    """What one instance was asked and answered; nanoseconds, and requests by octave of latency."""

    name: str
    requests: int
    errors: int
    bytes_in: int
    bytes_out: int
    nanos: int
    buckets: list[int]

    def numbers(self) -> list[int]:
        """All but the name."""
        return [self.requests, self.errors, self.bytes_in, self.bytes_out, self.nanos, *self.buckets]

    @classmethod
    def of(cls, name: str, numbers: Sequence[int]) -> "InstanceCount":
        """The inverse of `numbers`."""
        requests, errors, bytes_in, bytes_out, nanos, *buckets = numbers
        return cls(name, requests, errors, bytes_in, bytes_out, nanos, buckets)


class ShownState(msgspec.Struct, array_like=True):
    """What `Shown` must not forget."""

    seen: dict[str, list[int]] = {}
    """What every instance had when it was last looked at."""
    shown: dict[str, list[int]] = {}
    """What was shown under each name."""
    rest: list[int] = []
    """What was shown of all others together."""
    partial: bool = False
    """Not all that was seen is here: there were too many to pass on."""


class Document(msgspec.Struct):
    """What one process, or all together, have counted until `time` (unix seconds).

    Series by name and labels as Prometheus writes them. A histogram is the sum in seconds and the counts by bucket
    of `redisgate.metering`, or by octave of them; an exemplar is a trace id, seconds, unix time.
    """

    who: str = ""
    time: float = 0.0
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    histograms: dict[str, list[float]] = {}
    exemplars: dict[str, dict[int, tuple[str, float, float]]] = {}
    instances: dict[str, InstanceCount] = {}
    state: ShownState | None = None
    """Of the process that answers scrapes, for the one that takes its place."""

    def count(self, name: str, value: float, /, **labels: str) -> None:
        """Add to a counter."""
        key = series_name(name, labels)
        self.counters[key] = self.counters.get(key, 0) + value

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self.gauges[series_name(name, labels)] = float(value)

    def histogram(self, name: str, nanos: int, buckets: Sequence[int], /, **labels: str) -> str:
        """Set a histogram; returns its series."""
        key = series_name(name, labels)
        self.histograms[key] = [nanos / 1e9, *buckets]
        return key

    def add(self, other: "Document", *, gauges: bool = True) -> None:
        """Add what another process has counted; its gauges too, if it lives."""
        for key, value in other.counters.items():
            self.counters[key] = self.counters.get(key, 0) + value
        for key, numbers in other.histograms.items():
            self.histograms[key] = _sum(self.histograms.get(key), numbers)
        for key, found in other.exemplars.items():
            self.exemplars[key] = {**self.exemplars.get(key, {}), **found}
        for key, count in other.instances.items():
            mine = self.instances.get(key)
            self.instances[key] = (
                count if mine is None else InstanceCount.of(count.name, _sum(mine.numbers(), count.numbers()))
            )
        if gauges:
            for key, value in other.gauges.items():
                mine_value = self.gauges.get(key)
                self.gauges[key] = value if mine_value is None else _MERGES[_metric_of(key).merge](mine_value, value)


_MERGES: Final[dict[str, Callable[[float, float], float]]] = {"sum": lambda a, b: a + b, "max": max, "min": min}


def _sum(mine: Sequence[Any] | None, other: Sequence[Any]) -> list[Any]:
    if mine is None or len(mine) != len(other):
        return list(other)
    return [a + b for a, b in zip(mine, other, strict=True)]


def series_name(name: str, labels: Mapping[str, str]) -> str:
    """A metric's name with labels, as Prometheus writes it; the labels in the order that the metric declares."""
    metric = BY_NAME[name]
    if set(labels) != set(metric.labels):
        raise ValueError(f"{name} has the labels {metric.labels}, not {tuple(labels)}")
    if not labels:
        return name
    return name + "{" + ",".join([f'{key}="{_escape(labels[key])}"' for key in metric.labels]) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _metric_of(series: str) -> Metric:
    return BY_NAME[series.partition("{")[0]]


ENCODER: Final = msgspec.msgpack.Encoder()
DECODER: Final = msgspec.msgpack.Decoder(Document)


# --- A process and its document ---------------------------------------------------------------------------------------

Collector = Callable[[Document], None]


class Publisher:
    """Makes a document of what a process has counted, once a second, and watches how late its event loop is.

    Where nobody can read it, it only takes the log level that somebody asked for.
    """

    def __init__(self, board: Board, who: str, collectors: Iterable[Collector]) -> None:
        """`who` names the process: a worker's number, or what else it is."""
        self._board = board
        self._who = who
        self._collectors = list(collectors)
        self._past: deque[bytes] = deque(maxlen=WINDOW)
        before = board.own()
        # Whoever had this place has counted too, and no sum may fall.
        self._base = DECODER.decode(before.document) if before is not None else Document()
        self._dropped = 0
        self._level = ""
        self._lags: deque[float] = deque(maxlen=round(WINDOW * PUBLISH_SECONDS / LAG_SECONDS))
        self._lag_nanos = 0
        self._lag_buckets = [0] * BUCKETS
        self._due = 0.0
        self._publish_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        self.publish()
        self._publish_at = loop.time() + PUBLISH_SECONDS
        self._arm(loop)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + (LAG_SECONDS if self._board.read else PUBLISH_SECONDS)
        self._timer = loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        lag = max(now - self._due, 0.0)
        self._lags.append(lag)
        nanos = int(lag * 1e9)
        self._lag_nanos += nanos
        self._lag_buckets[bucket_of(nanos)] += 1
        if now >= self._publish_at:
            self._publish_at = now + PUBLISH_SECONDS
            self.publish()
        self._arm(loop)

    def publish(self) -> None:
        """Put what was counted until now on the board."""
        level = self._board.level
        if level != self._level:
            self._level = level
            logs.set_level(level)
            log.debug("the log level is %s", level)
        if not self._board.read:
            return
        document = Document(self._who, time.time())
        for collect in self._collectors:
            collect(document)
        self._of_process(document)
        encoded = self._encoded(document)
        self._past.append(encoded)
        if not self._board.publish(encoded, self._past[0]):
            self._dropped += 1
            self._past.pop()

    def _encoded(self, document: Document) -> bytes:
        """The document with what was counted before, and as many names of instances as fit.

        What loses its name is no longer told: to count it with the rest would count it twice, since whoever shows the
        instances adds up what each of them gains.
        """
        own = set(document.instances)
        document.add(self._base, gauges=False)
        named = [key for key in document.instances if key != EVERY_OTHER]
        # What this process was asked for itself goes before what others were, some of which is gone for good.
        named.sort(key=lambda key: (key in own, document.instances[key].requests), reverse=True)
        room = MAX_COUNTED_INSTANCES
        while True:
            for key in named[room:]:
                del document.instances[key]
            del named[room:]
            encoded = ENCODER.encode(document)
            if len(encoded) <= MAX_DOCUMENT_BYTES:
                return encoded
            if named:
                room = len(named) // 2
            elif document.state is not None and document.state.seen:
                document.state = _halved(document.state)
            else:
                return encoded

    def _of_process(self, document: Document) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        document.count("redisgate_process_cpu_seconds_total", usage.ru_utime + usage.ru_stime, worker=self._who)
        document.gauge("redisgate_process_resident_memory_bytes", _resident_bytes(), worker=self._who)
        document.count("redisgate_log_lines_dropped_total", logs.dropped_lines())
        document.count("redisgate_documents_dropped_total", self._dropped)
        if self._who.isdigit():
            document.histogram("redisgate_event_loop_lag_seconds", self._lag_nanos, self._lag_buckets)
        document.gauge("redisgate_event_loop_lag_max_seconds", max(self._lags, default=0.0), worker=self._who)

    def stop(self) -> None:
        """Publish once more, and no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.publish()


def _halved(state: ShownState) -> ShownState:
    """The state with half of what was seen: of those that are shown, and of the busiest of the others."""
    keys = sorted(state.seen, key=lambda key: (key in state.shown, state.seen[key][0]), reverse=True)
    seen = {key: state.seen[key] for key in keys[: len(keys) // 2]}
    return ShownState(seen, state.shown, state.rest, partial=True)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the most it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collect_counters(counters: Counters) -> Collector:
    """What `redisgate.counters` counts."""

    def collect(document: Document) -> None:
        count = document.count
        for method, numbers in (("GET", counters.ok_get), ("POST", counters.ok_post)):
            for route, number in enumerate(numbers):
                if number:
                    count("redisgate_http_requests_total", number, route=ROUTES[route], method=method, status="200")
        for (route, method_bytes, status), number in list(counters.others.items()):
            method = method_bytes.decode("ascii")
            count("redisgate_http_requests_total", number, route=ROUTES[route], method=method, status=str(status))
        count("redisgate_access_hits_total", counters.hits)
        count("redisgate_access_misses_total", counters.loads)
        nanos, buckets = 0, [0] * BUCKETS
        latest: dict[int, tuple[str, float, float]] = {}
        for family, series in list(counters.families.items()):
            if not series.commands:
                continue
            count("redisgate_commands_total", series.commands, family=family)
            count("redisgate_command_errors_total", series.errors, family=family)
            key = document.histogram("redisgate_command_duration_seconds", series.nanos, series.buckets, family=family)
            if series.exemplars:
                document.exemplars[key] = dict(series.exemplars)
                latest |= series.exemplars
            nanos += series.nanos
            buckets = [a + b for a, b in zip(buckets, series.buckets, strict=True)]
        for route, series in enumerate(counters.routes):
            if route == COMMAND:
                key = document.histogram("redisgate_http_request_duration_seconds", nanos, buckets, route="command")
                exemplars = latest
            else:
                key = document.histogram(
                    "redisgate_http_request_duration_seconds", series.nanos, series.buckets, route=ROUTES[route]
                )
                exemplars = dict(series.exemplars)
            if exemplars:
                document.exemplars[key] = exemplars
        count("redisgate_http_received_bytes_total", counters.bytes_in)
        count("redisgate_http_sent_bytes_total", counters.bytes_out)
        count("redisgate_http_connections_accepted_total", counters.connections)
        count("redisgate_http_connections_refused_total", counters.refused_connections)
        for kind, number in counters.refusals.items():
            count("redisgate_limit_refusals_total", number, kind=kind)
        for (path, verb, status), (number, spent) in list(counters.control.items()):
            count("redisgate_control_requests_total", number, path=path, method=verb, status=str(status))
            count("redisgate_control_request_seconds_total", spent / 1e9, path=path, method=verb)
        count("redisgate_database_errors_total", counters.database_errors)
        for instance_id, one in counters.instances():
            document.instances[instance_id] = InstanceCount(
                one.name, one.requests, one.errors, one.bytes_in, one.bytes_out, one.nanos, one.buckets
            )

    return collect


def collect_http(http: HttpServer) -> Collector:
    """What the HTTP server of a worker knows beside its counters."""

    def collect(document: Document) -> None:
        document.gauge("redisgate_http_connections", len(http.connections))
        document.gauge("redisgate_http_connections_limit", http.limits.max_connections)
        in_flight = sum([len(connection.exchanges) for connection in http.connections])
        document.gauge("redisgate_http_requests_in_flight", in_flight)
        document.gauge("redisgate_http_streams", len(http.streams))

    return collect


def collect_redis(access: AccessTable) -> Collector:
    """The connections of a worker to Redis."""

    def collect(document: Document) -> None:
        connections = waiting = used = away = 0
        shown = 0
        for instance in access.instances.values():
            for backend in instance.backends():
                pool = backend.pool
                connections += pool.connection_count
                waiting += pool.waiting
                used += pool.away or pool.connection_count > 0
                away += pool.away
                if pool.away and shown < MAX_SHOWN_BREAKERS:
                    shown += 1
                    document.gauge(
                        "redisgate_redis_breaker_open", 1, instance_id=instance.id, instance_name=instance.label
                    )
        document.gauge("redisgate_redis_connections", connections)
        document.gauge("redisgate_redis_waiting_commands", waiting)
        document.gauge("redisgate_redis_instances", used)
        document.gauge("redisgate_redis_instances_away", away)
        document.gauge("redisgate_access_credentials", access.size)
        document.count("redisgate_redis_received_bytes_total", TOTALS.received)
        document.count("redisgate_redis_sent_bytes_total", TOTALS.sent)
        document.count("redisgate_redis_connects_total", TOTALS.connects)
        document.count("redisgate_redis_connect_failures_total", TOTALS.failures)
        document.count("redisgate_redis_connections_lost_total", TOTALS.lost)

    return collect


# --- All processes together -------------------------------------------------------------------------------------------


def decoded(entry: Entry) -> tuple[Document, Document]:
    """The two documents of an entry."""
    return DECODER.decode(entry.document), DECODER.decode(entry.earlier)


def gathered(board: Board) -> Document:
    """What all processes have counted until now."""
    total = Document("all", time.time())
    for entry in board.entries():
        document = DECODER.decode(entry.document)
        total.add(document, gauges=entry.live)
        if entry.live and not board.is_supervisor(entry):
            silent = max(total.time - document.time, 0.0)
            total.gauge("redisgate_worker_silent_seconds", silent, worker=document.who)
    total.gauge(
        "redisgate_build_info",
        1,
        version=redisgate.__version__,
        form=redisgate.build_form().partition(" ")[0],
        python=platform.python_version(),
    )
    return total


class Shown:
    """Which instances the metrics name: the busiest ones, the rest together.

    A series must never fall, though an instance loses its name and gets it back: each name, and the rest, gain what
    was added while they stood for it.
    """

    def __init__(self, most: int, state: ShownState | None = None) -> None:
        """`state` is of the process that showed them before."""
        self._most = most
        self.state = state or ShownState(rest=[0] * (5 + OCTAVES))

    def choose(self, instances: Mapping[str, InstanceCount]) -> dict[str, InstanceCount]:
        """What to show of instances: at most so many by name, and the rest as one."""
        state = self.state
        gains: dict[str, list[int]] = {}
        for key, count in instances.items():
            numbers = count.numbers()
            before = state.seen.get(key, numbers if state.partial else None)
            gains[key] = numbers if before is None else [max(b - a, 0) for a, b in zip(before, numbers, strict=True)]
            state.seen[key] = numbers
        state.partial = False
        named = [key for key in instances if key != EVERY_OTHER]
        # Who was shown stays unless somebody else is busier, so that a quiet minute does not shuffle the names.
        named.sort(key=lambda key: (gains[key][0], key in state.shown, instances[key].requests), reverse=True)
        chosen = set(named[: self._most])
        for key, gain in gains.items():
            if key in chosen:
                state.shown[key] = _sum(state.shown.get(key), gain)
            else:
                state.rest = _sum(state.rest, gain)
        for key in [key for key in state.seen if key not in instances]:
            del state.seen[key]
            state.shown.pop(key, None)
        shown = {key: InstanceCount.of(instances[key].name, state.shown[key]) for key in named[: self._most]}
        if any(state.rest):
            shown[EVERY_OTHER] = InstanceCount.of(EVERY_OTHER, state.rest)
        return shown


def name_instances(document: Document, shown: Mapping[str, InstanceCount]) -> None:
    """Make series of the instances that are shown."""
    for key, one in shown.items():
        labels = {"instance_id": key, "instance_name": one.name}
        document.count("redisgate_instance_requests_total", one.requests, **labels)
        document.count("redisgate_instance_errors_total", one.errors, **labels)
        document.count("redisgate_instance_received_bytes_total", one.bytes_in, **labels)
        document.count("redisgate_instance_sent_bytes_total", one.bytes_out, **labels)
        document.histogram("redisgate_instance_request_duration_seconds", one.nanos, one.buckets, **labels)


# --- The text formats -------------------------------------------------------------------------------------------------

PROMETHEUS: Final = b"text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = b"application/openmetrics-text; version=1.0.0; charset=utf-8"

BOUNDS: Final = tuple(f"{bucket_start(4 * (octave + 1)) / 1e6:.9g}" for octave in range(OCTAVES - 1))
"""Upper bounds of the histograms' buckets in seconds: each is twice the one before, from 66 microseconds."""


def render(document: Document, *, openmetrics: bool) -> bytes:
    """The document as Prometheus reads it, or as OpenMetrics with the exemplars."""
    by_name: dict[str, list[str]] = {}
    for series in (*document.counters, *document.gauges, *document.histograms):
        by_name.setdefault(series.partition("{")[0], []).append(series)
    lines: list[str] = []
    for metric in METRICS:
        found = by_name.get(metric.name)
        if not found:
            continue
        family = metric.name.removesuffix("_total") if openmetrics else metric.name
        lines.append(f"# HELP {family} {metric.help}")
        lines.append(f"# TYPE {family} {metric.kind}")
        for series in sorted(found):
            if metric.kind == "histogram":
                lines += _histogram_lines(series, document, openmetrics)
            else:
                value = document.counters.get(series) if metric.kind == "counter" else document.gauges.get(series)
                lines.append(f"{series} {_number(value or 0)}")
    if openmetrics:
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode()


def _histogram_lines(series: str, document: Document, openmetrics: bool) -> list[str]:
    seconds, *buckets = document.histograms[series]
    octaves = octaves_of(buckets)
    exemplars = document.exemplars.get(series, {}) if openmetrics else {}
    name, brace, rest = series.partition("{")
    labels = rest[:-1] + "," if brace else ""
    suffix = f"{{{rest}" if brace else ""
    lines = []
    total = 0.0
    for octave, (bound, count) in enumerate(zip((*BOUNDS, "+Inf"), octaves, strict=True)):
        total += count
        line = f'{name}_bucket{{{labels}le="{bound}"}} {_number(total)}'
        exemplar = exemplars.get(octave)
        if exemplar is not None:
            line += f' # {{trace_id="{exemplar[0]}"}} {exemplar[1]:.9g} {exemplar[2]:.3f}'
        lines.append(line)
    lines.append(f"{name}_sum{suffix} {_number(seconds)}")
    lines.append(f"{name}_count{suffix} {_number(total)}")
    return lines


def octaves_of(buckets: Sequence[float]) -> list[float]:
    """The counts by octave of a histogram that has them by bucket or by octave."""
    if len(buckets) == OCTAVES:
        return list(buckets)
    return [sum(buckets[at : at + 4]) for at in range(0, BUCKETS, 4)]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def metrics_table() -> str:
    """The table of docs/observability.md."""
    lines = ["| metric | kind | labels | |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_table(), end="")
