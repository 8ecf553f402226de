"""Local instances: real redis-server processes, started, adopted, changed, stopped and removed."""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from control.provisioners import GATEWAY_USER, Found, ProvisionError, Spec
from control.provisioners.local import OVERHEAD_BYTES, LocalProvisioner, _Home, find_servers, stop_everything
from redisgate.policy import Policy, Scope
from resp.address import Address
from resp.commands import bundled_table
from resp.connection import FutureWaiter, connect
from resp.encoder import encode_command
from resp.errors import ConnectFailed, ReplyLost
from resp.parser import ErrorReply, Parser

SERVERS = find_servers()[:1]
DEADLINE = 15.0


def make_spec(**changes: Any) -> Spec:
    spec = Spec(
        id=uuid.uuid4(),
        max_memory=8 << 20,
        redis_version=None,
        persistence=True,
        backup=False,
        eviction="noeviction",
        user=GATEWAY_USER,
        password="pass-1",
        admin_password="admin",
    )
    return dataclasses.replace(spec, **changes)


async def call(found: Found, *argv: str, user: str = GATEWAY_USER, password: str = "pass-1") -> Any:
    connection = await connect(Address(path=found.endpoint["unix"], username=user, password=password), timeout=5)
    waiter = FutureWaiter(1, asyncio.get_running_loop())
    connection.send(encode_command([word.encode() for word in argv]), waiter)
    try:
        return Parser(text=True).parse(await waiter.future, 1)[0]
    finally:
        connection.close(ReplyLost("done"))


def recorded(spec: Spec, found: Found) -> Spec:
    return dataclasses.replace(spec, endpoint=found.endpoint, process=found.process)


def status_of(found: Found) -> str:
    assert found.process is not None
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{found.process['pid']}/status").read_text()
    return "gone"


def children(path: Path) -> list[Path]:
    return list(path.iterdir())


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="rgl"))
    yield path
    await asyncio.to_thread(stop_everything, path)
    shutil.rmtree(path)


@pytest.fixture
async def local(folder: Path) -> AsyncIterator[LocalProvisioner]:
    provisioner = LocalProvisioner(folder, SERVERS, any_version=True)
    yield provisioner
    provisioner.close()


async def test_an_instance_starts_with_a_socket_and_users_of_its_own(local: LocalProvisioner) -> None:
    spec = make_spec()
    found = await local.ensure(spec)
    assert found.redis_version == SERVERS[0].version
    assert found.process is not None
    assert found.process["run_id"]
    assert await call(found, "SET", "key", "value") == "OK"
    assert await call(found, "CONFIG", "GET", "maxmemory") == ["maxmemory", str((8 << 20) + OVERHEAD_BYTES)]
    assert await call(found, "PING", user="redisgate-admin", password="admin") == "PONG"
    for user, password in (("default", ""), (GATEWAY_USER, "wrong"), ("default", "pass-1")):
        with pytest.raises(ConnectFailed):
            await call(found, "PING", user=user, password=password)
    assert await local.alive(recorded(spec, found)) is None


def what_others_can_see(found: Found, folder: Path) -> bytes:
    assert found.process is not None
    process = Path(f"/proc/{found.process['pid']}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() for path in (process / "cmdline", process / "environ", *files))


async def test_no_password_stands_in_a_file_an_argument_or_a_variable(local: LocalProvisioner, folder: Path) -> None:
    spec = make_spec(password="the-password-of-the-gateway", admin_password="the-password-of-the-admin")
    found = await local.ensure(spec)
    seen = what_others_can_see(found, folder)
    assert b"redis-server" in seen
    assert b"maxmemory" in seen
    assert b"the-password" not in seen


async def test_root_runs_it_as_an_unprivileged_user_whom_the_folders_bar(local: LocalProvisioner, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can choose")
    found = await local.ensure(make_spec())
    status = status_of(found)
    assert "Uid:\t0" not in status
    assert "CapEff:\t0000000000000000" in status
    assert await call(found, "SET", "key", "value") == "OK"
    assert await call(found, "BGREWRITEAOF", user="redisgate-admin", password="admin")


async def test_starting_again_adopts_the_process_that_runs(local: LocalProvisioner, folder: Path) -> None:
    spec = make_spec()
    first = await local.ensure(spec)
    local.close()
    another = LocalProvisioner(folder, SERVERS)
    second = await another.ensure(dataclasses.replace(spec, max_memory=16 << 20, eviction="allkeys-lru"))
    assert second.process == first.process
    assert await call(second, "CONFIG", "GET", "maxmemory") == ["maxmemory", str((16 << 20) + OVERHEAD_BYTES)]
    assert await call(second, "CONFIG", "GET", "maxmemory-policy") == ["maxmemory-policy", "allkeys-lru"]
    another.close()


async def test_two_at_once_start_one_process(folder: Path) -> None:
    spec = make_spec()
    stewards = [LocalProvisioner(folder, SERVERS) for _ in range(4)]
    found = await asyncio.gather(*(steward.ensure(spec) for steward in stewards))
    assert len({each.process["pid"] for each in found if each.process is not None}) == 1
    for steward in stewards:
        steward.close()


async def test_what_persists_survives_a_kill_and_what_does_not_is_gone(local: LocalProvisioner) -> None:
    kept, lost = make_spec(), make_spec(persistence=False)
    for spec, after in ((kept, "value"), (lost, None)):
        found = await local.ensure(spec)
        await call(found, "SET", "key", "value")
        assert found.process is not None
        os.kill(found.process["pid"], signal.SIGKILL)
        await local.stop(spec)
        assert await local.alive(recorded(spec, found)) is not None
        again = await local.ensure(spec)
        assert again.process is not None
        assert again.process["run_id"] != found.process["run_id"]
        assert await call(again, "GET", "key") == after


async def test_the_end_of_a_process_is_told_at_once(local: LocalProvisioner) -> None:
    spec = make_spec()
    died = asyncio.Event()
    local.on_death = lambda instance_id: died.set() if instance_id == spec.id else None
    found = await local.ensure(spec)
    assert found.process is not None
    os.kill(found.process["pid"], signal.SIGKILL)
    await asyncio.wait_for(died.wait(), DEADLINE)
    assert await local.alive(recorded(spec, found)) == "redis-server ended by SIGKILL"
    assert await local.ensure(spec) != found


async def test_a_stopped_one_is_no_death(local: LocalProvisioner) -> None:
    spec = make_spec()
    deaths: list[uuid.UUID] = []
    local.on_death = deaths.append
    await local.ensure(spec)
    await local.stop(spec)
    await local.stop(spec)
    await asyncio.sleep(0)
    assert deaths == []


async def test_a_process_that_hangs_is_replaced(
    local: LocalProvisioner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.provisioners.local.START_SECONDS", 0.3)
    monkeypatch.setattr("control.provisioners.local.CONNECT_SECONDS", 0.2)
    spec = make_spec()
    first = await local.ensure(spec)
    local.close()
    assert first.process is not None
    os.kill(first.process["pid"], signal.SIGSTOP)
    second = await LocalProvisioner(folder, SERVERS).ensure(spec)
    assert second.process is not None
    assert second.process["pid"] != first.process["pid"]


async def test_passwords_overlap_and_then_the_old_one_is_forgotten(local: LocalProvisioner) -> None:
    spec = make_spec()
    found = await local.ensure(spec)
    await local.ensure(dataclasses.replace(spec, next_password="pass-2"))
    assert await call(found, "PING", password="pass-1") == "PONG"
    assert await call(found, "PING", password="pass-2") == "PONG"
    await local.ensure(dataclasses.replace(spec, password="pass-2", only_these_passwords=False))
    assert await call(found, "PING", password="pass-1") == "PONG"
    await local.ensure(dataclasses.replace(spec, password="pass-2"))
    assert await call(found, "PING", password="pass-2") == "PONG"
    with pytest.raises(ConnectFailed):
        await call(found, "PING", password="pass-1")


async def test_nothing_is_left_of_a_destroyed_one(local: LocalProvisioner, folder: Path) -> None:
    spec = make_spec()
    found = await local.ensure(spec)
    await local.destroy(spec)
    await local.destroy(spec)
    assert children(folder) == []
    assert status_of(found) == "gone"


async def test_a_deep_folder_gets_a_short_way_to_its_socket(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    local = LocalProvisioner(deep, SERVERS)
    spec = make_spec()
    found = await local.ensure(spec)
    assert len(found.endpoint["unix"]) <= 107
    assert await call(found, "PING") == "PONG"
    await local.destroy(spec)
    assert not Path(found.endpoint["unix"]).parent.is_symlink()
    Path(found.endpoint["unix"]).parents[1].rmdir()


async def test_a_version_that_is_not_here_is_refused_or_said(folder: Path) -> None:
    spec = make_spec(redis_version="5.9")
    with pytest.raises(ProvisionError, match=r"not 5\.9") as refused:
        await LocalProvisioner(folder, SERVERS).ensure(spec)
    assert refused.value.permanent
    assert children(folder) == []
    lenient = LocalProvisioner(folder, SERVERS, any_version=True)
    found = await lenient.ensure(spec)
    assert found.warning is not None
    assert "instead of 5.9" in found.warning
    lenient.close()
    exact = LocalProvisioner(folder, SERVERS)
    major_minor = ".".join(SERVERS[0].version.split(".")[:2])
    assert (await exact.ensure(make_spec(redis_version=major_minor))).warning is None
    exact.close()


async def test_a_server_that_cannot_start_says_why(local: LocalProvisioner, folder: Path) -> None:
    spec = make_spec()
    await local.ensure(spec)
    await local.stop(spec)
    data = folder / str(spec.id) / "data"
    for path in data.rglob("*.aof*"):
        path.write_bytes(b"not an append-only file, nor a manifest of one\n")
    with pytest.raises(ProvisionError, match="ended at once: ") as failed:
        await local.ensure(spec)
    assert str(folder) not in str(failed.value)


CRASH = """\

=== REDIS BUG REPORT START: Cut & paste starting from here ===
7:M 24 Nov 2026 16:00:00.001 # Redis 7.0.15 crashed by signal: 11, si_code: 1
------ REGISTERS ------
7:M 24 Nov 2026 16:00:00.001 # (00007fff) -> 00

=== REDIS BUG REPORT END. Please report the crash by opening an issue on github:
  Some other issues could be detected by redis-server --check-system
"""
LINE = "7:M 24 Nov 2026 16:00:00.000 # "


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "no reason given"),
        (f"{LINE}Can't open it # here: Permission denied\n", "Can't open it # here: Permission denied"),
        (f"{LINE}Fatal error\n{LINE}WARNING Memory overcommit must be enabled!\n", "Fatal error"),
        (f"{LINE}Bad file format\n{CRASH}", "Bad file format (it crashed by signal 11)"),
        (CRASH, "it crashed by signal 11"),
    ],
    ids=["nothing", "a reason", "a warning after it", "a crash", "nothing but a crash"],
)
def test_the_last_words_are_the_reason(tmp_path: Path, log: str, reason: str) -> None:
    (tmp_path / "redis.log").write_text(log)
    assert _Home(tmp_path).last_words() == reason


@pytest.mark.parametrize("mebibytes", [1, 16 * 1024])
async def test_the_smallest_and_the_largest_can_be_written_to(local: LocalProvisioner, mebibytes: int) -> None:
    found = await local.ensure(make_spec(max_memory=mebibytes << 20, persistence=False))
    assert await call(found, "SET", "key", "value") == "OK"


async def test_redis_itself_refuses_scripts_what_the_gateway_refuses(local: LocalProvisioner) -> None:
    """Each command that nobody may run is denied to the gateway's user, or Redis runs it in no script."""
    found = await local.ensure(make_spec())
    if not await call(found, "COMMAND", "INFO", "FUNCTION") != [None]:
        pytest.skip("ACL DRYRUN needs Redis 7")
    policy = Policy(bundled_table(), Scope())
    listed = await call(found, "COMMAND", "LIST")
    reached: list[str] = []
    for name in listed:
        rule = policy.rule(name.encode())
        if rule is None or rule.refusal is None:
            continue
        info = (await call(found, "COMMAND", "INFO", name))[0]
        arguments = ["x"] * max(0, abs(info[1]) - 1)
        answer = await call(
            found, "ACL", "DRYRUN", GATEWAY_USER, name, *arguments, user="redisgate-admin", password="admin"
        )
        if answer == "OK" and "noscript" not in info[2]:
            reached.append(name)
    # In a script these do not wait for anything.
    assert {name for name in reached if not name.startswith("b")} == set()
    assert set(reached) <= set("blmove blmpop blpop brpop brpoplpush bzmpop bzpopmax bzpopmin".split())


@pytest.mark.parametrize(
    "script",
    [
        "return redis.call('MIGRATE', '127.0.0.1', '6379', 'key', '0', '1000')",
        "return redis.call('SELECT', '1')",
        "return redis.call('SWAPDB', '0', '1')",
        "return redis.call('MOVE', 'key', '1')",
        "return redis.call('COPY', 'key', 'other', 'DB', '1')",
        "return redis.call('CONFIG', 'SET', 'maxmemory', '0')",
        "return redis.call('CONFIG', 'GET', 'dir')",
        "return redis.call('ACL', 'SETUSER', 'gateway', '+@all')",
        "return redis.call('REPLICAOF', '127.0.0.1', '6379')",
        "return redis.call('DEBUG', 'SLEEP', '0')",
        "return redis.call('MODULE', 'LIST')",
        "return redis.call('SHUTDOWN', 'NOSAVE')",
        "return redis.call('CLIENT', 'LIST')",
    ],
    ids=lambda script: script.split("'")[1] + " " + script.split("'")[3],
)
async def test_a_script_gets_nowhere(local: LocalProvisioner, script: str) -> None:
    found = await local.ensure(make_spec())
    await call(found, "SET", "key", "value")
    answer = await call(found, "EVAL", script, "0")
    assert isinstance(answer, ErrorReply), answer
    assert await call(found, "PING") == "PONG"


async def test_whoever_stops_a_service_can_end_all_its_instances(local: LocalProvisioner, folder: Path) -> None:
    specs = [make_spec() for _ in range(3)]
    found = await asyncio.gather(*(local.ensure(spec) for spec in specs))
    local.close()
    assert await asyncio.to_thread(stop_everything, folder) == 3
    for each in found:
        with contextlib.suppress(OSError, ConnectFailed):
            pytest.fail(f"it still answers: {await call(each, 'PING')}")
    assert await asyncio.to_thread(stop_everything, folder) == 0
