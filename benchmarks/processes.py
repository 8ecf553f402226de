"""Server processes under test: started, watched by /proc, ended."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_SECONDS = 20.0
STOP_SECONDS = 15.0


def cores() -> tuple[set[int], set[int]]:
    """The cores for the server under test, and those for the load and for Redis: apart if there are two."""
    available = sorted(os.sched_getaffinity(0))
    return ({available[0]}, set(available[1:])) if len(available) > 1 else (set(available), set(available))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(affinity: set[int]) -> Callable[[], None]:
    """For `preexec_fn`."""
    return lambda: os.sched_setaffinity(0, affinity)


@dataclass
class Usage:
    """CPU seconds and resident bytes of a process with its children."""

    cpu: float
    memory: int


class Server:
    """One server, with its children pinned to some cores."""

    def __init__(
        self,
        command: Sequence[str | Path],
        affinity: set[int],
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "SRH_"))}
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=directory,
            env={**clean, **(environ or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=pin(affinity),
        )

    def wait_until(self, answers: Callable[[], bool]) -> "Server":
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if answers():
                    return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                assert self.process.stderr is not None
                raise RuntimeError(f"{self.process.args}: {self.process.stderr.read().decode()[-2000:]}")
            time.sleep(0.001)

    def pids(self) -> list[int]:
        """The process and those it started, at any depth."""
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    queue += [int(child) for child in (task / "children").read_text().split()]
        return found

    def usage(self) -> Usage:
        """Summed over the processes."""
        cpu = 0.0
        memory = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                cpu += (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
                memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        return Usage(cpu, memory)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not do."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()


def http_answers(port: int, path: str, headers: str = "") -> Callable[[], bool]:
    """Whether an HTTP request is answered with 200."""

    def ask() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Connection: close\r\n\r\n".encode())
            return b" 200 " in sock.recv(4096)

    return ask
