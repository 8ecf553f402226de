"""How long after a PUBLISH does the last of thousands of subscribers have the message?"""

import selectors
import socket
import statistics
import time

from benchmarks.bench import Bench
from benchmarks.load import redis_clients, redis_command
from benchmarks.peers import AUTHORIZATION, Peer
from benchmarks.processes import cores, pin

TITLE = "Server-Sent Events to thousands of subscribers"
MESSAGES = 7


def run(bench: Bench) -> None:
    gateway = bench.peer("RedisGate")
    assert gateway is not None
    pin(cores()[1])()
    bench.record(
        "from PUBLISH to the last delivery",
        {f"{count:,} subscribers": _fan_out(bench, gateway, count) for count in (1000, 5000)},
    )


def _fan_out(bench: Bench, gateway: Peer, count: int) -> dict[str, float]:
    request = f"GET /subscribe/news HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}\r\n\r\n".encode()
    selector = selectors.EpollSelector()
    sockets = []
    try:
        for number in range(count):
            if number % 100 == 0:
                bench.progress(f"{number:,} subscribers")
            sock = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
            sock.sendall(request)
            sockets.append(sock)
            selector.register(sock, selectors.EVENT_READ)
        _wait_for_all(selector, count, b"subscribe,news,1")
        connections = redis_clients(bench.redis_port, b"TYPE", b"pubsub")
        times = []
        before = gateway.server.usage().cpu
        for number in range(MESSAGES):
            bench.progress(f"{count:,} subscribers: message {number + 1} of {MESSAGES}")
            began = time.perf_counter()
            redis_command(bench.redis_port, b"PUBLISH", b"news", b"message-%d." % number)
            _wait_for_all(selector, count, b"message-%d." % number)
            times.append((time.perf_counter() - began) * 1000)
        cpu = (gateway.server.usage().cpu - before) / (MESSAGES * count) * 1e6
    finally:
        for sock in sockets:
            sock.close()
        selector.close()
    return {"milliseconds": statistics.median(times), "cpu": cpu, "redis_connections": connections}


def _wait_for_all(selector: selectors.EpollSelector, count: int, wanted: bytes) -> None:
    missing = count
    deadline = time.monotonic() + 30
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{missing} of {count} subscribers did not get {wanted!r}")
        for key, _ in selector.select(1):
            if wanted in key.fileobj.recv(65536):  # type: ignore[union-attr]
                missing -= 1
