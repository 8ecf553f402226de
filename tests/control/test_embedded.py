"""PostgreSQL from a wheel, as a process of our own."""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from control.embedded import UNPRIVILEGED, EmbeddedError, EmbeddedPostgres
from tests.servers import wait_for


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not pytest's: deep, and closed to other users as many homes are."""
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name) / "closed" / ("deep" * 20)
        closed.mkdir(parents=True)
        closed.parent.chmod(0o700)
        yield closed / "postgres"


async def value(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_it_starts_asks_for_a_password_and_keeps_its_data(directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    server.start()
    pid = server.pid
    assert pid is not None
    try:
        assert str(await value(server.url(), "SHOW server_version")).startswith("18.")
        await value(server.url(), "CREATE TABLE kept AS SELECT 7 AS seven")
        with pytest.raises(asyncpg.InvalidPasswordError):
            await value(server.url(password="wrong"), "SELECT 1")
        owner = os.stat(f"/proc/{pid}").st_uid
        assert owner == (pwd.getpwnam(UNPRIVILEGED).pw_uid if os.geteuid() == 0 else os.geteuid())
        assert await value(server.url(), "SHOW listen_addresses") == ""
        assert [os.stat(path).st_mode & 0o077 for path in (directory, directory / "password")] == [0, 0]
    finally:
        server.stop()
    assert not is_alive(pid)
    again = EmbeddedPostgres(directory)
    again.start()
    try:
        assert await value(again.url(), "SELECT seven FROM kept") == 7
    finally:
        again.stop()


async def test_it_recovers_from_a_crash_at_the_same_address(directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    server.start()
    try:
        url = server.url()
        await value(url, "CREATE TABLE kept AS SELECT 7 AS seven")
        server.kill()
        with pytest.raises(OSError):  # noqa: PT011 no socket, or nobody behind it
            await value(url, "SELECT 1")
        server.restart()
        assert await value(url, "SELECT seven FROM kept") == 7
    finally:
        server.stop()


_STARTS_AND_IS_KILLED = """
import os, sys
from pathlib import Path
from control.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_it_ends_with_its_parent(directory: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _STARTS_AND_IS_KILLED, directory], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for(lambda: not is_alive(int(done.stdout)), what="PostgreSQL to end")


def test_what_is_in_the_way_is_said(directory: Path) -> None:
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("a file")
    with pytest.raises(EmbeddedError, match="cannot start PostgreSQL in"):
        EmbeddedPostgres(directory).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as somebody else")
async def test_programs_that_the_other_user_cannot_reach_are_copied(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddedPostgres, "_reaches", lambda self, path: False)
    server = EmbeddedPostgres(directory)
    server.start()
    try:
        assert await value(server.url(), "SELECT 1") == 1
        assert "/rgpg-" in os.readlink(f"/proc/{server.pid}/exe")
    finally:
        server.stop()
