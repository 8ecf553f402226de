"""`redisgate dev`, as a newcomer uses it."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.http import Client
from tests.servers import free_port, wait_for


class Dev:
    """A `redisgate dev` whose output is read until it is ready."""

    def __init__(self, cwd: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.output = tempfile.TemporaryFile()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "SRH_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "redisgate", "dev", *arguments],
            cwd=cwd,
            env=clean | dict(environ or {}),
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def text(self) -> str:
        # Not by seeking: the processes that write share the position.
        return os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size, 0).decode()

    def ready(self) -> "Dev":
        wait_for(lambda: "Ctrl-C stops" in self.text() or self.process.poll() is not None, what="redisgate dev")
        assert self.process.poll() is None, self.text()
        return self

    @property
    def port(self) -> int:
        match = re.search(r"Address +http://127.0.0.1:(\d+)", self.text())
        assert match is not None, self.text()
        return int(match[1])

    def token(self, label: str = "Token") -> str:
        match = re.search(rf"^  {label} +(\S+)$", self.text(), re.MULTILINE)
        assert match is not None, self.text()
        return match[1]

    def family(self) -> list[int]:
        """The processes it started, at any depth."""
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    children = [int(child) for child in (task / "children").read_text().split()]
                    found += children
                    queue += children
        return found

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


def at_home_in(data: Path) -> list[int]:
    """Processes that work in this directory or were told of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (process / "cmdline").read_bytes().decode(errors="replace")
            if alive(int(process.name)) and (str(data) in told or os.readlink(process / "cwd").startswith(str(data))):
                found.append(int(process.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Dev]]:
    started: list[Dev] = []

    def make(*arguments: str, **options: Any) -> Dev:
        dev = Dev(tmp_path, *arguments, **options)
        started.append(dev)
        return dev

    yield make
    for dev in started:
        dev.process.terminate()
        dev.process.wait(20)
        dev.output.close()


@pytest.mark.parametrize("flags", [[], ["--gateway-only"]], ids=["everything", "gateway"])
def test_what_it_prints_works_and_stays(start: Callable[..., Dev], tmp_path: Path, flags: list[str]) -> None:
    dev = start("--port", "0", "--data", "here", *flags).ready()
    text = dev.text()
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith("curl ")]
    if shutil.which("curl"):
        done = subprocess.run(["curl", "-sS", *shlex.split(line)[1:]], capture_output=True, text=True, check=True)
        assert done.stdout == '{"result":"OK"}'
    snippet = text[text.index("  from upstash_redis") :]
    program = "\n".join(part.strip() for part in snippet[: snippet.index("\n\n")].splitlines())
    if not shutil.which("curl"):
        program = program.replace("print", "redis.set('hello', 'world')\nprint")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "world\n", done.stderr
    with Client(dev.port, dev.token("Read-only token")) as client:
        assert client.get("/get/hello").result == "world"
        assert "NOPERM" in client.get("/set/hello/no").error
    tokens = dev.token(), dev.token("Read-only token")
    family = dev.family()
    assert len(family) >= 2
    assert dev.end(signal.SIGINT) == 0
    assert not [pid for pid in family if alive(pid)]
    assert not at_home_in(tmp_path)
    assert "Traceback" not in dev.text()
    assert (tmp_path / "here").stat().st_mode & 0o077 == 0

    again = start("--port", "0", "--data", "here", *flags).ready()
    assert (again.token(), again.token("Read-only token")) == tokens
    with Client(again.port, tokens[0]) as client:
        assert client.get("/get/hello").result == "world"
    assert again.end(signal.SIGTERM) == 0
    assert not at_home_in(tmp_path)


def test_the_demo_account_has_all_that_it_needs(start: Callable[..., Dev]) -> None:
    dev = start("--port", "0").ready()
    login = re.search(r"Sign in +(\S+) / (\S+)$", dev.text(), re.MULTILINE)
    assert login is not None
    assert login.groups() == ("demo@redisgate.dev", "Demo123456!")
    with Client(dev.port, token=None) as client:
        data = client.post("/auth/login", {"email": login[1], "password": login[2]}).json()["data"]
        assert client.get("/docs").status == 200
    organization, instance = dev.token("Organization"), re.search(r"Instance +(\S+) \(running\)", dev.text())
    assert instance is not None, dev.text()
    assert data["organization_id"] == organization
    with Client(dev.port, token=data["token"]) as client:
        assert client.get(f"/redis/{instance[1]}/ping").result == "PONG"
        assert client.get("/stats").json()["data"]["instances_by_status"] == {"running": 1}
    with Client(dev.port, token=dev.token("API key")) as client:
        assert client.get("/set/by/key").result == "OK"
        listed = client.get(f"/api/organizations/{organization}/redis-instances").json()["data"]["items"]
        assert [(each["id"], each["slug"]) for each in listed] == [(instance[1], "demo")]
    assert dev.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("flags", [[], ["--gateway-only"]], ids=["everything", "gateway"])
def test_not_even_a_kill_leaves_anything_behind(start: Callable[..., Dev], tmp_path: Path, flags: list[str]) -> None:
    dev = start("--port", "0", *flags).ready()
    with Client(dev.port, dev.token()) as client:
        assert client.get("/set/kept/1").result == "OK"
    family = dev.family()
    assert dev.end(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not [pid for pid in family if alive(pid)], what="its processes to end")
    wait_for(lambda: not at_home_in(tmp_path), what="Redis and PostgreSQL to end")
    again = start("--port", "0", *flags).ready()
    with Client(again.port, again.token()) as client:
        response = client.get("/get/kept")
        assert response.body == b'{"result":"1"}', (response, again.text())


def test_one_at_a_time_per_directory(start: Callable[..., Dev]) -> None:
    start("--port", "0", "--data", "d").ready()
    second = start("--port", "0", "--data", "d")
    assert second.process.wait(20) == 2
    assert "another `redisgate dev` uses" in second.text()
    assert "Traceback" not in second.text()


def test_a_taken_port_is_named_and_redis_stopped(start: Callable[..., Dev]) -> None:
    first = start("--port", str(free_port()), "--data", "a").ready()
    second = start("--port", str(first.port), "--data", "b")
    assert second.process.wait(20) != 0
    assert str(first.port) in second.text()
    assert "in use" in second.text()
    assert "Traceback" not in second.text()


def test_a_directory_that_cannot_be_used_is_named(start: Callable[..., Dev], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dev = start("--data", "file/data")
    assert dev.process.wait(20) == 2
    assert "name another directory with --data" in dev.text()


@pytest.mark.timeout(90)
def test_variables_set_what_dev_leaves_open(start: Callable[..., Dev], monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker-compose.yml does: a port for Prometheus, the whole access log, one worker."""
    port = free_port()
    variables = {
        "METRICS_PORT": str(port),
        "WORKERS": "1",
        "ACCESS_LOG": "all",
        "LOG_LEVEL": "info",
        "MODE": "production",
    }
    environ = {f"REDISGATE_{name}": value for name, value in variables.items()}
    dev = start("--port", "0", "--data", "data", environ=environ)
    dev.ready()
    with Client(dev.port, dev.token()) as client:
        assert client.get("/set/k/v").result == "OK"
    wait_for(lambda: "GET /set/" in dev.text().partition("Ctrl-C stops")[2], 5, "the access log")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    assert "redisgate_build_info" in text
    assert "worker 1" not in dev.text()
