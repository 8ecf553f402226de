"""The data of an instance as an RDB file: handed out, and taken in to replace what there is.

Both are for local instances, by a gateway on their host. A snapshot comes from Redis over the connection and goes to
the client as it comes; one that is uploaded lies beside the instance, in parts if it is large, until the steward loads
it. What was there before is kept until the new data runs, and put back if it does not.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from control import audit, hosts, instances
from control.database import Connection, Record
from control.http import ApiError, BadRequest, Conflict, Context, TooManyRequests, Unavailable
from control.provisioners import ADMIN_USER, ProvisionError
from control.provisioners.local import OVERHEAD_BYTES
from control.provisioners.snapshots import MAGIC, Occupied, WrongPart, keep_only, receive, take, upload_path
from control.settings import instances_dir
from resp.address import Address

MAX_AT_ONCE: Final = 4
"""Snapshots that one worker hands out at a time, each to another organization; more are told to come again."""
STALL_SECONDS: Final = 10.0
"""For a client to take a piece of a snapshot: who takes longer keeps others from theirs, and is cut off."""
RETRY_SECONDS: Final = 10.0
LOAD_STEP: Final = "load a snapshot"

_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_RUNNING = "backups.running"


@dataclass(frozen=True)
class Part:
    """Bytes of an upload: where they begin, and how many it has altogether."""

    start: int
    total: int
    content: bytes


class SnapshotResponse(StreamingResponse):
    """A snapshot while it comes; the connection to Redis ends with it, however it ends."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], name: str) -> None:
        """`rest` has begun: what has not is closed without a word to anybody."""
        super().__init__(
            self._all(first, rest),
            media_type="application/octet-stream",
            headers={"Content-Disposition": f'attachment; filename="{name}"', "X-Content-Type-Options": "nosniff"},
        )
        self._rest = rest

    @staticmethod
    async def _all(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        yield first
        async for chunk in rest:
            yield chunk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_soon)
        finally:
            await self.close()

    async def close(self) -> None:
        """End it wherever it is."""
        await self._rest.aclose()


async def hand_out(
    context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID
) -> SnapshotResponse:
    """The data of a running instance as a file.

    Raises:
        NotFound, BadRequest, Conflict: there is no such instance, or not here, or it does not run.
        TooManyRequests, Unavailable: not now.
    """
    slot = _Slot(context, organization_id)  # before anything is waited for: two cannot find the same one free
    try:
        async with context.database.transaction() as connection:
            row = await _find_here(context, connection, organization_id, instance_id)
            if row["status"] not in ("running", "updating") or row["endpoint"] is None:
                raise Conflict(f"it is {row['status']}; only a running instance has its data at hand")
            password = instances.decrypt(row, "admin_password", context.encryption)
            await audit.record(
                connection, acting, "instances.backup", ("instance", instance_id), organization_id=organization_id
            )
        address = Address(path=row["endpoint"]["unix"], username=ADMIN_USER, password=password or "")
        chunks = _until_the_end(slot, take(address))
        first = await anext(chunks)
    except ProvisionError as error:
        slot.free()
        raise Unavailable(f"no snapshot could be made: {error}; try again") from error
    except BaseException:
        slot.free()
        raise
    moment = context.now().strftime("%Y%m%d-%H%M%S")
    return SnapshotResponse(first, chunks, f"{row['slug']}-{moment}.rdb")


class _Slot:
    """One of the snapshots that a worker hands out at a time: an organization has one, and leaves others the rest."""

    def __init__(self, context: Context, organization_id: UUID) -> None:
        self._taken: set[UUID] = context.extra.setdefault(_RUNNING, set())
        self._organization_id = organization_id
        if organization_id in self._taken:
            raise TooManyRequests("a snapshot of this organization is being taken already; try again", RETRY_SECONDS)
        if len(self._taken) >= MAX_AT_ONCE:
            raise TooManyRequests(f"{MAX_AT_ONCE} snapshots are being taken already; try again", RETRY_SECONDS)
        self._taken.add(organization_id)
        self._free = False

    def free(self) -> None:
        """Leave it to the next one; once is enough."""
        if not self._free:
            self._free = True
            self._taken.discard(self._organization_id)


async def _until_the_end(slot: _Slot, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        slot.free()
        await chunks.aclose()


def read_part(content: bytes, content_range: str | None) -> Part:
    """A body as a part of an upload; without Content-Range (RFC 9110, 14.4) it is the whole.

    Raises:
        BadRequest: the header does not fit the body.
    """
    if content_range is None:
        return Part(0, len(content), content)
    found = _RANGE.fullmatch(content_range.strip())
    if found is None:
        raise BadRequest("Content-Range must be like: bytes 0-4194303/9000000")
    start, last, total = (int(number) for number in found.groups())
    if last - start + 1 != len(content) or last >= total:
        raise BadRequest(f"Content-Range says {content_range}, and the body has {len(content)} bytes")
    return Part(start, total, content)


async def take_in(context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID, part: Part) -> bool:
    """Keep a part of an upload; True once all of it is there: then the steward loads it.

    Raises:
        NotFound, BadRequest, Conflict: it cannot be.
    """
    async with context.database.connection() as connection:
        row = await _find_here(context, connection, organization_id, instance_id)
    _check_loadable(row)
    most = row["max_memory"] + OVERHEAD_BYTES
    if part.total > most:
        raise ApiError(
            413, f"the snapshot has {part.total} bytes; this instance has room for {most}: give it more memory first"
        )
    if not part.start and not part.content.startswith(MAGIC):
        raise BadRequest(
            "this is no snapshot: an RDB file begins with REDIS", {"snapshot": "is no RDB file: choose another"}
        )
    home, actor = _home(context, instance_id), audit.actor_of(acting)
    uploader = f"{actor.kind}-{actor.id}"
    try:
        upload = await asyncio.to_thread(receive, home, uploader, part.start, part.content, part.total)
    except Occupied as error:
        raise Conflict("somebody else is uploading a snapshot of this instance; wait until it is loaded") from error
    except WrongPart as error:
        raise Conflict(
            f"this part begins at {part.start}, and {error.arrived} bytes have arrived; go on there or begin at 0",
            {"arrived": error.arrived},
        ) from error
    except OSError as error:
        raise Unavailable(f"the snapshot cannot be stored: {error.strerror}; nothing was changed") from error
    if upload is None:
        return False
    try:
        async with context.database.transaction() as connection:
            row = await instances.lock(connection, organization_id, instance_id)
            _check_loadable(row)
            await asyncio.to_thread(keep_only, home, upload)
            await instances.set_columns(connection, instance_id, {"load_upload": upload})
            await audit.record(
                connection,
                acting,
                "instances.load",
                ("instance", instance_id),
                after={"bytes": part.total},
                organization_id=organization_id,
            )
    except ApiError:
        await asyncio.to_thread(upload_path(home, upload).unlink, True)
        raise
    return True


async def how_it_went(context: Context, instance_id: UUID, generation: int) -> str | None:
    """Why the last snapshot was not loaded; None if it was, or is still being loaded."""
    row = await context.database.fetchrow(
        "SELECT outcome, detail FROM instance_steps WHERE instance_id = $1 AND step = $2 AND generation >= $3"
        " ORDER BY id DESC LIMIT 1",
        instance_id,
        LOAD_STEP,
        generation,
    )
    return row["detail"] if row is not None and row["outcome"] == "failed" else None


def _check_loadable(row: Record) -> None:
    if row["load_upload"] is not None:
        raise Conflict("another snapshot is being loaded; wait for it")
    if row["desired_state"] != "running" or row["provisioned_at"] is None:
        raise Conflict(f"it is {row['status']}; start it first")


async def _find_here(context: Context, connection: Connection, organization_id: UUID, instance_id: UUID) -> Record:
    row = await instances.find(connection, organization_id, instance_id)
    if row["provisioner"] != "local":
        raise BadRequest("snapshots are for instances that RedisGate runs itself; use the tools of that Redis")
    here = await asyncio.to_thread(hosts.host_id, context.gateway_settings.state_dir)
    if row["host_id"] != here:
        raise Conflict("this instance runs on another machine than the gateway that you asked; ask the one there")
    return row


def _home(context: Context, instance_id: UUID) -> Path:
    return instances_dir(context.gateway_settings) / str(instance_id)
