"""The audit log for people: filtered, with what changed, to export; and whether its chain holds."""

from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

from starlette.responses import Response

from control import audit
from control.audit import Filter, list_events
from control.dashboard import events
from control.dashboard.forms import PAGE_SIZE, page_count, page_number
from control.http import ApiError, BadRequest
from control.pages import PageRequest, page, render

AREAS: Final = (
    "instances",
    "api_keys",
    "members",
    "invitations",
    "organization",
    "quota",
    "console",
    "users",
    "sessions",
    "platform",
    "log_level",
)
"""What actions begin with."""
OUTCOMES: Final = ("success", "failure", "denied")
MAX_TEXT: Final = 100
"""Characters of one field of the filter."""
_ACTIONS: Final = "organization.action."


@page("GET", "/dashboard/{org_id}/audit", permission="audit.read")
async def audit_log(request: PageRequest) -> Response:
    """What was done in the organization, the newest first."""
    return await show(request, "organization/audit.html", request.organization_id)


async def show(request: PageRequest, template: str, organization_id: UUID | None) -> Response:
    """The log of one organization, or of the platform."""
    error = None
    number = page_number(request)
    asked = {
        name: value
        for name in ("action", "actor_id", "target_kind", "target_id", "outcome", "since", "until")
        if (value := request.query.get(name, "").strip()[:MAX_TEXT].replace("\0", ""))
    }
    try:
        wanted = read_filter(request, asked, organization_id)
    except ApiError as problem:
        error, wanted = problem, Filter(organization_id)
    async with request.context.database.connection() as connection:
        found, total = await list_events(connection, wanted, page=number, limit=PAGE_SIZE)
        described = await events.described(connection, found)
        chain = await audit.last_check(connection)
        head = await audit.current_head(connection)
    return await render(
        request,
        template,
        error=error,
        events=described,
        asked=asked,
        actor=_actor_name(found, asked.get("actor_id")),
        areas=AREAS,
        actions=[key.removeprefix(_ACTIONS) for key in sorted(request.texts.keys()) if key.startswith(_ACTIONS)],
        outcomes=OUTCOMES,
        export=urlencode(_for_api(wanted)),
        chain=chain,
        head=head,
        total=total,
        number=number,
        pages=page_count(total),
    )


def _actor_name(found: list[dict[str, Any]], actor_id: str | None) -> str | None:
    if actor_id is None:
        return None
    return next((event["actor"]["name"] for event in found if event["actor"]["name"]), actor_id)


def read_filter(request: PageRequest, asked: dict[str, str], organization_id: UUID | None) -> Filter:
    """What the fields of the filter ask for; days are whole days in UTC, the last one included. Raises BadRequest."""
    fields: dict[str, str] = {}

    def day(name: str) -> datetime | None:
        try:
            found = date.fromisoformat(asked[name]) if name in asked else None
            later = timedelta(days=name == "until")
            return None if found is None else datetime(found.year, found.month, found.day, tzinfo=UTC) + later
        except (ValueError, OverflowError):
            fields[name] = request.texts("organization.audit.no_day")
            return None

    actor = None
    if "actor_id" in asked:
        try:
            actor = UUID(asked["actor_id"])
        except ValueError:
            fields["actor_id"] = request.texts("organization.audit.no_actor")
    outcome = asked.get("outcome")
    wanted = Filter(
        organization_id,
        action=asked.get("action"),
        actor_id=actor,
        target_kind=asked.get("target_kind"),
        target_id=asked.get("target_id"),
        outcome=outcome if outcome in OUTCOMES else None,
        since=day("since"),
        until=day("until"),
    )
    if fields:
        raise BadRequest(request.texts("organization.audit.wrong_filter"), fields)
    return wanted


def _for_api(wanted: Filter) -> dict[str, str]:
    """The filter as the API's export takes it."""
    values: dict[str, Any] = {
        "action": wanted.action,
        "actor_id": wanted.actor_id,
        "target_kind": wanted.target_kind,
        "target_id": wanted.target_id,
        "outcome": wanted.outcome,
        "since": None if wanted.since is None else wanted.since.isoformat(),
        "until": None if wanted.until is None else wanted.until.isoformat(),
    }
    return {name: str(value) for name, value in values.items() if value is not None}
