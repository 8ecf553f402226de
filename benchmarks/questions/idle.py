"""What does an idle keep-alive connection cost in memory?"""

import resource
import socket

from benchmarks.bench import Bench
from benchmarks.peers import AUTHORIZATION

TITLE = "10,000 idle connections"
CONNECTIONS = 10_000


def run(bench: Bench) -> None:
    needed = CONNECTIONS + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    results = {}
    for peer in bench.peers("RedisGate", "floor", "webdis"):
        request = f"GET {peer.get % 'key:1'} HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}\r\n\r\n".encode()
        # What the first requests allocate once is not theirs.
        _open(peer.port, request, 100)
        before = peer.server.usage().memory
        sockets = []
        for _ in range(CONNECTIONS // 100):
            bench.progress(f"{peer.name}: {len(sockets):,} connections")
            sockets += _open(peer.port, request, 100)
        results[peer.name] = {"bytes_each": (peer.server.usage().memory - before) / len(sockets)}
        for sock in sockets:
            sock.close()
    bench.record(f"resident bytes of {CONNECTIONS:,} idle keep-alive connections", results)


def _open(port: int, request: bytes, count: int) -> list[socket.socket]:
    """Connections that have had one answer each."""
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(count)]
    for sock in sockets:
        sock.sendall(request)
    for sock in sockets:
        if b" 200 " not in sock.recv(4096):
            raise RuntimeError(f"port {port} did not answer")
    return sockets
