"""Pages for administrators of the platform."""

from datetime import timedelta
from typing import Any

from starlette.responses import Response

from control import administration, hosts, organizations, quotas, workers
from control.administration import find_user
from control.dashboard import audit_log
from control.dashboard.forms import MAX_SEARCH, PAGE_SIZE, page_count, page_number
from control.dashboard.quota import shown, wanted_quota
from control.http import MAX_PAGE_LIMIT, ApiError
from control.pages import PageRequest, page, redirect, render
from control.routes import admin as routes
from control.routes import organizations as organization_routes
from control.routes import quota as quota_routes
from control.routes import service
from control.routes.admin import UpdateUser
from control.routes.organizations import SetPlan

STATUSES = ("running", "pending", "creating", "updating", "stopping", "stopped", "error", "deleting")


def _search(request: PageRequest) -> str:
    return request.query.get("search", "").strip()[:MAX_SEARCH].replace("\0", "")


@page("GET", "/admin", permission="admin")
async def platform(request: PageRequest) -> Response:
    """How the deployment is."""
    stats: Any = await service.stats(request)
    away = request.context.now() - timedelta(seconds=hosts.AWAY_SECONDS)
    async with request.context.database.connection() as connection:
        found = await workers.list_workers(connection)
    return await render(
        request,
        "admin/platform.html",
        stats=stats,
        hosts=[host | {"away": host["seen_at"] < away} for host in stats.hosts],
        workers=found,
    )


@page("GET", "/admin/organizations", permission="admin")
async def list_organizations(request: PageRequest) -> Response:
    """All organizations."""
    search, number = _search(request), page_number(request)
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_organizations(
            connection, search=search or None, page=number, limit=PAGE_SIZE
        )
    return await render(
        request,
        "admin/organizations.html",
        organizations=rows,
        search=search,
        total=total,
        number=number,
        pages=page_count(total),
    )


@page("GET", "/admin/organizations/{org_id}", permission="admin")
async def organization(request: PageRequest) -> Response:
    """One organization: its plan, its limits, who belongs to it."""
    return await _organization(request)


async def _organization(request: PageRequest, error: ApiError | None = None, section: str = "") -> Response:
    async with request.context.database.connection() as connection:
        found = await organizations.get_organization(connection, request.organization_id, None)
        quota = await quotas.get_quota(connection, request.organization_id)
        members, member_total = await organizations.list_members(
            connection, request.organization_id, page=1, limit=MAX_PAGE_LIMIT
        )
    return await render(
        request,
        "admin/organization.html",
        error=error,
        section=section,
        organization=found,
        quota=quota,
        plans=list(quotas.PLANS),
        shown=shown(quota.limits),
        plan_shown=shown(quotas.PLANS[quota.plan]),
        members=members,
        member_total=member_total,
    )


@page("POST", "/admin/organizations/{org_id}/plan", permission="admin")
async def set_plan(request: PageRequest) -> Response:
    """Another plan, and with it all limits."""
    try:
        await organization_routes.put_plan(request, request.body(SetPlan))
    except ApiError as error:
        return await _organization(request, error, "plan")
    return redirect(request, f"/admin/organizations/{request.organization_id}", "admin.plan_set")


@page("POST", "/admin/organizations/{org_id}/quota", permission="admin")
async def set_quota(request: PageRequest) -> Response:
    """Limits of its own."""
    try:
        await quota_routes.put_quota(request, wanted_quota(request))
    except ApiError as error:
        return await _organization(request, error, "quota")
    return redirect(request, f"/admin/organizations/{request.organization_id}", "common.saved")


@page("GET", "/admin/instances", permission="admin")
async def list_instances(request: PageRequest) -> Response:
    """All instances, those in error first."""
    search, number = _search(request), page_number(request)
    status = request.query.get("status", "")
    status = status if status in STATUSES else ""
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_instances(
            connection, search=search or None, status=status or None, page=number, limit=PAGE_SIZE
        )
    return await render(
        request,
        "admin/instances.html",
        instances=rows,
        search=search,
        wanted=status,
        statuses=STATUSES,
        total=total,
        number=number,
        pages=page_count(total),
    )


# People


@page("GET", "/admin/users", permission="admin")
async def list_users(request: PageRequest) -> Response:
    """All people."""
    search, number = _search(request), page_number(request)
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_users(connection, search=search or None, page=number, limit=PAGE_SIZE)
    return await render(
        request,
        "admin/users.html",
        users=rows,
        search=search,
        total=total,
        number=number,
        pages=page_count(total),
    )


@page("GET", "/admin/users/{user_id}", permission="admin")
async def user(request: PageRequest) -> Response:
    """One person, and where they belong."""
    return await _user(request)


async def _user(request: PageRequest, error: ApiError | None = None) -> Response:
    async with request.context.database.connection() as connection:
        found = await find_user(connection, request.path["user_id"])
        belongs, total = await organizations.list_organizations(connection, found["id"], page=1, limit=MAX_PAGE_LIMIT)
    return await render(
        request,
        "admin/user.html",
        error=error,
        user=found,
        own=found["id"] == request.user_id,
        organizations=belongs,
        total=total,
    )


@page("POST", "/admin/users/{user_id}", permission="admin")
async def update_user(request: PageRequest) -> Response:
    """Administrator or not, shut out or not."""
    try:
        await routes.update_user(request, request.body(UpdateUser))
    except ApiError as error:
        return await _user(request, error)
    return redirect(request, request.raw.url.path, "common.saved")


@page("GET", "/admin/audit", permission="admin")
async def platform_audit(request: PageRequest) -> Response:
    """What was done on the whole platform."""
    return await audit_log.show(request, "admin/audit.html", None)
