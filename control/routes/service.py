"""What the service says of itself: health, version, statistics; its own description."""

import asyncio
from typing import Any

import msgspec
from starlette.responses import Response

import redisgate
from control.database import DatabaseAway
from control.http import ApiRequest, endpoint
from control.openapi import docs_page, document

TAGS = ["Service"]
HEALTH_SECONDS = 1.0
"""For PostgreSQL to answer; then it counts as away."""


class Health(msgspec.Struct):
    """`status` is ok, or degraded while PostgreSQL is away: commands flow, what needs the database is answered 503."""

    status: str
    database: str


class Alive(msgspec.Struct):
    """This worker answers."""

    status: str


class Version(msgspec.Struct):
    """What runs here."""

    name: str
    version: str


@endpoint("GET", "/health", permission="public", response=Health, summary="Whether all is well", tags=TAGS)
async def health(request: ApiRequest) -> object:
    """Always 200: a gateway without its database goes on serving Redis commands."""
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            await request.context.database.fetchval("SELECT 1")
    except (DatabaseAway, TimeoutError):
        return Health("degraded", "away")
    return Health("ok", "ok")


@endpoint("GET", "/health/live", permission="public", response=Alive, summary="Whether it lives", tags=TAGS)
async def live(request: ApiRequest) -> object:
    """For liveness probes: asks nothing else."""
    return Alive("ok")


@endpoint("GET", "/health/ready", permission="public", response=Alive, summary="Whether to send requests", tags=TAGS)
async def ready(request: ApiRequest) -> object:
    """For readiness probes: 200 while requests are taken, 503 once the gateway is draining.

    PostgreSQL being away does not make it unready: every replica would be at the same moment, and the commands that
    flow without it would stop.
    """
    return Alive("ok")


@endpoint("GET", "/version", permission="public", response=Version, summary="Which release this is", tags=TAGS)
async def version(request: ApiRequest) -> object:
    """The release that runs."""
    return Version("RedisGate", redisgate.__version__)


class Stats(msgspec.Struct):
    """Of the whole deployment."""

    users: int
    organizations: int
    organizations_by_plan: dict[str, int]
    instances: int
    instances_by_status: dict[str, int]
    instance_memory_bytes: int
    api_keys: int
    sessions: int
    hosts: list[dict[str, Any]]
    database_bytes: int


@endpoint("GET", "/stats", permission="admin", response=Stats, summary="Statistics of the deployment", tags=TAGS)
async def stats(request: ApiRequest) -> object:
    """Counts of what there is, for administrators of the platform."""
    async with request.context.database.transaction() as connection:
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        counts = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM users) AS users,"
            " (SELECT count(*) FROM organizations WHERE deleted_at IS NULL) AS organizations,"
            " (SELECT count(*) FROM instances WHERE deleted_at IS NULL) AS instances,"
            " (SELECT coalesce(sum(max_memory), 0) FROM instances WHERE deleted_at IS NULL) AS memory,"
            " (SELECT count(*) FROM api_keys WHERE revoked_at IS NULL AND expires_at > now()) AS api_keys,"
            " (SELECT count(*) FROM sessions WHERE revoked_at IS NULL AND expires_at > now()) AS sessions,"
            " pg_database_size(current_database()) AS database_bytes"
        )
        assert counts is not None
        plans = await connection.fetch(
            "SELECT plan, count(*) FROM organizations WHERE deleted_at IS NULL GROUP BY plan ORDER BY plan"
        )
        statuses = await connection.fetch(
            "SELECT status, count(*) FROM instances WHERE deleted_at IS NULL GROUP BY status ORDER BY status"
        )
        hosts = await connection.fetch("SELECT id, name, redis_versions, started_at, seen_at FROM hosts ORDER BY name")
    return Stats(
        users=counts["users"],
        organizations=counts["organizations"],
        organizations_by_plan={row[0]: row[1] for row in plans},
        instances=counts["instances"],
        instances_by_status={row[0]: row[1] for row in statuses},
        instance_memory_bytes=int(counts["memory"]),
        api_keys=counts["api_keys"],
        sessions=counts["sessions"],
        hosts=[dict(host) for host in hosts],
        database_bytes=counts["database_bytes"],
    )


@endpoint(
    "GET",
    "/openapi.json",
    permission="public",
    summary="This description",
    tags=TAGS,
    content_type="application/json;x",
)
async def openapi(request: ApiRequest) -> object:
    """The API as an OpenAPI 3.1 document."""
    return Response(
        msgspec.json.encode(document()), media_type="application/json", headers={"Cache-Control": "no-cache"}
    )


@endpoint("GET", "/docs", permission="public", summary="The API for people", tags=TAGS, content_type="text/html")
async def docs(request: ApiRequest) -> object:
    """This description as a page that loads nothing from elsewhere."""
    return Response(
        docs_page(),
        media_type="text/html",
        headers={
            "Cache-Control": "no-cache",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none';"
            " form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        },
    )
