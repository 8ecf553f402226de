"""The supervisor with real processes: a tiny server stands for the gateway's worker.

Run as a module, this file is that gateway: `python -m tests.redisgate.test_supervisor FILE`, settings in a JSON file.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from redisgate import supervisor
from redisgate.access import token_digest
from redisgate.config import Limits, Settings, TokenConfig
from redisgate.shared import SharedState

DEADLINE = 20.0
"""Seconds until something awaited counts as never happening."""
ROOT = Path(__file__).parents[2]


# The gateway under test


def load(path: Path) -> Settings:
    values = json.loads(path.read_text())
    if "error" in values:
        raise ValueError(values["error"])
    return Settings(
        host=values.get("host", "127.0.0.1"),
        port=values.get("port", 0),
        workers=values.get("workers", 2),
        base_domain=values.get("tag", "first"),
        state_dir=Path(values["state_dir"]),
        secret_key=b"k" * 32,
        limits=dataclasses.replace(Limits(), drain_timeout=values.get("drain_timeout", 10.0)),
        tokens=tuple(
            TokenConfig(token=token, instance="main", name=token, daily=values.get("daily", 1000), rate=1000)
            for token in values.get("tokens", ())
        ),
    )


def line_worker(settings: Settings, sock: socket.socket, index: int, shared: SharedState, ready_fd: int) -> None:
    """Answers one line per connection; the line says what to do."""
    if settings.base_domain == "broken":
        raise RuntimeError("this worker cannot start")
    if settings.base_domain == "silent":
        signal.pause()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        connections: set[asyncio.Task[None]] = set()
        stop = asyncio.Event()
        if settings.base_domain != "stubborn":
            loop.add_signal_handler(signal.SIGTERM, stop.set)
        else:
            loop.add_signal_handler(signal.SIGTERM, lambda: None)

        async def answer(connection: socket.socket) -> None:
            with connection:
                line = b""
                while not line.endswith(b"\n"):
                    chunk = await loop.sock_recv(connection, 100)
                    if not chunk:
                        return
                    line += chunk
                word, *arguments = line.decode().split()
                if word == "crash":
                    os._exit(3)
                reply = f"{index} {os.getpid()} {settings.base_domain}"
                if word == "add":
                    counter = shared.counter(token_digest(arguments[0]), index)
                    counter.add(1, time.time())
                    reply = str(counter.day_usage(time.time()))
                if word == "hold":
                    await loop.sock_sendall(connection, b"held ")
                    await loop.sock_recv(connection, 100)
                await loop.sock_sendall(connection, reply.encode())

        def accept() -> None:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                connection, _ = sock.accept()
                connection.setblocking(False)
                task = loop.create_task(answer(connection))
                connections.add(task)
                task.add_done_callback(connections.discard)

        loop.add_reader(sock, accept)
        os.write(ready_fd, b"1")
        os.close(ready_fd)
        await stop.wait()
        loop.remove_reader(sock)
        sock.close()
        if connections:
            await asyncio.wait(connections, timeout=settings.limits.drain_timeout)

    asyncio.run(serve())


def main(path: Path) -> int:
    supervisor.DRAIN_GRACE = 0.2
    supervisor.START_TIMEOUT = 2.0
    return supervisor.run(
        load(path),
        lambda: load(path),
        lambda settings: print(f"ready on {settings.port}", flush=True),
        worker_main=line_worker,
    )


# What the tests see of it


class Gateway:
    """A running gateway, its settings file and its output."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.write()
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.redisgate.test_supervisor", str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0

    def write(self, **changes: Any) -> None:
        self.settings.update(changes)
        self.path.write_text(json.dumps(self.settings))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line of output that matches."""
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no line matches {pattern!r} in {self.lines}")
            if line is None:
                pytest.fail(f"ended before a line matched {pattern!r}: {self.lines}")
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match

    def wait_ready(self) -> "Gateway":
        self.port = int(self.wait_for(r"^ready on (\d+)$")[1])
        return self

    def ended(self) -> int:
        """The exit status, when it has ended."""
        status = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        while not self._new.empty():
            line = self._new.get()
            if line is not None:
                self.lines.append(line)
        return status

    def connect(self) -> socket.socket:
        return socket.create_connection((self.settings.get("host", "127.0.0.1"), self.port), timeout=DEADLINE)

    def ask(self, line: str) -> str:
        """One line on a connection of its own; "" if it was closed without an answer."""
        with self.connect() as connection:
            connection.sendall(line.encode() + b"\n")
            return read_all(connection)

    def workers(self) -> dict[int, tuple[int, str]]:
        """Process and tag of every worker, by index: asks until each has answered."""
        found: dict[int, tuple[int, str]] = {}

        def all_answered() -> bool:
            index, pid, tag = self.ask("who").split()
            found[int(index)] = (int(pid), tag)
            return len(found) == self.settings.get("workers", 2)

        eventually(all_answered)
        return found

    def wait_tag(self, tag: str) -> None:
        """Until the workers of these settings answer; those before may still take a connection as they are told."""
        eventually(lambda: {found for _, found in self.workers().values()} == {tag})

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def read_all(connection: socket.socket) -> str:
    received = b""
    while chunk := connection.recv(1000):
        received += chunk
    return received.decode()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def wait_gone(pid: int) -> None:
    """Until a process that is no child of ours has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], DEADLINE)[0], f"process {pid} lives on"
    finally:
        os.close(fd)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways; kills what is left of them."""
    gateways: list[Gateway] = []

    def start_one(**settings: Any) -> Gateway:
        settings.setdefault("state_dir", str(tmp_path / "state"))
        gateways.append(Gateway(tmp_path / f"settings{len(gateways)}.json", settings))
        return gateways[-1]

    yield start_one
    for gateway in gateways:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(gateway.process.pid, signal.SIGKILL)
        gateway.ended()


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", r"127\.0\.0\.1"), ("::1", r"\[::1\]")], ids=["ipv4", "ipv6"])
def test_the_address_is_printed_when_all_workers_accept(start: Callable[..., Gateway], host: str, shown: str) -> None:
    gateway = start(workers=3, host=host)
    announced = gateway.wait_for(rf"^listening on http://{shown}:(\d+) \(3 workers\)$")
    gateway.wait_ready()
    assert gateway.port == int(announced[1])
    assert sorted(gateway.workers()) == [0, 1, 2]
    gateway.signal(signal.SIGTERM)
    assert gateway.ended() == 0


def test_a_port_that_another_gateway_has_is_one_line_and_status_1(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    first = start().wait_ready()
    second = start(port=first.port, state_dir=str(tmp_path / "other"))
    assert second.ended() == 1
    assert second.lines == [
        f"redisgate: cannot listen on 127.0.0.1:{first.port}: Address already in use;"
        " choose another with --port or REDISGATE_PORT"
    ]


def test_a_port_is_free_again_at_once(start: Callable[..., Gateway]) -> None:
    first = start().wait_ready()
    with first.connect() as connection:
        connection.sendall(b"who\n")
        read_all(connection)  # the gateway closes first, so its side is left in TIME_WAIT
    first.signal(signal.SIGTERM)
    assert first.ended() == 0
    start(port=first.port).wait_ready()


def test_a_killed_worker_is_replaced_and_connections_that_wait_are_answered(start: Callable[..., Gateway]) -> None:
    gateway = start(workers=1).wait_ready()
    ((pid, _),) = gateway.workers().values()
    os.kill(pid, signal.SIGSTOP)
    waiting = [gateway.connect() for _ in range(20)]
    for connection in waiting:
        connection.sendall(b"who\n")
    os.kill(pid, signal.SIGKILL)
    for connection in waiting:
        with connection:
            index, replacement, _ = read_all(connection).split()
            assert index == "0"
            assert int(replacement) != pid
    gateway.wait_for(rf"worker 0 \(process {pid}\) died: SIGKILL")


def test_a_worker_that_keeps_dying_is_started_at_growing_intervals(start: Callable[..., Gateway]) -> None:
    gateway = start(workers=1).wait_ready()
    for delay in ("0.1", "0.2", "0.4"):
        assert gateway.ask("crash") == ""
        gateway.wait_for(rf"worker 0 \(process \d+\) died: exit status 3; replacing it after {delay} s")
    assert gateway.workers()


@pytest.mark.parametrize(
    ("tag", "reason"), [("broken", "exit status 1"), ("silent", "it was not ready within 2 s")], ids=["fails", "hangs"]
)
def test_workers_that_never_get_ready_end_the_gateway_with_status_1(
    start: Callable[..., Gateway], tag: str, reason: str
) -> None:
    gateway = start(tag=tag)
    assert gateway.ended() == 1
    assert [
        line
        for line in gateway.lines
        if re.search(rf"^redisgate: worker \d stopped before it was ready: {reason}$", line)
    ]
    assert not [line for line in gateway.lines if "listening" in line]
    if tag == "broken":
        assert [line for line in gateway.lines if "this worker cannot start" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_is_under_way_and_refuses_what_is_new(
    start: Callable[..., Gateway], number: signal.Signals
) -> None:
    gateway = start().wait_ready()
    with gateway.connect() as held:
        held.sendall(b"hold\n")
        assert held.recv(5) == b"held "
        gateway.signal(number)
        gateway.wait_for("draining")

        def refused() -> bool:
            try:
                gateway.connect().close()
            except ConnectionError:
                return True
            return False

        eventually(refused)
        assert gateway.process.poll() is None
        held.sendall(b"go on\n")
        assert read_all(held).endswith(" first")
    assert gateway.ended() == 0


def test_ctrl_c_in_a_terminal_drains_though_all_processes_get_it(start: Callable[..., Gateway]) -> None:
    gateway = start().wait_ready()
    with gateway.connect() as held:
        held.sendall(b"hold\n")
        assert held.recv(5) == b"held "
        os.killpg(gateway.process.pid, signal.SIGINT)
        gateway.wait_for("draining")
        held.sendall(b"go on\n")
        assert read_all(held).endswith(" first")
    assert gateway.ended() == 0


def test_a_second_stop_is_immediate(start: Callable[..., Gateway]) -> None:
    gateway = start(drain_timeout=600.0).wait_ready()
    with gateway.connect() as held:
        held.sendall(b"hold\n")
        assert held.recv(5) == b"held "
        gateway.signal(signal.SIGTERM)
        gateway.wait_for("draining")
        gateway.signal(signal.SIGTERM)
        assert gateway.ended() == 1


def test_a_worker_that_does_not_drain_in_time_is_killed(start: Callable[..., Gateway]) -> None:
    gateway = start(tag="stubborn", workers=1, drain_timeout=0.1).wait_ready()
    ((pid, _),) = gateway.workers().values()
    gateway.signal(signal.SIGTERM)
    assert gateway.ended() == 1
    wait_gone(pid)
    assert [line for line in gateway.lines if "is not done in time: killed" in line]


def test_reloads_under_load_reset_and_refuse_no_connection(start: Callable[..., Gateway]) -> None:
    gateway = start(workers=3).wait_ready()
    before = gateway.workers()
    failures: list[str] = []
    answered = [0]
    done = threading.Event()

    def load_it() -> None:
        while not done.is_set():
            try:
                reply = gateway.ask("who")
            except OSError as error:
                failures.append(repr(error))
            else:
                answered[0] += 1
                if len(reply.split()) != 3:
                    failures.append(reply)

    clients = [threading.Thread(target=load_it) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        for tag in ("second", "third", "fourth"):
            gateway.write(tag=tag)
            gateway.signal(signal.SIGHUP)
            gateway.wait_for("reloaded")
        for pid, _ in before.values():
            wait_gone(pid)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert failures == []
    assert answered[0] > 100
    gateway.wait_tag("fourth")
    gateway.signal(signal.SIGTERM)
    assert gateway.ended() == 0


def test_a_reload_lets_the_old_workers_answer_what_is_under_way(start: Callable[..., Gateway]) -> None:
    gateway = start().wait_ready()
    with gateway.connect() as held:
        held.sendall(b"hold\n")
        assert held.recv(5) == b"held "
        gateway.write(tag="second")
        gateway.signal(signal.SIGHUP)
        gateway.wait_for("reloaded")
        gateway.wait_tag("second")
        held.sendall(b"go on\n")
        assert read_all(held).endswith(" first")


def test_a_reload_waits_for_the_drain_of_the_one_before(start: Callable[..., Gateway]) -> None:
    gateway = start(workers=1).wait_ready()
    with gateway.connect() as held:
        held.sendall(b"hold\n")
        assert held.recv(5) == b"held "
        gateway.write(tag="second")
        gateway.signal(signal.SIGHUP)
        gateway.wait_for("reloaded")
        gateway.write(tag="third")
        gateway.signal(signal.SIGHUP)
        gateway.wait_for("reloading")
        gateway.wait_tag("second")
        held.sendall(b"go on\n")
        assert read_all(held).endswith(" first")
    gateway.wait_for("reloaded")
    gateway.wait_tag("third")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "line 3: no such\nsetting"}, "reload failed: line 3: no such setting; kept the old settings"),
        (
            {"tag": "broken"},
            "reload failed: worker 0 stopped before it was ready: exit status 1; kept the old settings",
        ),
        ({"tokens": ["fresh"]}, "reload failed: the first token with a daily limit needs a restart; kept"),
    ],
    ids=["settings", "workers", "counters"],
)
def test_a_reload_that_fails_leaves_the_old_workers_alone(
    start: Callable[..., Gateway], change: dict[str, Any], message: str
) -> None:
    gateway = start().wait_ready()
    before = gateway.workers()
    gateway.write(**change)
    gateway.signal(signal.SIGHUP)
    gateway.wait_for(re.escape(message))
    assert gateway.workers() == before
    for key in change:
        del gateway.settings[key]
    gateway.write(tag="mended")
    gateway.signal(signal.SIGHUP)
    gateway.wait_for("reloaded")
    gateway.wait_tag("mended")


def test_a_reload_says_what_needs_a_restart(start: Callable[..., Gateway]) -> None:
    gateway = start(workers=2).wait_ready()
    gateway.write(port=1, workers=2, host="127.0.0.2")
    gateway.signal(signal.SIGHUP)
    gateway.wait_for("a reload does not change host, port: restart for that")
    gateway.wait_for("reloaded")
    gateway.settings["host"] = "127.0.0.1"
    assert len(gateway.workers()) == 2


def test_counts_go_on_through_crash_and_reload_also_for_new_tokens(start: Callable[..., Gateway]) -> None:
    gateway = start(tokens=["one"]).wait_ready()
    counted = 0
    for _ in range(20):
        counted += 1
        assert gateway.ask("add one") == str(counted)
    for pid, _ in gateway.workers().values():
        os.kill(pid, signal.SIGKILL)
    for _ in range(20):
        counted += 1
        assert gateway.ask("add one") == str(counted)
    gateway.write(tokens=["two", "one"])
    gateway.signal(signal.SIGHUP)
    while not [line for line in gateway.lines if "reloaded" in line]:
        counted += 1
        assert gateway.ask("add one") == str(counted)
        with contextlib.suppress(queue.Empty):
            gateway.lines.append(gateway._new.get_nowait() or "")
    for _ in range(20):
        counted += 1
        assert gateway.ask("add one") == str(counted)
    assert gateway.ask("add two") == "1"


def test_counts_survive_a_kill_of_the_supervisor_which_no_worker_outlives(start: Callable[..., Gateway]) -> None:
    gateway = start(tokens=["one"]).wait_ready()
    for number in range(30):
        assert gateway.ask("add one") == str(number + 1)
    workers = gateway.workers()
    gateway.signal(signal.SIGKILL)
    again = start(tokens=["one"], workers=3, port=0).wait_ready()
    assert again.ask("add one") == "31"
    for pid, _ in workers.values():
        wait_gone(pid)


def test_a_second_gateway_on_the_state_directory_is_refused(start: Callable[..., Gateway]) -> None:
    first = start(tokens=["one"]).wait_ready()
    second = start(tokens=["one"])
    assert second.ended() == 1
    (line,) = second.lines
    assert f"another gateway (process {first.process.pid}) keeps its counters in" in line
    assert first.ask("add one") == "1"


def test_daily_limits_without_a_place_for_their_counts_stop_the_start(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    gateway = start(tokens=["one"], state_dir=str(tmp_path / "file" / "state"))
    assert gateway.ended() == 1
    (line,) = gateway.lines
    assert line.startswith("redisgate: cannot keep counters in ")
    assert "REDISGATE_STATE_DIR" in line


def test_without_daily_limits_no_place_is_needed(start: Callable[..., Gateway], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    gateway = start(tokens=["one"], daily=None, state_dir=str(tmp_path / "file" / "state")).wait_ready()
    assert gateway.ask("add one") == "1"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
