"""API keys: what there are, a new one, one of them: rename, replace, revoke. The key itself is shown once."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from starlette.responses import Response

from control import api_keys, instances, quotas, roles
from control.api_keys import CreateApiKey, RotateApiKey, UpdateApiKey
from control.dashboard.forms import (
    PAGE_SIZE,
    check_confirmed,
    instance_names,
    one_line,
    page_count,
    page_number,
    people,
)
from control.database import Record
from control.http import ApiError
from control.pages import PageRequest, page, redirect, render
from control.routes import api_keys as routes

_PATH: Final = "/dashboard/{org_id}/keys"
LIFETIMES: Final = (7, 30, 90, 365, 3650)
"""Days that are offered for a new key."""
OVERLAPS: Final = (0, 3600, 86400, 7 * 86400, 30 * 86400)
"""Seconds that are offered for a key's life beside its successor."""


def state(row: Record, now: datetime) -> str:
    """What has become of a key: active, rotated (works for a while yet), revoked or expired."""
    if row["revoked_at"] is not None:
        return "revoked"
    if row["expires_at"] <= now or (row["valid_until"] is not None and row["valid_until"] <= now):
        return "expired"
    return "active" if row["valid_until"] is None else "rotated"


def access(scopes: Sequence[str]) -> str:
    """What a key may do with data: write, read or none."""
    return next((one for one in (api_keys.WRITE, api_keys.READ) if one in scopes), "none")


@page("GET", _PATH, permission="api_keys.read")
async def listing(request: PageRequest) -> Response:
    """The organization's keys; with `all`, also those that are good for nothing any more."""
    context, number, everything = request.context, page_number(request), request.query.get("all") == "1"
    async with context.database.connection() as connection:
        rows, total = await api_keys.list_keys(
            connection, request.organization_id, page=number, limit=PAGE_SIZE, all_of_them=everything
        )
        owners = await people(connection, [row["user_id"] for row in rows])
        names = await instance_names(connection, [one for row in rows for one in row["instance_ids"] or ()])
        quota = await quotas.get_quota(connection, request.organization_id)
    now = context.now()
    return await render(
        request,
        "organization/keys.html",
        keys=[_shown(row, now) | {"owner": owners[row["user_id"]]} for row in rows],
        names=names,
        everything=everything,
        quota=quota,
        total=total,
        number=number,
        pages=page_count(total),
    )


def _shown(row: Record, now: datetime) -> dict[str, Any]:
    scopes = row["scopes"]
    return api_keys.view(row) | {
        "state": state(row, now),
        "access": access(scopes),
        "only": [scope for scope in scopes if scope.startswith("+")],
        "never": [scope for scope in scopes if scope.startswith("-")],
        "managing": [scope for scope in scopes if roles.is_managing_scope(scope)],
    }


# A new key


@page("GET", _PATH + "/new", permission="api_keys.create")
async def new(request: PageRequest) -> Response:
    """What the new key may do."""
    return await _new(request)


async def _new(request: PageRequest, error: ApiError | None = None) -> Response:
    found, total = await instances.list_instances(
        request.context.database,
        request.organization_id,
        deleted=False,
        status=None,
        only=None,
        page=1,
        limit=api_keys.MAX_LISTED,
    )
    role = request.principal.role
    assert role is not None
    return await render(
        request,
        "organization/key_new.html",
        error=error,
        instances=sorted(found, key=lambda row: row["name"].lower()),
        total=total,
        lifetimes=LIFETIMES,
        permissions=[one for one in roles.PERMISSIONS.values() if roles.allows(role, one.name)],
    )


@page("POST", _PATH, permission="api_keys.create")
async def create(request: PageRequest) -> Response:
    """Make the key, and show it."""
    form = request.form
    values: dict[str, Any] = {"scopes": _scopes(request)}
    if form.get("key_prefixes"):
        # Not at commas, which a key may contain.
        values["key_prefixes"] = [line.strip() for line in form.get("key_prefixes").split("\n") if line.strip()]
    try:
        made: Any = await routes.create(request, request.body(CreateApiKey, values))
    except ApiError as error:
        return await _new(request, error)
    return await _made(request, made)


def _scopes(request: PageRequest) -> list[str]:
    form = request.form
    chosen = {"write": [api_keys.READ, api_keys.WRITE], "read": [api_keys.READ]}.get(form.get("access"), [])
    for sign, name in (("+", "only"), ("-", "never")):
        words = form.get(name).replace(",", " ").split()
        chosen += [sign + word.removeprefix(sign) for word in words]
    managing = form.get("managing")
    if managing == "some":
        chosen += form.all("permissions")
    elif managing:
        chosen.append(managing)
    return chosen


async def _made(request: PageRequest, made: dict[str, Any], replaces: Record | None = None) -> Response:
    key = made["api_key"]
    async with request.context.database.connection() as connection:
        names = await instance_names(connection, key["instance_ids"] or ())
        example = await connection.fetchval(
            "SELECT id FROM instances WHERE organization_id = $1 AND deleted_at IS NULL"
            " AND ($2::uuid[] IS NULL OR id = ANY ($2)) ORDER BY created_at, id LIMIT 1",
            request.organization_id,
            key["instance_ids"],
        )
    return await render(
        request,
        "organization/key_made.html",
        status=201,
        key=made["key"],
        record=key,
        access=access(key["scopes"]),
        names=names,
        example=example,
        replaces=replaces,
    )


# One key


@page("GET", _PATH + "/{key_id}", permission="api_keys.read")
async def one(request: PageRequest) -> Response:
    """What a key may do, and who used it last."""
    return await _one(request)


async def _one(request: PageRequest, error: ApiError | None = None, section: str = "") -> Response:
    context = request.context
    async with context.database.connection() as connection:
        row = await api_keys.find(connection, request.organization_id, request.path["key_id"])
        owners = await people(connection, [row["user_id"]])
        names = await instance_names(connection, row["instance_ids"] or ())
        successor = await connection.fetchval(
            "SELECT id FROM api_keys WHERE rotated_from = $1 ORDER BY created_at DESC LIMIT 1", row["id"]
        )
    role = request.principal.role
    assert role is not None
    own = row["user_id"] == request.user_id
    return await render(
        request,
        "organization/key.html",
        error=error,
        section=section,
        key=_shown(row, context.now()),
        owner=owners[row["user_id"]],
        own=own,
        may_change=own or roles.rank(role) >= roles.rank("admin"),
        names=names,
        successor=successor,
        overlaps=OVERLAPS,
        overlap=int(context.settings.rotation_overlap),
        typed=one_line(row["name"]),
    )


@page("POST", _PATH + "/{key_id}", permission="api_keys.update")
async def rename(request: PageRequest) -> Response:
    """Rename a key, and show it again."""
    try:
        await routes.rename(request, request.body(UpdateApiKey))
    except ApiError as error:
        return await _one(request, error, "rename")
    return redirect(request, request.raw.url.path, "common.saved")


@page("POST", _PATH + "/{key_id}/rotate", permission="api_keys.rotate")
async def rotate(request: PageRequest) -> Response:
    """A new key in its place, shown once."""
    try:
        async with request.context.database.connection() as connection:
            old = await api_keys.find(connection, request.organization_id, request.path["key_id"])
        made: Any = await routes.rotate(request, request.body(RotateApiKey))
        async with request.context.database.connection() as connection:
            old = await api_keys.find(connection, request.organization_id, old["id"])
    except ApiError as error:
        return await _one(request, error, "rotate")
    return await _made(request, made, old)


@page("POST", _PATH + "/{key_id}/revoke", permission="api_keys.revoke")
async def revoke(request: PageRequest) -> Response:
    """End it."""
    try:
        async with request.context.database.connection() as connection:
            row = await api_keys.find(connection, request.organization_id, request.path["key_id"])
        check_confirmed(request, row["name"])
        await routes.revoke(request)
    except ApiError as error:
        return await _one(request, error, "revoke")
    return redirect(
        request, f"/dashboard/{request.organization_id}/keys", "organization.keys.revoked", name=row["name"]
    )
