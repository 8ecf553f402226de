"""Load by wrk and h2load, and what it cost the server."""

import json
import math
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import AUTHORIZATION, Missing, Peer
from benchmarks.processes import cores, pin

# The dozen headers that @upstash/redis sends by Node's fetch; Host, which wrk adds, is the twelfth.
CLIENT_HEADERS = (
    "Connection: keep-alive",
    AUTHORIZATION,
    "Upstash-Encoding: base64",
    "Upstash-Telemetry-Runtime: node@v20.20.2",
    "Upstash-Telemetry-Platform: unknown",
    "Upstash-Telemetry-Sdk: @upstash/redis@1.39.0",
    "Accept: */*",
    "Accept-Language: *",
    "Sec-Fetch-Mode: cors",
    "User-Agent: node",
    "Accept-Encoding: gzip, deflate",
)

_REPORT = """
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'JSON{"requests":%d,"seconds":%.6f,"bytes":%d,"broken":%d,"bad":%d,"p50":%d,"p99":%d,"p999":%d}\\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    errors.connect + errors.read + errors.write + errors.timeout, errors.status,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""


class LoadFailed(RuntimeError):
    """A server did not answer as it should."""

    def __init__(self, peer: Peer, what: str) -> None:
        super().__init__(f"{peer.name} {what}")
        self.peer = peer


@dataclass
class Run:
    """One run of load: rates per second, latencies and CPU per request in microseconds, memory in bytes."""

    rate: float
    cpu: float
    p50: float
    p99: float
    p999: float
    memory: float
    bytes_per_second: float


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed; Debian, Ubuntu: apt-get install {package}")
    return found


def _lua_string(value: bytes) -> str:
    return '"' + "".join(f"\\{byte:03d}" for byte in value) + '"'


def wrk(
    peer: Peer,
    path: str,
    *,
    seconds: int,
    connections: int = 64,
    method: str = "GET",
    body: bytes | None = None,
    headers: Sequence[str] = (AUTHORIZATION,),
    script: str = "",
) -> Run:
    """Saturate `peer` with one request, over and over.

    Raises:
        Missing: wrk is not installed.
        LoadFailed: a response was not 200, or a connection broke.
    """
    program = _tool("wrk", "wrk")
    script = f'wrk.method = "{method}"\n{script}{_REPORT}'
    if body is not None:
        script = f"wrk.body = {_lua_string(body)}\n{script}"
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        command = [program, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", file.name]
        for header in headers:
            command += ["-H", header]
        before = peer.server.usage()
        done = subprocess.run(
            [*command, peer.url + path], capture_output=True, text=True, check=True, preexec_fn=pin(cores()[1])
        )
        after = peer.server.usage()
    (line,) = [line[4:] for line in done.stdout.splitlines() if line.startswith("JSON")]
    result = json.loads(line)
    if result["broken"] or result["bad"] or not result["requests"]:
        raise LoadFailed(peer, f"{method} {path[:80]}: {result}")
    return Run(
        rate=result["requests"] / result["seconds"],
        cpu=(after.cpu - before.cpu) / result["requests"] * 1e6,
        p50=result["p50"],
        p99=result["p99"],
        p999=result["p999"],
        memory=after.memory,
        bytes_per_second=result["bytes"] / result["seconds"],
    )


def at_rate(peer: Peer, path: str, rate: float, *, seconds: int, connections: int = 16) -> Run:
    """Send `rate` requests per second, whether or not `peer` is done with the last ones.

    Raises:
        Missing: h2load is not installed.
        LoadFailed: a response was not 200, or none came.
    """
    program = _tool("h2load", "nghttp2-client")
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        before = peer.server.usage()
        subprocess.run(
            [
                *(program, "--h1", f"-c{connections}", "-t1", f"-D{seconds}", f"--rps={rate / connections:.3f}"),
                *("-H", AUTHORIZATION, f"--log-file={log}", peer.url + path),
            ],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=pin(cores()[1]),
        )
        after = peer.server.usage()
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    durations = sorted(int(row[2]) for row in rows)
    if not durations or any(row[1] != "200" for row in rows):
        raise LoadFailed(peer, f"{path[:80]} at {rate:.0f}/s: not every response was 200")

    def percentile(part: float) -> float:
        return durations[min(len(durations) - 1, math.ceil(len(durations) * part) - 1)]

    return Run(
        rate=len(durations) / seconds,
        cpu=(after.cpu - before.cpu) / len(durations) * 1e6,
        p50=percentile(0.5),
        p99=percentile(0.99),
        p999=percentile(0.999),
        memory=after.memory,
        bytes_per_second=0.0,
    )


def redis_command(port: int, *argv: bytes) -> bytes:
    """One command over TCP; the first bytes of its reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        parts = [b"*%d\r\n" % len(argv)] + [b"$%d\r\n%b\r\n" % (len(part), part) for part in argv]
        sock.sendall(b"".join(parts))
        return sock.recv(65536)


def redis_clients(port: int, *filters: bytes) -> int:
    """How many connections Redis has, but for the one that asks."""
    reply = redis_command(port, b"CLIENT", b"LIST", *filters)
    return sum(b" cmd=client" not in line for line in reply.splitlines() if line.startswith(b"id="))


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
