"""Usage, cost and health over HTTP. What is behind them stands in `control.usage`."""

import asyncio
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec

from control import activity, api_keys, instances, usage
from control.http import ApiRequest, BadRequest, Forbidden, endpoint
from redisgate.access import AccessTable, Instance
from resp.errors import RespError

_PATH = "/api/organizations/{org_id}"
_INSTANCE = _PATH + "/redis-instances/{instance_id}"
_TAGS = ("Usage",)

HEALTH_SECONDS = 3.0
"""For an instance to answer before it counts as unreachable."""
RECENT = timedelta(minutes=5)
"""What errors and latency of an instance's health are about."""

Step = Literal["minute", "hour", "day"]


class UsageQuery(msgspec.Struct):
    """Which series; times as in 2030-01-01T00:00:00Z. By default the last hour, day or month, by the step."""

    step: Step = "hour"
    from_: datetime | None = msgspec.field(default=None, name="from")
    to: datetime | None = None
    instance_id: UUID | None = None
    api_key_id: UUID | None = None


class SpanQuery(msgspec.Struct):
    """Which days; the last 30 by default."""

    from_: datetime | None = msgspec.field(default=None, name="from")
    to: datetime | None = None


class Used(msgspec.Struct):
    """What was used. Sizes in bytes; `requests` are HTTP requests, of which a pipeline is one."""

    commands: int
    reads: int
    writes: int
    requests: int
    errors: int
    bytes_in: int
    bytes_out: int
    latency_mean_ms: float | None
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    cost: float


class Point(Used, kw_only=True):
    """One minute, hour or day; keys, memory (bytes) and connections are the highest that were seen in it.

    Hits and misses of lookups, evicted and expired keys are as the instance's server counted them.
    """

    at: datetime
    keys: int | None = None
    memory: int | None = None
    connections: int | None = None
    hits: int | None = None
    misses: int | None = None
    evicted: int | None = None
    expired: int | None = None


class Series(msgspec.Struct):
    """What was used, step by step. Steps without use are missing; the newest seconds are not there yet."""

    step: Step
    from_: datetime = msgspec.field(name="from")
    to: datetime
    retention_seconds: int
    total: Used
    series: list[Point]


class CommandsQuery(msgspec.Struct):
    """How far back."""

    span: Literal["1h", "24h", "7d", "30d"] = "24h"


class Command(msgspec.Struct):
    """How often a command ran, and how long it took in the server on average, in microseconds."""

    command: str
    calls: int
    failed: int
    mean_micros: float


class TopCommands(msgspec.Struct):
    """The commands that ran most since `from`, to ten minutes."""

    from_: datetime = msgspec.field(name="from")
    commands: list[Command]


class CostItem(msgspec.Struct):
    """What one credential did on one instance."""

    instance_id: UUID
    instance_name: str | None
    credential: Literal["key", "token", "readonly_token", "session"]
    api_key_id: UUID | None
    api_key_name: str | None
    commands: int
    bytes_in: int
    bytes_out: int
    cost: float


class Costs(msgspec.Struct):
    """What commands and bytes cost on some days, by the operator's prices."""

    from_: datetime = msgspec.field(name="from")
    to: datetime
    price_per_100k_commands: float
    price_per_gb: float
    commands: int
    bytes_in: int
    bytes_out: int
    cost: float
    items: list[CostItem]


class Health(msgspec.Struct):
    """How an instance is. `error_rate` and latency are those of the last five minutes."""

    status: str
    status_reason: str | None
    reachable: bool
    ping_ms: float | None
    problem: str | None
    sampled_at: datetime | None
    keys: int | None
    memory: int | None
    max_memory: int
    memory_percentage: float | None
    connections: int | None
    requests: int
    error_rate: float | None
    latency_p50_ms: float | None
    latency_p99_ms: float | None


@endpoint(
    "GET",
    _PATH + "/usage",
    permission="usage.read",
    query=UsageQuery,
    response=Series,
    summary="See what the organization uses",
    tags=_TAGS,
)
async def of_organization(request: ApiRequest) -> object:
    """Of all instances and keys together, or of one instance or key."""
    wanted: UsageQuery = request.parameters
    own = request.principal.instance_ids
    if own is not None and wanted.instance_id not in own:
        raise Forbidden("this API key is for some instances only: name one of them as instance_id")
    async with request.context.database.connection() as connection:
        if wanted.instance_id is not None:
            await instances.find(connection, request.organization_id, wanted.instance_id, deleted=None)
        if wanted.api_key_id is not None:
            await api_keys.find(connection, request.organization_id, wanted.api_key_id)
        return await _series(request, connection, wanted.instance_id, wanted.api_key_id)


@endpoint(
    "GET",
    _INSTANCE + "/usage",
    permission="usage.read",
    query=UsageQuery,
    response=Series,
    summary="See what an instance does",
    tags=_TAGS,
)
async def of_instance(request: ApiRequest) -> object:
    """With its keys, memory and connections. Also of an instance that was deleted and not yet purged."""
    wanted: UsageQuery = request.parameters
    instance_id = request.path["instance_id"]
    if wanted.instance_id not in (None, instance_id):
        raise BadRequest("some parameters of the query are wrong", {"instance_id": "is not the one in the address"})
    async with request.context.database.connection() as connection:
        await instances.find(connection, request.organization_id, instance_id, deleted=None)
        if wanted.api_key_id is not None:
            await api_keys.find(connection, request.organization_id, wanted.api_key_id)
        return await _series(request, connection, instance_id, wanted.api_key_id)


async def _series(
    request: ApiRequest, connection: Any, instance_id: UUID | None, api_key_id: UUID | None
) -> dict[str, Any]:
    wanted: UsageQuery = request.parameters
    settings = request.context.settings
    start, end = usage.span(wanted.step, wanted.from_, wanted.to, request.context.now(), settings)
    return await usage.series(
        connection,
        settings,
        request.organization_id,
        wanted.step,
        start,
        end,
        instance_id=instance_id,
        api_key_id=api_key_id,
    )


@endpoint(
    "GET",
    _INSTANCE + "/commands",
    permission="usage.read",
    query=CommandsQuery,
    response=TopCommands,
    summary="See which commands an instance runs most",
    tags=_TAGS,
)
async def commands(request: ApiRequest) -> object:
    """As its server counts them, once a minute: also those that did not come through the gateway, each command of a
    script, pipeline or transaction by itself.
    """
    wanted: CommandsQuery = request.parameters
    instance_id = request.path["instance_id"]
    start = request.context.now() - activity.SPANS[wanted.span].length
    async with request.context.database.connection() as connection:
        await instances.find(connection, request.organization_id, instance_id, deleted=None)
        found = await activity.top_commands(connection, instance_id, start)
    return {"from": start, "commands": found}


@endpoint(
    "GET",
    _PATH + "/cost",
    permission="usage.read",
    query=SpanQuery,
    response=Costs,
    summary="See what usage costs",
    tags=_TAGS,
)
async def cost(request: ApiRequest) -> object:
    """By key and instance, for whole days in UTC; the day of `to` counts too."""
    wanted: SpanQuery = request.parameters
    settings = request.context.settings
    start, end = usage.span("day", wanted.from_, wanted.to, request.context.now(), settings)
    async with request.context.database.connection() as connection:
        items = await usage.costs(connection, settings, request.organization_id, start, end)
    own = request.principal.instance_ids
    if own is not None:
        items = [item for item in items if item["instance_id"] in own]
    totals = {name: sum(item[name] for item in items) for name in ("commands", "bytes_in", "bytes_out")}
    return {
        "from": start,
        "to": end,
        "price_per_100k_commands": settings.price_per_100k_commands,
        "price_per_gb": settings.price_per_gb,
        **totals,
        "cost": usage.cost(settings, totals["commands"], totals["bytes_in"] + totals["bytes_out"]),
        "items": items,
    }


@endpoint(
    "GET",
    _INSTANCE + "/health",
    permission="instances.read",
    response=Health,
    summary="See how an instance is",
    tags=_TAGS,
)
async def health(request: ApiRequest) -> object:
    """It is asked now, by the gateway that answers this."""
    context = request.context
    async with context.database.connection() as connection:
        row = await instances.find(connection, request.organization_id, request.path["instance_id"])
        sample = await connection.fetchrow(
            "SELECT at, keys, memory, connections FROM instance_samples WHERE instance_id = $1"
            " ORDER BY at DESC LIMIT 1",
            row["id"],
        )
        now = context.now()
        recent = await usage.series(
            connection,
            context.settings,
            request.organization_id,
            "minute",
            now - RECENT,
            now,
            instance_id=row["id"],
        )
    found: dict[str, Any] = dict.fromkeys(("ping_ms", "problem", "sampled_at", "keys", "memory", "connections"))
    if sample is not None:
        found |= {"sampled_at": sample["at"]} | {name: sample[name] for name in ("keys", "memory", "connections")}
    found |= await _ask(request, row)
    total = recent["total"]
    memory = found["memory"]
    return found | {
        "status": row["status"],
        "status_reason": row["status_reason"],
        "max_memory": row["max_memory"],
        "memory_percentage": round(100 * memory / row["max_memory"], 2) if memory and row["max_memory"] else None,
        "requests": total["requests"],
        "error_rate": round(total["errors"] / total["requests"], 4) if total["requests"] else None,
        "latency_p50_ms": total["latency_p50_ms"],
        "latency_p99_ms": total["latency_p99_ms"],
    }


async def _ask(request: ApiRequest, row: Any) -> dict[str, Any]:
    """Whether an instance answers, and what INFO says of it."""
    if row["endpoint"] is None or row["desired_state"] != "running":
        return {"reachable": False, "problem": "the instance is not running"}
    access: AccessTable | None = request.context.extra.get("access")
    loaded: Instance | None = access.instances.get(str(row["id"])) if access is not None else None
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            routes = request.context.extra.get("kubernetes.routes")
            ping, sample = await usage.look_at(row, request.context.encryption, loaded, routes)
    except TimeoutError:
        return {"reachable": False, "problem": f"no answer within {HEALTH_SECONDS:g} s"}
    except (RespError, ValueError) as error:
        return {"reachable": False, "problem": str(error)}
    return {
        "reachable": True,
        "ping_ms": round(ping * 1000, 3),
        "sampled_at": request.context.now(),
        "keys": sample.keys,
        "memory": sample.memory,
        "connections": sample.connections,
    }
