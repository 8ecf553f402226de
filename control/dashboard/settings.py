"""An organization's own settings: its name; leaving and deleting it."""

from typing import Any

from starlette.responses import Response

from control import organizations
from control.dashboard.forms import check_confirmed, one_line
from control.http import ApiError
from control.pages import PageRequest, page, redirect, render
from control.routes import organizations as routes
from control.routes.organizations import UpdateOrganization

_PATH = "/dashboard/{org_id}/settings"


@page("GET", _PATH, permission="organization.read")
async def settings(request: PageRequest) -> Response:
    """What the organization is called, and what it is known by."""
    return await _settings(request)


async def _settings(request: PageRequest, error: ApiError | None = None, section: str = "") -> Response:
    async with request.context.database.connection() as connection:
        organization = await _organization(request, connection)
    return await render(
        request,
        "organization/settings.html",
        error=error,
        section=section,
        organization=organization,
        typed=one_line(organization["name"]),
    )


async def _organization(request: PageRequest, connection: Any) -> dict[str, Any]:
    return await organizations.get_organization(connection, request.organization_id, request.principal.role)


@page("POST", _PATH, permission="organization.update")
async def rename(request: PageRequest) -> Response:
    """Rename the organization; its slug stays."""
    try:
        await routes.update_organization(request, request.body(UpdateOrganization))
    except ApiError as error:
        return await _settings(request, error, "rename")
    return redirect(request, request.raw.url.path, "common.saved")


@page("POST", "/dashboard/{org_id}/leave", permission="organization.leave")
async def leave(request: PageRequest) -> Response:
    """End one's own membership."""
    try:
        await _confirm(request)
        await routes.leave(request)
    except ApiError as error:
        return await _settings(request, error, "leave")
    return redirect(request, "/dashboard", "organization.settings.left")


@page("POST", "/dashboard/{org_id}/delete", permission="organization.delete")
async def delete(request: PageRequest) -> Response:
    """Delete the organization, which has no instances any more."""
    try:
        await _confirm(request)
        await routes.delete_organization(request)
    except ApiError as error:
        return await _settings(request, error, "delete")
    return redirect(request, "/dashboard", "organization.settings.deleted")


async def _confirm(request: PageRequest) -> None:
    async with request.context.database.connection() as connection:
        organization = await _organization(request, connection)
    check_confirmed(request, organization["name"])
