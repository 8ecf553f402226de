"""For administrators of the platform: what the gateway does at this moment, and how much it says of it."""

from typing import Any, Literal

import msgspec

from control import audit
from control.http import ApiRequest, Reply, Unavailable, endpoint
from redisgate.board import Board, current
from redisgate.status import status

TAGS = ["Administration"]


class Latency(msgspec.Struct):
    """Microseconds that so many stay below; null where nothing was asked."""

    p50: float | None
    p90: float | None
    p99: float | None


class WorkerStatus(msgspec.Struct):
    """One worker. `cpu` is the part of a core that it uses, `loop_lag_ms` how late its event loop was at most."""

    worker: str
    cpu: float
    memory_bytes: int
    loop_lag_ms: float
    silent_seconds: float
    stuck: bool
    requests_per_second: float
    failed_per_second: float
    commands_per_second: float
    latency_us: Latency
    connections: int
    redis_waiting: int


class ProcessStatus(msgspec.Struct):
    """A process that is no worker: steward, metrics."""

    worker: str
    cpu: float
    memory_bytes: int
    loop_lag_ms: float
    silent_seconds: float
    stuck: bool


class FamilyStatus(msgspec.Struct):
    """Commands of one family."""

    family: str
    commands: int
    commands_per_second: float
    errors_per_second: float
    latency_us: Latency


class InstanceStatus(msgspec.Struct):
    """Requests to one instance; `other` stands for those beyond the ones that are counted by name."""

    instance_id: str
    name: str
    requests: int
    requests_per_second: float
    errors_per_second: float
    bytes_in_per_second: float
    bytes_out_per_second: float
    mean_us: float | None
    latency_us: Latency


class GatewayStatus(msgspec.Struct):
    """This gateway over the last `window_seconds`; times in unix seconds, sizes in bytes."""

    version: str
    time: float
    started: float | None
    window_seconds: float
    workers: list[WorkerStatus]
    processes: list[ProcessStatus]
    totals: dict[str, Any]
    redis: dict[str, int]
    access: dict[str, float | None]
    families: list[FamilyStatus]
    instances: list[InstanceStatus]


class LogLevel(msgspec.Struct, forbid_unknown_fields=True):
    """`configured` takes the level of the configuration again."""

    level: Literal["debug", "info", "warning", "error", "configured"]


def _board() -> Board:
    found = current()
    if found is None:
        raise Unavailable("this process was not started by a supervisor, so it has nothing to tell")
    return found


@endpoint(
    "GET",
    "/api/admin/metrics",
    permission="admin",
    response=GatewayStatus,
    summary="What this gateway does now",
    tags=TAGS,
)
async def metrics(request: ApiRequest) -> object:
    """Workers, rates, latencies and the busiest instances of the gateway that answers, over the last ten seconds.

    Behind several gateways each answers for itself; Prometheus has the sum.
    """
    return status(_board())


@endpoint("GET", "/api/admin/log-level", permission="admin", response=LogLevel, summary="What is logged", tags=TAGS)
async def log_level(request: ApiRequest) -> object:
    """The level that somebody asked for while this gateway runs."""
    return LogLevel(_board().level or "configured")  # type: ignore[arg-type]


@endpoint(
    "PUT",
    "/api/admin/log-level",
    permission="admin",
    body=LogLevel,
    response=LogLevel,
    summary="Log more or less",
    tags=TAGS,
)
async def set_log_level(request: ApiRequest, body: LogLevel) -> object:
    """Takes effect in all processes of the gateway that answers within a second, until it is restarted or told anew."""
    board = _board()
    async with request.context.database.transaction() as connection:
        await audit.record(connection, request, "log_level.set", ("gateway", body.level))
    board.level = "" if body.level == "configured" else body.level
    return Reply(body, message=f"the log level is {body.level}")
