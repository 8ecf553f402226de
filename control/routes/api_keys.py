"""API keys over HTTP. What they do stands in `control.api_keys`."""

from datetime import datetime
from uuid import UUID

import msgspec

from control import api_keys, roles
from control.api_keys import CreateApiKey, RotateApiKey, UpdateApiKey
from control.http import ApiRequest, Reply, endpoint, page

_PATH = "/api/organizations/{org_id}/api-keys"
_TAGS = ("API keys",)


class ApiKey(msgspec.Struct):
    """A key without its secret. `key_prefix` is for people to tell keys apart; `last_used_at` is right to a minute.

    `instance_ids` null: every instance of the organization. `valid_until`: of a key that was rotated.
    """

    id: UUID
    organization_id: UUID
    user_id: UUID
    name: str
    key_prefix: str
    scopes: list[str]
    instance_ids: list[UUID] | None
    key_prefixes: list[str]
    allowed_networks: list[str]
    requests_per_second: int | None
    commands_per_day: int | None
    expires_at: datetime
    revoked_at: datetime | None
    valid_until: datetime | None
    rotated_from: UUID | None
    last_used_at: datetime | None
    last_used_from: str | None
    created_at: datetime
    updated_at: datetime


class NewApiKey(msgspec.Struct):
    """A key, which is shown here and never again, and its record."""

    key: str
    api_key: ApiKey


class ListApiKeys(msgspec.Struct):
    """Which to list; `all` are also those that were revoked or rotated, or have expired."""

    page: int = 1
    limit: int = 20
    all: bool = False


@endpoint(
    "POST",
    _PATH,
    permission="api_keys.create",
    body=CreateApiKey,
    response=NewApiKey,
    status=201,
    summary="Create an API key",
    tags=_TAGS,
    message="API key created; it is shown only now",
)
async def create(request: ApiRequest, body: CreateApiKey) -> object:
    """Scopes for the data plane: `read`, `write`, `+command`, `+@category`, `-command`, `-@category`. For managing:
    `manage`, `manage:read` and single permissions. A key may never do more than the person who made it.
    """
    async with request.context.database.transaction() as connection:
        key, row = await api_keys.create(
            request.context,
            connection,
            request,
            request.organization_id,
            request.user_id,
            _role(request),
            body,
            maker_id=request.principal.api_key_id,
        )
    return {"key": key, "api_key": api_keys.view(row)}


@endpoint(
    "GET",
    _PATH,
    permission="api_keys.read",
    query=ListApiKeys,
    response=ApiKey,
    listing=True,
    summary="List API keys",
    tags=_TAGS,
)
async def list_keys(request: ApiRequest) -> object:
    """The newest first."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await api_keys.list_keys(
            connection, request.organization_id, page=number, limit=limit, all_of_them=request.parameters.all
        )
    return page([api_keys.view(row) for row in rows], total, number, limit)


@endpoint("GET", _PATH + "/{key_id}", permission="api_keys.read", response=ApiKey, summary="See an API key", tags=_TAGS)
async def get(request: ApiRequest) -> object:
    """Also one that was revoked, rotated, or has expired."""
    async with request.context.database.connection() as connection:
        return api_keys.view(await api_keys.find(connection, request.organization_id, request.path["key_id"]))


@endpoint(
    "PATCH",
    _PATH + "/{key_id}",
    permission="api_keys.update",
    body=UpdateApiKey,
    response=ApiKey,
    summary="Rename an API key",
    tags=_TAGS,
)
async def rename(request: ApiRequest, body: UpdateApiKey) -> object:
    """One's own, or as an admin anybody's."""
    async with request.context.database.transaction() as connection:
        row = await api_keys.rename(
            connection, request, request.organization_id, request.path["key_id"], body.name, whose=_whose(request)
        )
    return api_keys.view(row)


@endpoint(
    "POST",
    _PATH + "/{key_id}/rotate",
    permission="api_keys.rotate",
    body=RotateApiKey,
    response=NewApiKey,
    status=201,
    summary="Replace an API key",
    tags=_TAGS,
    message="a new API key, shown only now; the old one works until its valid_until",
)
async def rotate(request: ApiRequest, body: RotateApiKey) -> object:
    """The new key may do what the old one may, and has its limits; the old one goes on working for a while."""
    async with request.context.database.transaction() as connection:
        key, row = await api_keys.rotate(
            request.context,
            connection,
            request,
            request.organization_id,
            request.path["key_id"],
            request.user_id,
            _role(request),
            body,
            whose=_whose(request),
            maker_id=request.principal.api_key_id,
        )
    return {"key": key, "api_key": api_keys.view(row)}


@endpoint(
    "DELETE",
    _PATH + "/{key_id}",
    permission="api_keys.revoke",
    response=ApiKey,
    summary="Revoke an API key",
    tags=_TAGS,
    message="API key revoked",
)
async def revoke(request: ApiRequest) -> object:
    """It ends within a second on every gateway; two where notifications do not arrive."""
    async with request.context.database.transaction() as connection:
        row = await api_keys.revoke(
            connection, request, request.organization_id, request.path["key_id"], whose=_whose(request)
        )
    return Reply(api_keys.view(row))


def _role(request: ApiRequest) -> str:
    assert request.principal.role is not None
    return request.principal.role


def _whose(request: ApiRequest) -> UUID | None:
    """Whose keys may be changed; None: anybody's."""
    return None if roles.rank(_role(request)) >= roles.rank("admin") else request.user_id
