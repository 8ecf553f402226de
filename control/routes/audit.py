"""The audit log over HTTP: of one organization, or of all for administrators."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from msgspec import Meta
from starlette.responses import StreamingResponse

from control.audit import Filter, export, list_events
from control.http import ApiRequest, endpoint, page

TAGS: Final = ["Audit log"]
JSON_LINES: Final = "application/x-ndjson"

Word = Annotated[str, Meta(max_length=100)]


class AuditQuery(msgspec.Struct):
    """Which events. `action` may end in `*`; `since` (inclusive) and `until` (exclusive) are times as in RFC 3339."""

    action: Word | None = None
    actor_id: UUID | None = None
    target_kind: Word | None = None
    target_id: Word | None = None
    outcome: Literal["success", "failure", "denied"] | None = None
    since: datetime | None = None
    until: datetime | None = None
    organization_id: UUID | None = None


class Actor(msgspec.Struct):
    """Who did it."""

    kind: Literal["user", "api_key", "system", "anonymous"]
    id: UUID | None
    name: str | None


class Target(msgspec.Struct):
    """What it was done to."""

    kind: str
    id: str | None


class AuditEvent(msgspec.Struct):
    """Something that was done."""

    sequence: int
    at: datetime
    organization_id: UUID | None
    actor: Actor
    action: str
    target: Target
    outcome: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    address: str | None
    request_id: str | None


def _filter(request: ApiRequest) -> Filter:
    query: AuditQuery = request.parameters
    organization_id = request.path.get("org_id")
    return Filter(
        organization_id=query.organization_id if organization_id is None else organization_id,
        action=query.action,
        actor_id=query.actor_id,
        target_kind=query.target_kind,
        target_id=query.target_id,
        outcome=query.outcome,
        since=_utc(query.since),
        until=_utc(query.until),
    )


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


async def _list(request: ApiRequest) -> object:
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        events, total = await list_events(connection, _filter(request), page=number, limit=limit)
    return page(events, total, number, limit)


def _export(request: ApiRequest) -> StreamingResponse:
    return StreamingResponse(
        export(request.context.database, _filter(request)),
        media_type=JSON_LINES,
        headers={"Content-Disposition": 'attachment; filename="audit-log.jsonl"'},
    )


@endpoint(
    "GET",
    "/api/organizations/{org_id}/audit-logs",
    permission="audit.read",
    query=AuditQuery,
    response=AuditEvent,
    listing=True,
    summary="What was done in the organization",
    tags=TAGS,
)
async def list_audit_log(request: ApiRequest) -> object:
    """Who did what, from where, with which outcome; the newest first."""
    return await _list(request)


@endpoint(
    "GET",
    "/api/organizations/{org_id}/audit-logs/export",
    permission="audit.read",
    query=AuditQuery,
    summary="The organization's audit log as JSON lines",
    tags=TAGS,
    content_type=JSON_LINES,
)
async def export_audit_log(request: ApiRequest) -> object:
    """One event per line, the oldest first."""
    return _export(request)


@endpoint(
    "GET",
    "/api/audit-logs",
    permission="admin",
    query=AuditQuery,
    response=AuditEvent,
    listing=True,
    summary="What was done on the platform",
    tags=TAGS,
)
async def list_all(request: ApiRequest) -> object:
    """The audit log of all organizations, and of what belongs to none, such as sign-ins; the newest first."""
    return await _list(request)


@endpoint(
    "GET",
    "/api/audit-logs/export",
    permission="admin",
    query=AuditQuery,
    summary="The audit log as JSON lines",
    tags=TAGS,
    content_type=JSON_LINES,
)
async def export_all(request: ApiRequest) -> object:
    """One event per line, the oldest first."""
    return _export(request)
