"""For administrators of the platform: all organizations, people and instances, what the gateway does and logs."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from control import administration, audit, workers
from control.http import ApiRequest, Reply, Unavailable, endpoint, page
from control.routes.auth import User
from control.routes.instances import Status
from redisgate.board import Board, current
from redisgate.status import status

TAGS: Final = ("Platform",)

Search = Annotated[str, Meta(max_length=100)]


class SearchQuery(msgspec.Struct):
    """What names contain."""

    search: Search | None = None


class InstancesQuery(msgspec.Struct):
    """What names contain, and in which state."""

    search: Search | None = None
    status: Status | None = None


class OrganizationInUse(msgspec.Struct):
    """An organization with what it uses; memory in bytes."""

    id: UUID
    name: str
    slug: str
    plan: str
    created_at: datetime
    members: int
    instances: int
    max_instances: int
    memory: int
    max_memory: int
    api_keys: int
    max_api_keys: int


class Account(User):
    """A person; since when they are shut out, null while they are not."""

    disabled_at: datetime | None = None


class AccountInUse(Account):
    """A person, and to how many organizations they belong."""

    organizations: int = 0


class UpdateUser(msgspec.Struct, forbid_unknown_fields=True):
    """What changes; what is absent stays."""

    is_admin: bool | None = None
    disabled: bool | None = None


class AnyInstance(msgspec.Struct):
    """An instance of any organization; `host` is where a local one runs."""

    id: UUID
    name: str
    slug: str
    status: Status
    status_reason: str | None
    status_at: datetime
    provisioner: str
    max_memory: int
    redis_version: str | None
    created_at: datetime
    organization_id: UUID
    organization: str
    host: str | None


class WorkerState(msgspec.Struct):
    """What a worker says of itself. `lag_ms`: how late its event loop was at most since the report before."""

    connections: int | None
    streams: int
    instances: int
    memory: int | None
    cpu_percent: float
    lag_ms: float


class Worker(msgspec.Struct):
    """A process that serves; `silent`: it has not been heard of lately."""

    id: UUID
    host_id: UUID
    host_name: str
    number: int
    pid: int
    version: str
    started_at: datetime
    seen_at: datetime
    silent: bool
    state: WorkerState


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


class Totals(msgspec.Struct):
    """All workers together; `worker_restarts` since the gateway was started."""

    requests_per_second: float
    failed_per_second: float
    commands_per_second: float
    latency_us: Latency
    connections: int
    streams: int
    bytes_in_per_second: float
    bytes_out_per_second: float
    limit_refusals_per_second: float
    worker_restarts: int


class RedisStatus(msgspec.Struct):
    """Connections to Redis, requests that wait for it, instances out of reach, connections lost since the start."""

    connections: int
    waiting: int
    instances_away: int
    lost: int


class AccessStatus(msgspec.Struct):
    """Credentials that were known and that were asked for; how old the access table is, null without a database."""

    hits_per_second: float
    misses_per_second: float
    age_seconds: float | None


class GatewayStatus(msgspec.Struct):
    """This gateway over the last `window_seconds`; times in unix seconds, sizes in bytes."""

    version: str
    time: float
    started: float | None
    window_seconds: float
    workers: list[WorkerStatus]
    processes: list[ProcessStatus]
    totals: Totals
    redis: RedisStatus
    access: AccessStatus
    families: list[FamilyStatus]
    instances: list[InstanceStatus]


class LogLevel(msgspec.Struct, forbid_unknown_fields=True):
    """`configured` takes the level of the configuration again."""

    level: Literal["debug", "info", "warning", "error", "configured"]


@endpoint(
    "GET",
    "/api/admin/organizations",
    permission="admin",
    query=SearchQuery,
    response=OrganizationInUse,
    listing=True,
    summary="All organizations",
    tags=TAGS,
)
async def list_organizations(request: ApiRequest) -> object:
    """The newest first, with what they use and may use."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_organizations(
            connection, search=request.parameters.search, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "GET",
    "/api/admin/users",
    permission="admin",
    query=SearchQuery,
    response=AccountInUse,
    listing=True,
    summary="All people",
    tags=TAGS,
)
async def list_users(request: ApiRequest) -> object:
    """The newest first."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_users(
            connection, search=request.parameters.search, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "PATCH",
    "/api/admin/users/{user_id}",
    permission="admin",
    body=UpdateUser,
    response=Account,
    summary="Make somebody an administrator, or shut them out",
    tags=TAGS,
)
async def update_user(request: ApiRequest, body: UpdateUser) -> dict[str, Any]:
    """Who is shut out cannot sign in, and their sessions and API keys are refused as long as it lasts. Nobody does this
    to themselves."""
    async with request.context.database.transaction() as connection:
        return await administration.update_user(
            connection,
            request,
            request.user_id,
            request.path["user_id"],
            is_admin=body.is_admin,
            disabled=body.disabled,
        )


@endpoint(
    "GET",
    "/api/admin/instances",
    permission="admin",
    query=InstancesQuery,
    response=AnyInstance,
    listing=True,
    summary="All instances",
    tags=TAGS,
)
async def list_instances(request: ApiRequest) -> object:
    """Those in error first, then the newest."""
    number, limit = request.paging()
    wanted: InstancesQuery = request.parameters
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_instances(
            connection, search=wanted.search, status=wanted.status, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "GET",
    "/api/admin/workers",
    permission="admin",
    response=list[Worker],
    summary="The workers and how they are",
    tags=TAGS,
)
async def list_workers(request: ApiRequest) -> object:
    """Of all hosts; those that have been silent for an hour are no longer listed."""
    async with request.context.database.connection() as connection:
        return await workers.list_workers(connection)


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
