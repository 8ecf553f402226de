"""A steward killed after any of its steps leaves nothing that the next one does not finish or roll back.

The stewards that are killed are processes, the servers are real; after each kill the next steward works in this
process, and the world must look as if nothing had happened.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from control import backups, instances, steward
from control.app import make_context
from control.database import Record
from control.http import ApiError, Context
from control.instances import CreateInstance, RotateCredentials, UpdateInstance
from control.provisioners.local import OVERHEAD_BYTES, stop_everything
from control.settings import instances_dir
from redisgate.config import Settings
from tests.control.conftest import Urls, make_settings
from tests.control.steward_process import Stewards
from tests.control.test_instances import call

MIB = 1024 * 1024
DEADLINE = 20.0


@dataclass
class World:
    """An organization whose instances are watched."""

    context: Context
    organization_id: UUID

    @property
    def actor(self) -> Any:
        return self.context.audit.system("tests")

    async def row(self, instance_id: UUID) -> Record:
        row = await self.context.database.fetchrow("SELECT * FROM instances WHERE id = $1", instance_id)
        assert row is not None
        return row

    async def create(self, **changes: Any) -> UUID:
        body = CreateInstance(**({"name": "n", "slug": f"s{uuid4().hex[:12]}", "max_memory": 8 * MIB} | changes))
        created, _ = await instances.create(self.context, self.actor, self.organization_id, None, body)
        return created

    async def counted(self) -> int:
        return int(
            await self.context.database.fetchval(
                "SELECT count(*) FROM instances WHERE organization_id = $1 AND counts_against_quota",
                self.organization_id,
            )
        )


@pytest.fixture(scope="module")
def crash_settings(database_urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = make_settings(database_urls, tmp_path_factory.mktemp("crash"))
    yield settings
    stop_everything(instances_dir(settings))


@pytest.fixture(scope="module")
def stewards() -> Iterator[Stewards]:
    one = Stewards()
    yield one
    one.close()


@pytest.fixture
async def world(crash_settings: Settings) -> AsyncIterator[World]:
    context = make_context(crash_settings, name="tests")
    async with context.database.transaction() as connection:
        organization_id = await connection.fetchval(
            "INSERT INTO organizations (name, slug) VALUES ('n', $1) RETURNING id", uuid4().hex
        )
        await connection.execute(
            "INSERT INTO quotas (organization_id, max_instances, max_memory, max_api_keys) VALUES ($1, 5, $2, 1)",
            organization_id,
            1024 * MIB,
        )
    yield World(context, organization_id)
    # Not a later test's business.
    for row in await context.database.fetch("SELECT * FROM instances WHERE organization_id = $1", organization_id):
        if row["deleted_at"] is None:
            await instances.delete(context, context.audit.system("tests"), organization_id, row["id"])
    async with working(context):
        for row in await context.database.fetch("SELECT * FROM instances WHERE organization_id = $1", organization_id):
            await instances.wait_until_settled(context.database, row["id"], DEADLINE)
    await context.close()


@contextlib.asynccontextmanager
async def working(context: Context) -> AsyncIterator[None]:
    """A steward at work in this process."""
    stop = asyncio.Event()
    task = asyncio.create_task(steward.run(context, stop))
    try:
        yield
    finally:
        stop.set()
        await task


def processes_of(settings: Settings, instance_id: UUID) -> list[int]:
    """Ids of the redis-server processes that hold the instance's lock."""
    lock = instances_dir(settings) / str(instance_id) / "lock"
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                if any(os.path.realpath(link) == str(lock.resolve()) for link in (folder / "fd").iterdir()):
                    found.append(int(folder.name))
    return found


def has_files(settings: Settings, instance_id: UUID) -> bool:
    return (instances_dir(settings) / str(instance_id)).exists()


async def settle(world: World, instance_id: UUID) -> Record:
    async with asyncio.timeout(DEADLINE):
        while True:
            row = await instances.wait_until_settled(world.context.database, instance_id)
            assert row is not None
            # An error is where a death was noticed: it is being brought back.
            if row["status"] != "error" or not row["counts_against_quota"]:
                return row
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Scenario:
    """What is asked for, the steps that it takes, and what there must be in the end."""

    change: Callable[[World, UUID], Awaitable[object]]
    steps: tuple[str, ...]
    check: Callable[[World, Record], Awaitable[object]]


async def ask_nothing(world: World, instance_id: UUID) -> None:
    """It was created: that is all."""


async def runs_with_its_data(world: World, row: Record) -> None:
    assert row["status"] == "running"
    assert row["process"] is not None
    assert processes_of(world.context.gateway_settings, row["id"]) == [row["process"]["pid"]]
    assert await call(world.context, row["id"], "SET", "other", "x") == "OK"
    assert await world.counted() == 1


async def resize(world: World, instance_id: UUID) -> None:
    await instances.update(
        world.context, world.actor, world.organization_id, instance_id, UpdateInstance(max_memory=64 * MIB)
    )


async def runs_larger(world: World, row: Record) -> None:
    await runs_with_its_data(world, row)
    wanted = ["maxmemory", str(64 * MIB + OVERHEAD_BYTES)]
    assert await call(world.context, row["id"], "CONFIG", "GET", "maxmemory") == wanted


async def restart(world: World, instance_id: UUID) -> None:
    await instances.change_status(world.context, world.actor, world.organization_id, instance_id, "restart")


async def runs_restarted(world: World, row: Record) -> None:
    await runs_with_its_data(world, row)
    assert row["restarts_done"] == row["restarts_wanted"] == 1


async def die(world: World, instance_id: UUID) -> None:
    os.kill((await world.row(instance_id))["process"]["pid"], signal.SIGKILL)


async def stop(world: World, instance_id: UUID) -> None:
    await instances.change_status(world.context, world.actor, world.organization_id, instance_id, "stop")


async def start(world: World, instance_id: UUID) -> None:
    await instances.change_status(world.context, world.actor, world.organization_id, instance_id, "start")


async def restore(world: World, instance_id: UUID) -> None:
    await instances.restore(world.context, world.actor, world.organization_id, instance_id)


async def is_stopped(world: World, row: Record) -> None:
    assert (row["status"], row["process"]) == ("stopped", None)
    assert processes_of(world.context.gateway_settings, row["id"]) == []
    assert await world.counted() == (0 if row["desired_state"] == "deleted" else 1)


async def delete(world: World, instance_id: UUID) -> None:
    await instances.delete(world.context, world.actor, world.organization_id, instance_id)


async def rotate(world: World, instance_id: UUID) -> None:
    await instances.rotate(
        world.context, world.actor, world.organization_id, instance_id, RotateCredentials(token=False)
    )


async def runs_with_a_new_password(world: World, row: Record) -> None:
    await runs_with_its_data(world, row)
    assert row["next_password_encrypted"] is None


async def load(world: World, instance_id: UUID) -> None:
    given = await backups.hand_out(world.context, world.actor, world.organization_id, instance_id)
    content = b"".join([bytes(chunk) async for chunk in given.body_iterator])
    await call(world.context, instance_id, "SET", "later", "gone")
    part = backups.read_part(content, None)
    assert await backups.take_in(world.context, world.actor, world.organization_id, instance_id, part)


async def runs_with_the_snapshot(world: World, row: Record) -> None:
    assert await call(world.context, row["id"], "EXISTS", "later") == 0
    assert row["load_upload"] is None
    home = instances_dir(world.context.gateway_settings) / str(row["id"])
    assert {path.name for path in home.iterdir()} <= {"data", "lock", "loaded", "redis.conf", "redis.log", "redis.pid"}
    await runs_with_its_data(world, row)


SCENARIOS = {
    "update": Scenario(resize, ("prepared", "adjusted", "update: recorded"), runs_larger),
    "restart": Scenario(
        restart,
        ("stopped", "prepared", "started", "adjusted", "restart: recorded"),
        runs_restarted,
    ),
    "death": Scenario(
        die,
        ("check: recorded", "prepared", "started", "adjusted", "start: recorded"),
        runs_with_its_data,
    ),
    "load": Scenario(
        load,
        (
            "snapshot checked",
            "stopped",
            "snapshot in place",
            "prepared",
            "started",
            "adjusted",
            "append-only file written",
            "snapshot loaded",
            "load a snapshot: recorded",
        ),
        runs_with_the_snapshot,
    ),
    "stop": Scenario(stop, ("stopping: recorded", "stopped", "stop: recorded"), is_stopped),
    "delete": Scenario(delete, ("stopped", "stop: recorded"), is_stopped),
    "rotate": Scenario(rotate, ("prepared", "adjusted", "update: recorded"), runs_with_a_new_password),
}
CREATION = ("create: claimed", "prepared", "started", "adjusted", "create: recorded")
ROLLBACK = ("create: claimed", "create: failure recorded", "killed", "removed", "roll back: recorded")
PURGE = ("killed", "removed", "purge: recorded")


@pytest.mark.parametrize("step", CREATION)
async def test_a_creation_is_finished_wherever_the_steward_was_killed(
    world: World, stewards: Stewards, crash_settings: Settings, step: str
) -> None:
    instance_id = await world.create()
    steps = await asyncio.to_thread(stewards.run, crash_settings, step)
    assert steps == list(CREATION[: CREATION.index(step) + 1])
    assert await world.counted() == 1
    before = processes_of(crash_settings, instance_id)
    assert len(before) == (step in CREATION[2:])
    async with working(world.context):
        row = await settle(world, instance_id)
        await runs_with_its_data(world, row)
        assert not before or row["process"]["pid"] == before[0], "what ran was adopted"
        assert row["attempts"] == 0


@pytest.mark.parametrize("step", ROLLBACK)
async def test_a_failed_creation_is_rolled_back_wherever_the_steward_was_killed(
    world: World, stewards: Stewards, crash_settings: Settings, step: str
) -> None:
    strict = dataclasses.replace(crash_settings, control=dataclasses.replace(crash_settings.control, mode="production"))
    instance_id = await world.create(redis_version="5.9")
    assert await asyncio.to_thread(stewards.run, strict, step) == list(ROLLBACK[: ROLLBACK.index(step) + 1])
    strict_context = make_context(strict, name="strict")
    async with working(strict_context):
        row = await settle(world, instance_id)
    await strict_context.close()
    assert (row["status"], row["host_id"], row["process"], row["endpoint"]) == ("error", None, None, None)
    assert "not 5.9" in row["status_reason"]
    assert await world.counted() == 0
    assert not has_files(crash_settings, instance_id)


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name, scenario in SCENARIOS.items() for step in scenario.steps]
)
async def test_a_change_is_finished_wherever_the_steward_was_killed(
    world: World, stewards: Stewards, crash_settings: Settings, name: str, step: str
) -> None:
    scenario = SCENARIOS[name]
    instance_id = await world.create()
    async with working(world.context):
        assert (await settle(world, instance_id))["status"] == "running"
        await call(world.context, instance_id, "SET", "key", "value")
    await scenario.change(world, instance_id)
    steps = await asyncio.to_thread(stewards.run, crash_settings, step)
    assert steps == list(scenario.steps[: scenario.steps.index(step) + 1])
    async with working(world.context):
        await asyncio.sleep(0)
        row = await settle(world, instance_id)
        if name == "death" and step == "check: recorded":
            assert row["status"] == "running"
        await scenario.check(world, row)
        if row["status"] == "running":
            assert await call(world.context, instance_id, "GET", "key") == "value"


@pytest.mark.parametrize("step", PURGE)
async def test_a_purge_is_finished_wherever_the_steward_was_killed(
    world: World, stewards: Stewards, crash_settings: Settings, step: str
) -> None:
    instance_id = await world.create()
    async with working(world.context):
        await settle(world, instance_id)
        await delete(world, instance_id)
        await settle(world, instance_id)
    await world.context.database.execute("UPDATE instances SET purge_at = now() WHERE id = $1", instance_id)
    assert await asyncio.to_thread(stewards.run, crash_settings, step) == list(PURGE[: PURGE.index(step) + 1])
    async with working(world.context), asyncio.timeout(DEADLINE):
        while True:
            if not await world.context.database.fetch("SELECT 1 FROM instances WHERE id = $1", instance_id):
                break
            await asyncio.sleep(0.02)
    assert not has_files(crash_settings, instance_id)


async def test_servers_run_on_while_there_is_no_steward_and_are_adopted(world: World, crash_settings: Settings) -> None:
    instance_id = await world.create()
    async with working(world.context):
        first = await settle(world, instance_id)
    await runs_with_its_data(world, first)
    async with working(world.context):
        second = await settle(world, instance_id)
        await restart(world, instance_id)
        third = await settle(world, instance_id)
    assert second["process"] == first["process"]
    assert third["process"]["run_id"] != first["process"]["run_id"]


@pytest.mark.parametrize("seed", [1, 2])
async def test_kills_at_any_moment_never_make_two_servers_nor_lose_what_is_wanted(
    world: World, stewards: Stewards, crash_settings: Settings, seed: int
) -> None:
    """People change their minds while the steward is killed a few times a second."""
    chance = random.Random(seed)
    made = [await world.create() for _ in range(3)]
    acts = [restart, stop, resize, rotate, delete, start, restore, restore]

    async def act() -> None:
        while True:
            with contextlib.suppress(ApiError):
                await chance.choice(acts)(world, chance.choice(made))
            await asyncio.sleep(chance.uniform(0, 0.1))

    acting = asyncio.create_task(act())
    for _ in range(8):
        await asyncio.to_thread(stewards.run_for, crash_settings, chance.uniform(0.05, 0.4))
        for instance_id in made:
            assert len(processes_of(crash_settings, instance_id)) <= 1
    acting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await acting
    async with working(world.context):
        for instance_id in made:
            row = await settle(world, instance_id)
            if row["desired_state"] == "running":
                assert row["status"] == "running"
                assert processes_of(crash_settings, instance_id) == [row["process"]["pid"]]
                assert await call(world.context, instance_id, "PING") == "PONG"
                limit = ["maxmemory", str(row["max_memory"] + OVERHEAD_BYTES)]
                assert await call(world.context, instance_id, "CONFIG", "GET", "maxmemory") == limit
            else:
                assert row["status"] == "stopped"
                assert processes_of(crash_settings, instance_id) == []
