"""What do values of 10 B to 10 MiB cost, as JSON, base64 and RESP2; and what memory takes who does not read one?"""

import socket
import time
from functools import partial

from benchmarks.bench import Bench
from benchmarks.load import redis_command, wrk
from benchmarks.peers import AUTHORIZATION, Peer

TITLE = "values from 10 B to 10 MiB"
SIZES = {"10 B": 10, "1 KiB": 1024, "100 KiB": 100 * 1024, "10 MiB": 10 * 1024 * 1024}
FORMATS = {"JSON": (), "base64": ("Upstash-Encoding: base64",), "RESP2": ("Upstash-Response-Format: resp2",)}
READERS = 8


def run(bench: Bench) -> None:
    gateway = bench.peer("RedisGate")
    assert gateway is not None
    for name, size in SIZES.items():
        key = f"value:{size}"
        redis_command(bench.redis_port, b"SET", key.encode(), b"x" * size)
        # A large value takes the slowest server half a second.
        large = size > 1 << 20
        load = partial(wrk, connections=2 if large else 64, seconds=max(bench.seconds, 6) if large else bench.seconds)
        cases = {
            f"RedisGate, {form}": partial(load, gateway, gateway.get % key, headers=(AUTHORIZATION, *headers))
            for form, headers in FORMATS.items()
        }
        for peer in bench.peers("webdis", "nginx+Lua"):
            cases[f"{peer.name}, JSON"] = partial(load, peer, peer.get % key)
            if size == SIZES["100 KiB"] and peer.name == "nginx+Lua":
                cases["nginx, a file of that size"] = partial(load, peer, "/file/100KiB")
        bench.compare(f"a value of {name}", cases)
    bench.record("memory of a reader of 10 MiB that does not read, RESP2", {"RedisGate": _memory(bench, gateway)})


def _memory(bench: Bench, gateway: Peer) -> dict[str, float]:
    """Resident bytes per reader while each has asked for 10 MiB and takes none of it."""
    request = (
        f"GET {gateway.get % 'value:10485760'} HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}\r\n{FORMATS['RESP2'][0]}\r\n\r\n"
    )
    before = gateway.server.usage().memory
    highest = before
    readers = []
    try:
        for _ in range(READERS):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            sock.connect(("127.0.0.1", gateway.port))
            sock.sendall(request.encode())
            readers.append(sock)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            bench.progress("memory of readers that do not read")
            highest = max(highest, gateway.server.usage().memory)
            time.sleep(0.02)
    finally:
        for sock in readers:
            sock.close()
    return {"bytes_each": (highest - before) / READERS}
