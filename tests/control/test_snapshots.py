"""Snapshots of local instances: taken from a live server, loaded into another, and put back when that fails."""

import asyncio
import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from control import backups, hosts, instances
from control.http import Context, NotFound, TooManyRequests
from control.provisioners import ADMIN_USER, Found, ProvisionError, Spec
from control.provisioners.local import LocalProvisioner, stop_everything
from control.provisioners.snapshots import (
    ABANDONED_SECONDS,
    CHUNK_BYTES,
    UPLOAD_SECONDS,
    Occupied,
    WrongPart,
    keep_only,
    receive,
    take,
    upload_path,
)
from resp.address import Address
from tests.control import people
from tests.control.conftest import Service
from tests.control.service import Api, register
from tests.control.test_local import SERVERS, call, make_spec
from tests.control.test_usage import put_instance
from tests.http import Client

MIB = 1024 * 1024


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="rgs"))
    yield path
    await asyncio.to_thread(stop_everything, path)
    shutil.rmtree(path)


class Crash(BaseException):
    """The steward is ended here."""


class Local:
    """A provisioner that can be ended after any of its steps, and another one in its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.crash_at: str | None = None
        self.provisioner = self._new()

    def _new(self) -> LocalProvisioner:
        return LocalProvisioner(self.folder, SERVERS, any_version=True, on_step=self._on_step)

    def _on_step(self, step: str) -> None:
        if step == self.crash_at:
            self.crash_at = None
            raise Crash

    async def load_through_a_crash(self, spec: Spec, upload: uuid.UUID, at: str) -> Found:
        self.crash_at = at
        with pytest.raises(Crash):
            await self.provisioner.load(spec, upload)
        self.provisioner.close()
        self.provisioner = self._new()
        return await self.provisioner.load(spec, upload)


@pytest.fixture
async def local(folder: Path) -> AsyncIterator[Local]:
    local = Local(folder)
    yield local
    local.provisioner.close()


async def snapshot_of(spec: Spec, found: Found) -> bytes:
    address = Address(path=found.endpoint["unix"], username=ADMIN_USER, password=spec.admin_password or "")
    return b"".join([chunk async for chunk in take(address)])


def upload(folder: Path, spec: Spec, content: bytes) -> uuid.UUID:
    found = receive(folder / str(spec.id), "user-1", 0, content, len(content))
    assert found is not None
    return found


async def source(local: Local) -> bytes:
    """The snapshot of an instance with a key of each kind."""
    spec = make_spec()
    found = await local.provisioner.ensure(spec)
    await call(found, "SET", "text", "from the snapshot")
    await call(found, "SET", "gone", "later", "EX", "100")
    await call(found, "RPUSH", "list", "1", "2")
    await call(found, "XADD", "stream", "1-1", "field", "value")
    await call(found, "SET", "large", "x" * (3 * CHUNK_BYTES))
    return await snapshot_of(spec, found)


async def test_a_snapshot_is_whole_and_of_one_moment(local: Local, folder: Path) -> None:
    data = await source(local)
    assert data.startswith(b"REDIS")
    path = folder / "taken.rdb"
    path.write_bytes(data)
    check = await asyncio.create_subprocess_exec(
        "redis-check-rdb", str(path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await check.communicate()
    assert check.returncode == 0, output
    assert b"5 keys read" in output


async def test_an_instance_without_data_has_a_snapshot_too(local: Local) -> None:
    spec = make_spec(persistence=False)
    found = await local.provisioner.ensure(spec)
    first = await snapshot_of(spec, found)
    assert first.startswith(b"REDIS")
    assert len(await snapshot_of(spec, found)) == len(first)  # the second at once: none waits for another replica


@pytest.mark.parametrize("persistence", [True, False], ids=["append-only", "memory alone"])
async def test_loading_replaces_the_data_and_lasts_as_long_as_other_data(
    local: Local, folder: Path, persistence: bool
) -> None:
    data = await source(local)
    spec = make_spec(persistence=persistence)
    await call(await local.provisioner.ensure(spec), "SET", "before", "1")
    found = await local.provisioner.load(spec, upload(folder, spec, data))
    assert await call(found, "GET", "text") == "from the snapshot"
    assert await call(found, "EXISTS", "before") == 0
    assert 0 < await call(found, "TTL", "gone") <= 100
    assert await call(found, "SET", "after", "2") == "OK"
    await local.provisioner.stop(spec)
    found = await local.provisioner.ensure(spec)
    assert await call(found, "MGET", "text", "after") == (["from the snapshot", "2"] if persistence else [None, None])
    assert sorted(path.name for path in (folder / str(spec.id)).iterdir() if path.is_dir()) == ["data"]
    assert not list((folder / str(spec.id)).glob("*.rdb"))


REPLICAOF = b"*3\r\n$9\r\nREPLICAOF\r\n$9\r\n127.0.0.1\r\n$4\r\n4199\r\n"


async def test_an_uploaded_file_is_never_run_as_commands(
    local: Local, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis replays what follows a snapshot in an append-only file with every permission: none is made of an upload."""
    data = await source(local)
    spec = make_spec()
    await local.provisioner.ensure(spec)
    chosen = upload(folder, spec, data + REPLICAOF)
    monkeypatch.setattr("control.provisioners.local.examine", lambda *arguments: None)  # a look that sees nothing
    with contextlib.suppress(ProvisionError):
        await local.provisioner.load(spec, chosen)
    found = await local.provisioner.ensure(spec)
    assert await call(found, "SET", "written", "1") == "OK"
    assert "role:master" in await call(found, "INFO", "replication")


def damaged(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 + 2 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"REDIS, not really", "Can't handle RDB format version|no snapshot"),
        (lambda data: data[:-20], "no snapshot"),
        (damaged, "no snapshot"),
        (lambda data: b"REDIS9999" + data[9:], "Can't handle RDB format version 9999"),
        (lambda data: data + REPLICAOF, "something follows its end"),
        (lambda data: b"REDIS0010\xff" + bytes(8) + REPLICAOF, "something follows its end"),
    ],
    ids=["no RDB", "cut off", "damaged", "from the future", "with a command", "nothing but a command"],
)
async def test_what_is_no_good_snapshot_changes_nothing(local: Local, folder: Path, change: Any, reason: str) -> None:
    data = change(await source(local))
    spec = make_spec()
    first = await local.provisioner.ensure(spec)
    await call(first, "SET", "before", "1")
    with pytest.raises(ProvisionError, match=reason) as caught:
        await local.provisioner.load(spec, upload(folder, spec, data))
    assert caught.value.permanent
    assert str(folder) not in str(caught.value)
    assert await local.provisioner.alive(dataclasses.replace(spec, process=first.process)) is None  # never stopped
    assert await call(first, "GET", "before") == "1"


async def test_what_the_server_does_not_load_is_put_back(local: Local, folder: Path, tmp_path: Path) -> None:
    data = await _of_two_databases(tmp_path)
    spec = make_spec()
    await call(await local.provisioner.ensure(spec), "SET", "before", "1")
    with pytest.raises(ProvisionError, match="ended at once"):
        await local.provisioner.load(spec, upload(folder, spec, data))
    found = await local.provisioner.ensure(spec)
    assert await call(found, "GET", "before") == "1"
    assert sorted(path.name for path in (folder / str(spec.id)).iterdir() if path.is_dir()) == ["data"]


async def test_data_that_does_not_fit_is_put_back(local: Local, folder: Path) -> None:
    large = make_spec(max_memory=64 * MIB)
    found = await local.provisioner.ensure(large)
    for number in range(6):
        await call(found, "SET", f"compressible{number}", "x" * (4 * MIB))
    data = await snapshot_of(large, found)
    assert len(data) < MIB
    spec = make_spec(max_memory=8 * MIB)
    await call(await local.provisioner.ensure(spec), "SET", "before", "1")
    with pytest.raises(ProvisionError, match="room for 10 MiB; give it more memory"):
        await local.provisioner.load(spec, upload(folder, spec, data))
    found = await local.provisioner.ensure(spec)
    assert await call(found, "GET", "before") == "1"
    assert await call(found, "EXISTS", "compressible1") == 0
    roomy = dataclasses.replace(spec, max_memory=64 * MIB)
    found = await local.provisioner.load(roomy, upload(folder, roomy, data))
    assert await call(found, "STRLEN", "compressible1") == 4 * MIB


async def _of_two_databases(folder: Path) -> bytes:
    """A good snapshot that an instance, which has one database, cannot load."""
    socket = folder / "redis.sock"
    process = await asyncio.create_subprocess_exec(
        *("redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", ""),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_unix_connection(str(socket))
                    break
                await asyncio.sleep(0.01)
            writer.write(b"SELECT 3\r\nSET other 1\r\nSAVE\r\n")
            assert [await reader.readline() for _ in range(3)] == [b"+OK\r\n"] * 3
            writer.close()
        return (folder / "dump.rdb").read_bytes()
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    "step",
    [
        *("snapshot checked", "stopped", "snapshot in place", "prepared", "started", "adjusted"),
        *("append-only file written", "snapshot loaded"),
    ],
)
async def test_a_loading_that_was_cut_off_is_finished(local: Local, folder: Path, step: str) -> None:
    data = await source(local)
    spec = make_spec()
    await call(await local.provisioner.ensure(spec), "SET", "before", "1")
    found = await local.load_through_a_crash(spec, upload(folder, spec, data), step)
    assert await call(found, "GET", "text") == "from the snapshot"
    assert await call(found, "EXISTS", "before") == 0
    assert await call(found, "SET", "after", "2") == "OK"
    await local.provisioner.stop(spec)
    assert await call(await local.provisioner.ensure(spec), "MGET", "text", "after") == ["from the snapshot", "2"]


async def test_between_the_two_renames_the_data_is_found_again(local: Local, folder: Path) -> None:
    data = await source(local)
    spec = make_spec()
    await call(await local.provisioner.ensure(spec), "SET", "before", "1")
    chosen = upload(folder, spec, data)
    local.crash_at = "stopped"
    with pytest.raises(Crash):
        await local.provisioner.load(spec, chosen)
    home = folder / str(spec.id)
    (home / "loading").write_text(str(chosen))
    (home / "data").rename(home / "data.old")
    found = await local.provisioner.ensure(spec)  # PostgreSQL is away: it is started as it was
    assert await call(found, "GET", "before") == "1"
    found = await local.provisioner.load(spec, chosen)
    assert await call(found, "GET", "text") == "from the snapshot"


def test_parts_follow_each_other(tmp_path: Path) -> None:
    assert receive(tmp_path, "user-1", 0, b"REDIS00", 12) is None
    with pytest.raises(WrongPart) as caught:
        receive(tmp_path, "user-1", 9, b"x", 12)
    assert caught.value.arrived == 7
    assert receive(tmp_path, "user-1", 0, b"REDIS", 12) is None  # anew
    assert receive(tmp_path, "user-1", 5, b"0009", 12) is None
    with pytest.raises(WrongPart):
        receive(tmp_path, "user-1", 9, b"more than", 30)  # it was to have 12 bytes
    first = receive(tmp_path, "user-1", 9, b"end", 12)
    assert first is not None
    assert upload_path(tmp_path, first).read_bytes() == b"REDIS0009end"
    second = receive(tmp_path, "user-1", 0, b"REDIS", 5)
    assert second is not None
    assert upload_path(tmp_path, first).exists()  # whoever loads one decides, while nobody else can
    keep_only(tmp_path, second)
    assert [path.name for path in tmp_path.iterdir()] == [upload_path(tmp_path, second).name]
    with pytest.raises(WrongPart):
        receive(tmp_path, "user-1", 3, b"x", 9)


def test_two_people_do_not_upload_into_one_file(tmp_path: Path) -> None:
    assert receive(tmp_path, "user-1", 0, b"REDIS", 12) is None
    with pytest.raises(Occupied):
        receive(tmp_path, "user-2", 0, b"REDIS", 12)
    with pytest.raises(WrongPart):
        receive(tmp_path, "user-2", 5, b"0009end", 12)
    (part,) = tmp_path.iterdir()
    os.utime(part, (0, time.time() - UPLOAD_SECONDS - 1))  # and then the first one went away
    assert receive(tmp_path, "user-2", 0, b"REDIS", 12) is None
    with pytest.raises(WrongPart):
        receive(tmp_path, "user-1", 5, b"0009end", 12)
    assert receive(tmp_path, "user-2", 5, b"0009end", 12) is not None


async def test_an_upload_that_nobody_goes_on_with_is_removed(local: Local, folder: Path) -> None:
    spec = make_spec()
    found = await local.provisioner.ensure(spec)
    running = dataclasses.replace(spec, process=found.process)
    home = folder / str(spec.id)
    assert receive(home, "user-1", 0, b"REDIS", 12) is None
    assert await local.provisioner.alive(running) is None
    (part,) = home.glob("upload*")
    os.utime(part, (0, time.time() - ABANDONED_SECONDS - 1))
    assert await local.provisioner.alive(running) is None
    assert not list(home.glob("upload*"))


async def large_instance(local: Local, context: Context, person: people.Person) -> uuid.UUID:
    """With so much data that a snapshot of it takes several parts."""
    spec = make_spec(max_memory=64 * MIB)
    found = await local.provisioner.ensure(spec)
    await call(found, "SET", "large", "x" * (8 * CHUNK_BYTES))
    await call(found, "SET", "incompressible", secrets.token_hex(8 * MIB))
    await put_instance(context, person.organization_id, spec.id, found.endpoint)
    here = await asyncio.to_thread(hosts.host_id, context.gateway_settings.state_dir)
    await hosts.register(context.database, here, "here", [])
    encrypted = context.encryption.encrypt(b"admin", instances.secret_context(spec.id, "admin_password"))
    await context.database.execute(
        "UPDATE instances SET provisioner = 'local', host_id = $2, admin_password_encrypted = $3 WHERE id = $1",
        spec.id,
        here,
        encrypted,
    )

    return spec.id


async def test_an_organization_takes_one_snapshot_at_a_time_and_leaves_others_theirs(
    local: Local, context: Context, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backups, "MAX_AT_ONCE", 2)
    who = [await people.register(client) for _ in range(3)]
    theirs = [(person.organization_id, await large_instance(local, context, person)) for person in who]

    async def take_one(whose: int) -> backups.SnapshotResponse:
        return await backups.hand_out(context, context.audit.system("tests"), *theirs[whose])

    at_once = await asyncio.gather(*(take_one(0) for _ in range(5)), return_exceptions=True)
    (under_way,) = [response for response in at_once if isinstance(response, backups.SnapshotResponse)]
    assert sum(isinstance(response, TooManyRequests) for response in at_once) == 4
    other = await take_one(1)
    with pytest.raises(TooManyRequests, match="2 snapshots are being taken"):
        await take_one(2)
    await under_way.close()  # a client that left
    last = await take_one(2)
    assert len(b"".join([bytes(chunk) async for chunk in last.body_iterator])) > 0  # type: ignore[arg-type]
    await other.close()
    with pytest.raises(NotFound):
        await backups.hand_out(context, context.audit.system("tests"), theirs[0][0], uuid.uuid4())
    assert context.extra["backups.running"] == set()


async def test_who_stops_taking_a_snapshot_is_cut_off(
    local: Local, context: Context, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backups, "STALL_SECONDS", 0.05)
    person = await people.register(client)
    instance_id = await large_instance(local, context, person)
    response = await backups.hand_out(context, context.audit.system("tests"), person.organization_id, instance_id)
    never = asyncio.Event()

    async def send(message: Any) -> None:
        if message.get("body"):
            await never.wait()

    async def receive() -> Any:
        await never.wait()

    scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"version": "3.0", "spec_version": "2.4"}}
    async with asyncio.timeout(10):
        with pytest.raises(ClientDisconnect):
            await response(scope, receive, send)
    assert context.extra["backups.running"] == set()


# Through the whole service; not earlier, for its steward looks after all that is in the database


@pytest.fixture(scope="module")
def owner(service: Service) -> Api:
    return register(service.port, "snapshots")


def make_instance(owner: Api, name: str, **values: Any) -> dict[str, Any]:
    made: dict[str, Any] = owner.call("POST", "redis-instances", {"name": name, "max_memory": 8 * MIB, **values})
    assert made["status"] == "running", made
    return made


def http(service: Service, owner: Api) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{service.port}/api/organizations/{owner.organization_id}/redis-instances",
        headers={"Authorization": f"Bearer {owner.token}"},
        timeout=30,
    )


def test_download_and_upload_through_the_api(service: Service, owner: Api) -> None:
    one, other = make_instance(owner, "one"), make_instance(owner, "other")
    with Client(service.port, one["rest_token"]) as client:
        assert client.post("/", ["SET", "key", "value" * 100]).status == 200
        assert client.post("/", ["SET", "incompressible", secrets.token_hex(100_000)]).status == 200
    with http(service, owner) as client:
        taken = client.get(f"/{one['id']}/snapshot")
        assert taken.status_code == 200
        assert taken.headers["content-type"] == "application/octet-stream"
        assert taken.headers["content-disposition"].startswith('attachment; filename="one-')
        data = taken.content
        half = len(data) // 2
        for start, end, status in ((0, half, 202), (half, len(data), 200)):
            header = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            answer = client.put(f"/{other['id']}/snapshot", content=data[start:end], headers=header)
            assert answer.status_code == status, answer.text
            assert answer.json()["data"] == {"arrived": end, "total": len(data), "loaded": status == 200}
        with Client(service.port, other["rest_token"]) as redis:
            assert redis.post("/", ["GET", "key"]).json() == {"result": "value" * 100}
            assert redis.post("/", ["SET", "kept", "1"]).status == 200
        bad = client.put(f"/{other['id']}/snapshot", content=data[:-30])
        assert bad.status_code == 400
        assert "the data is as it was" in bad.json()["message"]
        steps = client.get(f"/{other['id']}").json()["data"]["steps"]
        loads = [step["outcome"] for step in steps if step["step"] == "load a snapshot"]
        assert loads == ["failed", "done"]
        with Client(service.port, other["rest_token"]) as redis:
            assert redis.post("/", ["MGET", "kept", "key"]).json() == {"result": ["1", "value" * 100]}


def test_what_cannot_be_loaded_is_refused_before_it_is_stored(service: Service, owner: Api) -> None:
    made = make_instance(owner, "small", max_memory=MIB)
    with http(service, owner) as client:
        path = f"/{made['id']}/snapshot"
        for content, headers, status in (
            (b"PK\x03\x04", {}, 400),
            (b"", {}, 400),
            (b"REDIS", {"Content-Range": "bytes 0-4/99999999"}, 413),
            (b"REDIS", {"Content-Range": "bytes 0-9/20"}, 400),
            (b"REDIS", {"Content-Range": "all of it"}, 400),
            (b"0009", {"Content-Range": "bytes 5-8/20"}, 409),
        ):
            answer = client.put(path, content=content, headers=headers)
            assert answer.status_code == status, (content, answer.text)
        owner.call("PUT", f"redis-instances/{made['id']}/status", {"action": "stop"})
        assert client.put(path, content=b"REDIS0009").status_code == 409
        assert client.get(path).status_code == 409


def test_a_narrowed_key_reaches_no_snapshot(service: Service, owner: Api) -> None:
    made = make_instance(owner, "narrow")
    path = f"/{made['id']}/snapshot"
    for scopes, wanted, status in (
        (["instances.*", "write"], {"key_prefixes": ["a:"]}, 403),
        (["manage:read"], {}, 403),
        (["instances.backup"], {}, 200),
    ):
        key, _ = owner.key(scopes=scopes, **wanted)
        with http(service, owner) as client:
            client.headers["Authorization"] = f"Bearer {key}"
            assert client.get(path).status_code == status, scopes
            assert client.put(path, content=b"REDIS").status_code == 403
