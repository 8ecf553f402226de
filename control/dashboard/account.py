"""A person's own pages: profile, organizations, password, sessions, language."""

import re
from typing import Any, Final

from starlette.responses import Response

from control import accounts, organizations
from control.dashboard.forms import PAGE_SIZE, page_count, page_number
from control.http import ApiError, convert_body
from control.pages import PageRequest, page, redirect, render
from control.routes import auth
from control.routes import organizations as routes
from control.routes.auth import ChangePassword, UpdateMe
from control.routes.organizations import CreateOrganization

_BROWSERS: Final = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"))
_SYSTEMS: Final = (
    ("Android", "Android"),
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Windows", "Windows"),
    ("Mac OS", "macOS"),
    ("CrOS", "ChromeOS"),
    ("Linux", "Linux"),
)
MAX_AGENT: Final = 60
"""Characters shown of a program that is no browser we know."""


@page("GET", "/dashboard/account", permission="session")
async def profile(request: PageRequest) -> Response:
    """Who one is, and where one belongs."""
    return await _profile(request)


async def _profile(request: PageRequest, error: ApiError | None = None, section: str = "") -> Response:
    number = page_number(request)
    async with request.context.database.connection() as connection:
        user = await accounts.get_user(connection, request.user_id)
        found, total = await organizations.list_organizations(connection, request.user_id, page=number, limit=PAGE_SIZE)
    return await render(
        request,
        "account/profile.html",
        error=error,
        section=section,
        user=user,
        organizations=found,
        total=total,
        number=number,
        pages=page_count(total),
    )


@page("POST", "/dashboard/account", permission="session")
async def change_profile(request: PageRequest) -> Response:
    """Change names; and, the password being given, the e-mail address."""
    # All of them: an empty name is one that was taken away.
    changes: dict[str, Any] = {name: request.form.get(name) for name in ("username", "first_name", "last_name")}
    async with request.context.database.connection() as connection:
        user = await accounts.get_user(connection, request.user_id)
    if request.form.get("email") != user["email"]:
        changes["email"] = request.form.get("email")
        if request.form.get("current_password"):
            changes["current_password"] = request.form.get("current_password")
    try:
        await auth.update_me(request, convert_body(UpdateMe, changes))
    except ApiError as error:
        return await _profile(request, error, "profile")
    return redirect(request, "/dashboard/account", "common.saved")


@page("POST", "/dashboard/account/organizations", permission="session")
async def create_organization(request: PageRequest) -> Response:
    """Make another organization, and go there."""
    try:
        made: Any = await routes.create_organization(request, request.body(CreateOrganization))
    except ApiError as error:
        return await _profile(request, error, "organizations")
    return redirect(request, f"/dashboard/{made['id']}", "account.organization_made", name=made["name"])


# Password and sessions


@page("GET", "/dashboard/account/security", permission="session")
async def security(request: PageRequest) -> Response:
    """The password, and where one is signed in."""
    return await _security(request)


async def _security(request: PageRequest, error: ApiError | None = None) -> Response:
    number = page_number(request)
    async with request.context.database.connection() as connection:
        rows, total = await accounts.list_sessions(connection, request.user_id, page=number, limit=PAGE_SIZE)
    sessions = [
        dict(row) | {"agent": agent_name(row["user_agent"]), "current": row["id"] == request.principal.session_id}
        for row in rows
    ]
    return await render(
        request,
        "account/security.html",
        error=error,
        sessions=sessions,
        total=total,
        number=number,
        pages=page_count(total),
    )


@page("POST", "/dashboard/account/security", permission="session")
async def change_password(request: PageRequest) -> Response:
    """Set another password; all other sessions end."""
    try:
        await auth.change_password(request, request.body(ChangePassword))
    except ApiError as error:
        return await _security(request, error)
    return redirect(request, "/dashboard/account/security", "account.password_changed")


@page("POST", "/dashboard/account/sessions/end", permission="session")
async def end_others(request: PageRequest) -> Response:
    """End all sessions but this one."""
    ended: Any = await auth.revoke_sessions(request)
    return redirect(request, "/dashboard/account/security", "account.sessions_ended", count=ended["ended_sessions"])


@page("POST", "/dashboard/account/sessions/{session_id}/end", permission="session")
async def end_session(request: PageRequest) -> Response:
    """End one session; one's own signs out."""
    await auth.revoke_session(request)
    if request.path["session_id"] == request.principal.session_id:
        return redirect(request, "/login", "account.signed_out")
    return redirect(request, "/dashboard/account/security", "account.session_ended")


def agent_name(user_agent: str | None) -> str:
    """A browser and its system as people call them, else how the program called itself."""
    text = user_agent or ""
    system = next((name for mark, name in _SYSTEMS if mark in text), "")
    browser = next((name for mark, name in _BROWSERS if mark in text), "")
    if not browser and "Safari/" in text and "Version/" in text:
        browser = "Safari"
    if browser:
        return f"{browser} · {system}" if system else browser
    return re.sub(r"\s+", " ", text)[:MAX_AGENT]
