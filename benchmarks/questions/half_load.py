"""How long do the slowest take when there is room: p99 at half of what a server can do?"""

from functools import partial

from benchmarks.bench import Bench
from benchmarks.load import at_rate, redis_command, wrk

TITLE = "latency at half load"


def run(bench: Bench) -> None:
    redis_command(bench.redis_port, b"SET", b"key:1", b"0123456789")
    peers = bench.peers("RedisGate", "webdis", "nginx+Lua")
    half = {peer.name: wrk(peer, peer.get % "key:1", seconds=bench.seconds).rate / 2 for peer in peers}
    bench.compare(
        "GET at half of the server's own saturation",
        {
            peer.name: partial(at_rate, peer, peer.get % "key:1", half[peer.name], seconds=bench.seconds)
            for peer in peers
        },
    )
    lowest = min(half.values())
    bench.compare(
        "GET at half of the slowest server's saturation",
        {peer.name: partial(at_rate, peer, peer.get % "key:1", lowest, seconds=bench.seconds) for peer in peers},
    )
