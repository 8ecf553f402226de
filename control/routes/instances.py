"""Instances over HTTP. What they do stands in `control.instances`."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from control import backups, instances
from control.http import ApiRequest, BadRequest, Forbidden, NotFound, Reply, endpoint, page
from control.instances import ChangeStatus, CreateInstance, RotateCredentials, UpdateInstance

_PATH = "/api/organizations/{org_id}/redis-instances"
_TAGS = ("Redis instances",)

Status = Literal["pending", "creating", "running", "updating", "stopping", "stopped", "error", "deleting"]


class Instance(msgspec.Struct):
    """An instance; `max_memory` in bytes. `status_reason` says why an error is one, and what else there is to know.

    `redis_version` is the version that really runs, null until it does.
    """

    id: UUID
    organization_id: UUID
    name: str
    slug: str
    domain: str | None
    rest_url: str
    status: Status
    status_reason: str | None
    desired_state: Literal["running", "stopped", "deleted"]
    provisioner: Literal["local", "external", "kubernetes"]
    redis_version: str | None
    redis_version_wanted: str | None
    max_memory: int
    eviction: str
    persistence_enabled: bool
    backup_enabled: bool
    cpu_request: str | None
    memory_request: str | None
    external_url: str | None
    created_by: UUID | None
    created_at: datetime
    updated_at: datetime
    status_at: datetime
    deleted_at: datetime | None
    purge_at: datetime | None


class Tokens(msgspec.Struct):
    """What clients send as `Authorization: Bearer …`; the second may only read."""

    token: str | None
    readonly_token: str | None


class InstanceWithTokens(Instance, kw_only=True):
    """An instance, and its tokens where they are new."""

    rest_token: str | None = None
    readonly_rest_token: str | None = None


class TakenStep(msgspec.Struct):
    """Something that was done to bring an instance about."""

    at: datetime
    step: str
    outcome: Literal["done", "failed"]
    detail: str | None


class InstanceWithSteps(Instance, kw_only=True):
    """An instance, and what was done to bring it about, the newest first."""

    steps: list[TakenStep]


class Loading(msgspec.Struct):
    """How far an upload is, in bytes; `loaded`: the instance runs with its data."""

    arrived: int
    total: int
    loaded: bool = False


class ListInstances(msgspec.Struct):
    """Which to list."""

    page: int = 1
    limit: int = 20
    deleted: bool = False
    status: Status | None = None


@endpoint(
    "POST",
    _PATH,
    permission="instances.create",
    body=CreateInstance,
    response=InstanceWithTokens,
    status=201,
    summary="Create an instance",
    tags=_TAGS,
)
async def create(request: ApiRequest, body: CreateInstance) -> object:
    """Waits a few seconds for it to run; `status` says how far it is. The tokens are shown here, and again by
    `credentials`. With `external_url` an existing Redis is registered, after a look at it.
    """
    if request.principal.instance_ids is not None:
        raise Forbidden("this API key is for some instances only, so it creates no others")
    instance_id, tokens = await instances.create(
        request.context, request, request.organization_id, request.user_id, body
    )
    data = await _settled(request, instance_id)
    data |= {"rest_token": tokens["token"], "readonly_rest_token": tokens["readonly_token"]}
    return Reply(data, _told(data, "the instance is running"))


@endpoint(
    "GET",
    _PATH,
    permission="instances.read",
    query=ListInstances,
    response=Instance,
    listing=True,
    summary="List instances",
    tags=_TAGS,
)
async def list_all(request: ApiRequest) -> object:
    """The newest first. `deleted=true` lists those that can still be restored."""
    number, limit = request.paging()
    wanted: ListInstances = request.parameters
    rows, total = await instances.list_instances(
        request.context.database,
        request.organization_id,
        deleted=wanted.deleted,
        status=wanted.status,
        only=request.principal.instance_ids,
        page=number,
        limit=limit,
    )
    return page([instances.view(row, request.context.gateway_settings) for row in rows], total, number, limit)


@endpoint(
    "GET",
    _PATH + "/{instance_id}",
    permission="instances.read",
    response=InstanceWithSteps,
    summary="Look at an instance",
    tags=_TAGS,
)
async def get(request: ApiRequest) -> object:
    """Deleted ones too, until they are purged."""
    database = request.context.database
    row = await instances.find(database, request.organization_id, request.path["instance_id"], deleted=None)
    taken = await instances.steps(database, row["id"])
    return instances.view(row, request.context.gateway_settings) | {"steps": taken}


async def _update(request: ApiRequest, body: UpdateInstance) -> object:
    instance_id = request.path["instance_id"]
    await instances.update(request.context, request, request.organization_id, instance_id, body)
    return await _settled(request, instance_id)


@endpoint(
    "PATCH",
    _PATH + "/{instance_id}",
    permission="instances.update",
    body=UpdateInstance,
    response=Instance,
    summary="Change an instance",
    tags=_TAGS,
)
async def update(request: ApiRequest, body: UpdateInstance) -> object:
    """Its name, its memory, its eviction; the URL of an external one. What is left out stays."""
    return await _update(request, body)


@endpoint(
    "PUT",
    _PATH + "/{instance_id}",
    permission="instances.update",
    body=UpdateInstance,
    response=Instance,
    summary="Change an instance (as PATCH)",
    tags=_TAGS,
)
async def put(request: ApiRequest, body: UpdateInstance) -> object:
    """The same as PATCH: what is left out stays."""
    return await _update(request, body)


@endpoint(
    "PUT",
    _PATH + "/{instance_id}/status",
    permission="instances.status",
    body=ChangeStatus,
    response=Instance,
    summary="Start, stop, restart or reconcile an instance",
    tags=_TAGS,
)
async def change_status(request: ApiRequest, body: ChangeStatus) -> object:
    """An empty body looks at the instance and mends what is not as it should be; so does `reconcile`, which also tries
    a failed creation again.
    """
    instance_id = request.path["instance_id"]
    await instances.change_status(request.context, request, request.organization_id, instance_id, body.action)
    data = await _settled(request, instance_id)
    return Reply(data, _told(data, f"the instance is {data['status']}"))


@endpoint(
    "GET",
    _PATH + "/{instance_id}/credentials",
    permission="instances.credentials",
    response=Tokens,
    summary="Show an instance's tokens",
    tags=_TAGS,
)
async def credentials(request: ApiRequest) -> object:
    """Who looks is put on record."""
    return await instances.reveal(request.context, request, request.organization_id, request.path["instance_id"])


@endpoint(
    "POST",
    _PATH + "/{instance_id}/rotate-credentials",
    permission="instances.rotate",
    body=RotateCredentials,
    response=Tokens,
    summary="Replace an instance's tokens and password",
    tags=_TAGS,
    message="the old tokens have ended",
)
async def rotate(request: ApiRequest, body: RotateCredentials) -> object:
    """The old tokens end at once. The password is between the gateway and Redis; no client notices."""
    tokens = await instances.rotate(
        request.context, request, request.organization_id, request.path["instance_id"], body
    )
    return {"token": tokens.get("token"), "readonly_token": tokens.get("readonly_token")}


@endpoint(
    "DELETE",
    _PATH + "/{instance_id}",
    permission="instances.delete",
    response=Instance,
    summary="Delete an instance",
    tags=_TAGS,
)
async def delete(request: ApiRequest) -> object:
    """It ends at once and counts against no quota any more. Its data stays until `purge_at`; until then `restore`
    brings it back.
    """
    instance_id = request.path["instance_id"]
    await instances.delete(request.context, request, request.organization_id, instance_id)
    data = await _settled(request, instance_id)
    return Reply(data, f"deleted; it can be restored until {data['purge_at'].isoformat(timespec='seconds')}")


@endpoint(
    "POST",
    _PATH + "/{instance_id}/restore",
    permission="instances.restore",
    response=Instance,
    summary="Restore a deleted instance",
    tags=_TAGS,
)
async def restore(request: ApiRequest) -> object:
    """With its data, its tokens and its domain, as long as it was not purged."""
    instance_id = request.path["instance_id"]
    await instances.restore(request.context, request, request.organization_id, instance_id)
    data = await _settled(request, instance_id)
    return Reply(data, _told(data, "the instance is running again"))


@endpoint(
    "GET",
    _PATH + "/{instance_id}/snapshot",
    permission="instances.backup",
    summary="Download an instance's data",
    tags=_TAGS,
    content_type="application/octet-stream",
)
async def snapshot(request: ApiRequest) -> object:
    """As an RDB file, of one moment; a running instance that RedisGate runs itself. The instance goes on working."""
    return await backups.hand_out(request.context, request, request.organization_id, request.path["instance_id"])


@endpoint(
    "PUT",
    _PATH + "/{instance_id}/snapshot",
    permission="instances.load",
    response=Loading,
    summary="Replace an instance's data",
    tags=_TAGS,
    takes="application/octet-stream",
)
async def load_snapshot(request: ApiRequest) -> object:
    """The body is an RDB file, or a part of one with `Content-Range: bytes 0-4194303/9000000`: parts follow each other,
    each of at most `max_body_bytes`, and are answered 202 until the last. It is checked before anything is changed. The
    instance stops for as long as loading takes; if it does not run with the new data, it gets the old back.
    """
    instance_id, context = request.path["instance_id"], request.context
    part = backups.read_part(await request.raw.body(), request.raw.headers.get("content-range"))
    arrived = part.start + len(part.content)
    if not await backups.take_in(context, request, request.organization_id, instance_id, part):
        return Reply(Loading(arrived, part.total), f"{arrived} of {part.total} bytes have arrived", 202)
    generation = await context.database.fetchval("SELECT generation FROM instances WHERE id = $1", instance_id)
    row = await instances.wait_until_settled(context.database, instance_id)
    failure = await backups.how_it_went(context, instance_id, generation)
    if failure is not None:
        raise BadRequest(f"the snapshot was not loaded: {failure}", {"snapshot": failure})
    if row is None or row["load_upload"] is not None:
        return Reply(Loading(arrived, part.total), "it is being loaded; the instance's steps tell when it is", 202)
    return Reply(Loading(arrived, part.total, loaded=True), "the instance runs with the data of the snapshot")


async def _settled(request: ApiRequest, instance_id: UUID) -> dict[str, Any]:
    row = await instances.wait_until_settled(request.context.database, instance_id)
    if row is None:
        raise NotFound("there is no such instance any more")
    return instances.view(row, request.context.gateway_settings)


def _told(data: dict[str, Any], well: str) -> str:
    if data["status"] == "error":
        return f"it did not work: {data['status_reason']}"
    if data["status"] in ("running", "stopped"):
        return well if data["status_reason"] is None else f"{well}; note: {data['status_reason']}"
    return f"it is {data['status']}; ask again in a moment"
