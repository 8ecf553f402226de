"""For administrators of the platform: all organizations, all people, all instances, the workers."""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from msgspec import Meta

from control import administration, workers
from control.http import ApiRequest, endpoint, page
from control.routes.auth import User
from control.routes.instances import Status

TAGS: Final = ("Platform",)

Search = Annotated[str, Meta(max_length=100)]


class SearchQuery(msgspec.Struct):
    """What names contain."""

    search: Search | None = None


class InstancesQuery(msgspec.Struct):
    """What names contain, and in which state."""

    search: Search | None = None
    status: Status | None = None


class OrganizationInUse(msgspec.Struct):
    """An organization with what it uses; memory in bytes."""

    id: UUID
    name: str
    slug: str
    plan: str
    created_at: datetime
    members: int
    instances: int
    max_instances: int
    memory: int
    max_memory: int
    api_keys: int
    max_api_keys: int


class Account(User):
    """A person; since when they are shut out, null while they are not."""

    disabled_at: datetime | None = None


class AccountInUse(Account):
    """A person, and to how many organizations they belong."""

    organizations: int = 0


class UpdateUser(msgspec.Struct, forbid_unknown_fields=True):
    """What changes; what is absent stays."""

    is_admin: bool | None = None
    disabled: bool | None = None


class AnyInstance(msgspec.Struct):
    """An instance of any organization; `host` is where a local one runs."""

    id: UUID
    name: str
    slug: str
    status: Status
    status_reason: str | None
    status_at: datetime
    provisioner: str
    max_memory: int
    redis_version: str | None
    created_at: datetime
    organization_id: UUID
    organization: str
    host: str | None


class WorkerState(msgspec.Struct):
    """What a worker says of itself. `lag_ms`: how late its event loop was at most since the report before."""

    connections: int | None
    streams: int
    instances: int
    memory: int | None
    cpu_percent: float
    lag_ms: float


class Worker(msgspec.Struct):
    """A process that serves; `silent`: it has not been heard of lately."""

    id: UUID
    host_id: UUID
    host_name: str
    number: int
    pid: int
    version: str
    started_at: datetime
    seen_at: datetime
    silent: bool
    state: WorkerState


@endpoint(
    "GET",
    "/api/admin/organizations",
    permission="admin",
    query=SearchQuery,
    response=OrganizationInUse,
    listing=True,
    summary="All organizations",
    tags=TAGS,
)
async def list_organizations(request: ApiRequest) -> object:
    """The newest first, with what they use and may use."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_organizations(
            connection, search=request.parameters.search, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "GET",
    "/api/admin/users",
    permission="admin",
    query=SearchQuery,
    response=AccountInUse,
    listing=True,
    summary="All people",
    tags=TAGS,
)
async def list_users(request: ApiRequest) -> object:
    """The newest first."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_users(
            connection, search=request.parameters.search, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "PATCH",
    "/api/admin/users/{user_id}",
    permission="admin",
    body=UpdateUser,
    response=Account,
    summary="Make somebody an administrator, or shut them out",
    tags=TAGS,
)
async def update_user(request: ApiRequest, body: UpdateUser) -> dict[str, Any]:
    """Who is shut out cannot sign in, and their sessions and API keys are refused as long as it lasts. Nobody does this
    to themselves."""
    async with request.context.database.transaction() as connection:
        return await administration.update_user(
            connection,
            request,
            request.user_id,
            request.path["user_id"],
            is_admin=body.is_admin,
            disabled=body.disabled,
        )


@endpoint(
    "GET",
    "/api/admin/instances",
    permission="admin",
    query=InstancesQuery,
    response=AnyInstance,
    listing=True,
    summary="All instances",
    tags=TAGS,
)
async def list_instances(request: ApiRequest) -> object:
    """Those in error first, then the newest."""
    number, limit = request.paging()
    wanted: InstancesQuery = request.parameters
    async with request.context.database.connection() as connection:
        rows, total = await administration.list_instances(
            connection, search=wanted.search, status=wanted.status, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "GET",
    "/api/admin/workers",
    permission="admin",
    response=list[Worker],
    summary="The workers and how they are",
    tags=TAGS,
)
async def list_workers(request: ApiRequest) -> object:
    """Of all hosts; those that have been silent for an hour are no longer listed."""
    async with request.context.database.connection() as connection:
        return await workers.list_workers(connection)
