"""The command line as a person meets it: whole processes, their output and exit status."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import redisgate
from tests.servers import RedisServer, free_port


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "SRH_"))}
    return subprocess.run(
        [sys.executable, "-m", "redisgate", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=cwd,
        env={**clean, "REDISGATE_STATE_DIR": str(cwd / "state"), **environ},
    )


def test_version(tmp_path: Path) -> None:
    for word in ("version", "--version"):
        done = run(word, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"redisgate {redisgate.__version__} ({redisgate.build_form()})\n")


def test_help_names_every_command_and_flag(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    for command in ("serve", "dev", "check", "version"):
        assert command in done.stdout
    done = run("serve", "--help", cwd=tmp_path)
    assert "--workers" in done.stdout
    assert "--max-body-bytes" in done.stdout
    assert "example:" in done.stdout


def test_nothing_configured_says_what_to_do(tmp_path: Path) -> None:
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 2
    assert "REDISGATE_REDIS_URL=" in done.stderr
    assert "redisgate dev" in done.stderr


def test_a_wrong_setting_stops_the_start_with_one_line(tmp_path: Path) -> None:
    environ = {"REDISGATE_REDIS_URL": "redis://h", "REDISGATE_TOKEN": "hidden-token"}
    done = run("serve", "--port", "x", cwd=tmp_path, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "redisgate: --port: expected a whole number from 0 to 65535\n"


def test_a_port_in_use_is_named(tmp_path: Path, redis_server: RedisServer) -> None:
    environ = {"REDISGATE_REDIS_URL": redis_server.url, "REDISGATE_TOKEN": "hidden-token"}
    done = run("serve", "--port", str(redis_server.port), cwd=tmp_path, **environ)
    assert done.returncode != 0
    assert str(redis_server.port) in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_of_what_is_well(tmp_path: Path, redis_server: RedisServer) -> None:
    environ = {"REDISGATE_REDIS_URL": redis_server.url, "REDISGATE_TOKEN": "0123456789abcdef"}
    done = run("check", cwd=tmp_path, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reachable, version" in done.stdout
    assert "All is well." in done.stdout
    assert "0123456789abcdef" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    server = RedisServer("--requirepass", "right", "--user", *"reader on >pw ~* +@read +@connection -multi".split())
    yield server
    server.stop()


def test_check_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path, guarded: RedisServer) -> None:
    port = free_port()
    (tmp_path / "r.toml").write_text(
        f"""
[[instances]]
id = "away"
url = "redis://127.0.0.1:{port}"
[[instances]]
id = "wrong"
url = "redis://:hidden-password@127.0.0.1:{guarded.port}"
[[instances]]
id = "far"
url = "redis://:right@127.0.0.1:{guarded.port}/99"
[[instances]]
id = "reader"
url = "redis://reader:pw@127.0.0.1:{guarded.port}"
[[instances]]
id = "plain"
url = "rediss://:right@127.0.0.1:{guarded.port}"
[[instances]]
id = "fine"
url = "redis://:right@127.0.0.1:{guarded.port}"
[[instances]]
id = "again"
url = "redis://:right@127.0.0.1:{guarded.port}/1"
[[instances]]
id = "nosocket"
url = "unix:///nonexistent/redis.sock"
[[tokens]]
name = "old"
token = "0123456789abcdef"
instance = "fine"
expires = 2001-01-01T00:00:00Z
[[tokens]]
name = "short"
token = "hidden"
instance = "fine"
[[tokens]]
name = "stranger"
token = "0123456789abcdeg"
instance = "fine"
user = "reader"
password = "hidden-too"
[[tokens]]
name = "known"
token = "0123456789abcdeh"
instance = "fine"
user = "reader"
password = "pw"
"""
    )
    done = run("check", "--config", "r.toml", cwd=tmp_path)
    assert done.returncode == 1
    sections = {part.split(" ", 1)[0]: part for part in done.stdout.split("instance ")[1:]}
    assert "is Redis running there" in sections["away"]
    assert "check user and password in the URL" in sections["wrong"]
    assert "choose another number" in sections["far"]
    assert "/multi-exec will be refused" in sections["reader"]
    assert "FAIL" in sections["plain"]
    assert "TLS" in sections["plain"]
    assert "login as default accepted" in sections["fine"]
    assert "no token names it" in sections["away"] + done.stdout.partition("instances")[2]
    tokens = done.stdout.partition("token old")[2]
    assert "its user reader cannot log in" in tokens
    assert "check user and password of the token" in tokens
    assert "token known" not in tokens
    assert "hidden-too" not in done.stdout
    assert "there is no such socket" in sections["nosocket"]
    assert "it has expired" in done.stdout
    assert "easy to guess" in done.stdout
    assert "instances fine, again\n  note  share one Redis server" in done.stdout
    assert "Something has to be mended." in done.stdout
    assert "hidden" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_check_says_that_there_is_no_token(tmp_path: Path, redis_server: RedisServer) -> None:
    (tmp_path / "r.toml").write_text(f'[[instances]]\nid = "a"\nurl = "{redis_server.url}"\n')
    done = run("check", "--config", "r.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no token" in done.stdout
