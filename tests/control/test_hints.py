"""What the command line completes with: what may run, with its arguments as Redis documents them."""

import re
from pathlib import Path

import pytest

from control.console import split_line
from control.hints import docs, hints
from redisgate.policy import Policy, Scope
from resp.commands import bundled_table
from tests.servers import RedisServer, needs_redis_7

HINTS = Path(__file__).parents[2] / "templates" / "static" / "js" / "hints.js"


@needs_redis_7
async def test_hints_are_what_a_server_says_of_commands_that_may_run(redis_server: RedisServer) -> None:
    made = hints(await docs(redis_server.url))
    assert made["GET"] == "key"
    assert made["HSET"] == "key field value [field value ...]"
    assert made["ZADD"].startswith("key [NX | XX]")
    assert made["CONFIG GET"].startswith("parameter")
    assert not {"SELECT", "LASTSAVE", "ROLE", "WAIT"} & set(made)
    assert not {"SUBSCRIBE", "MONITOR", "CONFIG SET", "ACL SETUSER", "DEBUG", "SHUTDOWN", "BLPOP", "CONFIG"} & set(made)


def test_the_file_names_only_what_may_run() -> None:
    names = re.findall(r'^  "([^"]+)": ".*",$', HINTS.read_text(), re.MULTILINE)
    assert len(names) > 200
    policy = Policy(bundled_table(), Scope())
    for name in names:
        argv = split_line(name)
        rule = policy.rule(argv[0])
        assert name in ("MULTI", "EXEC", "DISCARD") or (rule is not None and rule.refusal is None), name
    assert not {"SELECT", "LASTSAVE", "ROLE"} & set(names)


@pytest.mark.parametrize("name", ["SET", "GET", "SCAN", "XADD", "EVAL", "CLIENT GETNAME"])
def test_the_file_has_what_people_type_most(name: str) -> None:
    assert f'  "{name}": ' in HINTS.read_text()
