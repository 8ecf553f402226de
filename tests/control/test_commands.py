"""`redisgate audit` and `redisgate admin`, as the operator types them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import httpx
import pytest

from control.audit import Audit, head_file, note_head, record
from control.database import Database
from redisgate.config import Settings
from tests.control.conftest import SECRET_KEY, Server, Urls
from tests.control.people import register


def run(urls: Urls, state_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REDISGATE_")} | {
        "DATABASE_URL": urls.application,
        "REDISGATE_STATE_DIR": str(state_dir),
        "REDISGATE_SECRET_KEY": SECRET_KEY.decode(),
        "REDISGATE_MODE": "dev",
    }
    return subprocess.run(
        [sys.executable, "-m", "redisgate", *arguments], env=environment, capture_output=True, text=True, timeout=30
    )


@pytest.fixture
def state_dir(settings: Settings) -> Path:
    return settings.state_dir


@pytest.fixture
def own_urls(postgres_server: Server, migrated: str) -> Iterator[Urls]:
    """A migrated database for one test, to break."""
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


async def test_audit_verify_finds_what_was_done_to_the_log(own_urls: Urls, tmp_path: Path) -> None:
    urls = own_urls
    database = Database(urls.application)
    actor = Audit([SECRET_KEY]).system("tests")
    for number in range(5):
        async with database.transaction() as connection:
            await record(connection, actor, "test.run", ("thing", str(number)))
    head = await note_head(database, head_file(tmp_path))

    whole = run(urls, tmp_path, "audit", "verify")
    assert whole.returncode == 0, whole.stderr
    assert f"5 events, the chain holds\naudit head {head}" in whole.stdout

    exported = run(urls, tmp_path, "audit", "export")
    assert [json.loads(line)["sequence"] for line in exported.stdout.splitlines()] == [1, 2, 3, 4, 5]

    intruder = await asyncpg.connect(urls.owner)
    await intruder.execute("GRANT ALL ON audit_events TO CURRENT_USER")
    await intruder.execute("ALTER TABLE audit_events DISABLE TRIGGER append_only")
    await intruder.execute("DELETE FROM audit_events WHERE sequence = 5")
    cut = run(urls, tmp_path, "audit", "verify")
    assert cut.returncode == 1
    assert "the last events are missing" in cut.stdout

    elsewhere = tmp_path / "elsewhere"
    assert run(urls, elsewhere, "audit", "verify").returncode == 0, "a host that has noted nothing"
    log = tmp_path / "gateway.log"
    log.write_text(f"info audit head {head}\n")
    assert run(urls, elsewhere, "audit", "verify", str(log)).returncode == 1

    await intruder.execute("UPDATE audit_events SET actor_name = 'somebody else' WHERE sequence = 2")
    edited = run(urls, tmp_path, "audit", "verify")
    assert edited.returncode == 1
    assert "event 2 " in edited.stdout
    await intruder.close()
    await database.close()


async def test_a_log_that_cannot_be_read_is_said(database_urls: Urls, state_dir: Path, tmp_path: Path) -> None:
    found = run(database_urls, state_dir, "audit", "verify", str(tmp_path / "none.log"))
    assert found.returncode == 2
    assert "none.log" in found.stderr
    assert "Traceback" not in found.stderr


async def test_admin_makes_and_unmakes_an_administrator(
    client: httpx.AsyncClient, database_urls: Urls, state_dir: Path
) -> None:
    person = await register(client)
    assert (await client.get("/api/audit-logs", headers=person.headers)).status_code == 403
    made = run(database_urls, state_dir, "admin", person.email)
    assert made.returncode == 0, made.stderr
    found = await client.get("/api/audit-logs", params={"action": "users.admin"}, headers=person.headers)
    assert found.status_code == 200
    assert found.json()["data"]["items"][0]["actor"]["kind"] == "system"
    assert run(database_urls, state_dir, "admin", person.email, "--revoke").returncode == 0
    assert (await client.get("/api/audit-logs", headers=person.headers)).status_code == 403
    unknown = run(database_urls, state_dir, "admin", "nobody@example.com")
    assert unknown.returncode == 1
    assert "nobody@example.com" in unknown.stderr
