"""What an organization has at a glance: its instances as they are now, its quota, what was done last."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from starlette.responses import Response

from control import activity, instances, organizations, quotas
from control.audit import Filter, list_events
from control.charts import sparkline
from control.dashboard import events
from control.dashboard.forms import page_count, page_number
from control.database import Connection, Record
from control.pages import PageRequest, page, render
from control.roles import allows
from redisgate.units import bytes_text, number_text

INSTANCES_SHOWN: Final = 24
"""On one page."""
EVENTS_READ: Final = 40
"""Of the audit log, for the overview: equal neighbours are shown as one."""
EVENTS_SHOWN: Final = 8
DELETED_SHOWN: Final = 5
"""Of the instances that can be restored."""
SAMPLE_MINUTES: Final = 10
"""What an instance's server said of itself longer ago than that is not shown as if it were now."""


@page("GET", "/dashboard/{org_id}", permission="organization.read")
async def overview(request: PageRequest) -> Response:
    """The organization at a glance."""
    context, organization_id = request.context, request.organization_id
    number = page_number(request)
    found, total = await instances.list_instances(
        context.database,
        organization_id,
        deleted=False,
        status=None,
        only=None,
        page=number,
        limit=INSTANCES_SHOWN,
    )
    deleted, deleted_total = await instances.list_instances(
        context.database, organization_id, deleted=True, status=None, only=None, page=1, limit=DELETED_SHOWN
    )
    assert request.principal.role is not None
    ids = [row["id"] for row in found]
    async with context.database.connection() as connection:
        organization = await organizations.get_organization(connection, organization_id, request.principal.role)
        quota = await quotas.get_quota(connection, organization_id)
        samples = await latest_samples(connection, ids)
        rates = await activity.recent_rates(connection, organization_id, ids, context.now())
        latest: list[dict[str, Any]] = []
        if allows(request.principal.role, "audit.read"):
            latest, _ = await list_events(connection, Filter(organization_id), page=1, limit=EVENTS_READ)
        described = await events.described(connection, latest)
    return await render(
        request,
        "organization/overview.html",
        organization=organization,
        instances=[
            dict(row) | {"sample": samples.get(row["id"])} | _traffic(request, row["name"], rates[row["id"]])
            for row in found
        ],
        total=total,
        number=number,
        pages=page_count(total, INSTANCES_SHOWN),
        deleted=deleted,
        deleted_total=deleted_total,
        quota=quota,
        warnings=warnings(request, quota),
        events=events.grouped(described)[:EVENTS_SHOWN],
    )


def _traffic(request: PageRequest, name: str, rates: Sequence[float]) -> dict[str, Any]:
    label = request.texts("organization.overview.sparkline", name=name, peak=number_text(max(rates), 1))
    return {
        "sparkline": sparkline(rates, label, 320, 44) if any(rates) else None,
        "hour": round(sum(rates) * 60),
    }


async def latest_samples(connection: Connection, ids: Sequence[UUID]) -> dict[UUID, Record]:
    """What the servers of instances last said of themselves, where that is not long ago."""
    rows = await connection.fetch(
        "SELECT DISTINCT ON (instance_id) instance_id, at, keys, memory, connections FROM instance_samples"
        " WHERE instance_id = ANY ($1) AND at > now() - make_interval(mins => $2) ORDER BY instance_id, at DESC",
        ids,
        SAMPLE_MINUTES,
    )
    return {row["instance_id"]: row for row in rows}


def warnings(request: PageRequest, quota: quotas.Quota) -> list[str]:
    """What is nearly or wholly used up, in the person's language."""
    limits, usage = quota.limits, quota.usage
    used: dict[str, tuple[str, str]] = {
        "instances": (number_text(usage.instances), number_text(limits.max_instances)),
        "memory": (bytes_text(usage.memory), bytes_text(limits.max_memory)),
        "api_keys": (number_text(usage.api_keys), number_text(limits.max_api_keys)),
        "commands": (number_text(usage.commands_today), number_text(limits.commands_per_day)),
    }
    return [
        request.texts(f"organization.warning.{name}", used=used[name][0], limit=used[name][1])
        for name, percent in usage.percentages(limits).items()
        if percent >= quotas.WARNING_PERCENT
    ]
