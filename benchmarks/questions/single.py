"""What does a single command cost, and how long does it take?"""

from functools import partial

from benchmarks.bench import Bench
from benchmarks.load import CLIENT_HEADERS, redis_command, wrk

TITLE = "single GET and SET"
KEY = "key:1"
VALUE = b"0123456789"


def run(bench: Bench) -> None:
    redis_command(bench.redis_port, b"SET", KEY.encode(), VALUE)
    for connections in (64, 1, 256, 1000):
        bench.compare(
            f"GET, {connections} connections",
            {
                peer.name: partial(wrk, peer, peer.get % KEY, connections=connections, seconds=bench.seconds)
                for peer in bench.peers()
            },
        )
    bench.compare(
        "SET, 64 connections",
        {peer.name: partial(wrk, peer, peer.set % KEY, seconds=bench.seconds) for peer in bench.peers()},
    )
    gateway = bench.peer("RedisGate")
    assert gateway is not None
    get, set_ = b'["GET","key:1"]', b'["SET","key:1","0123456789"]'
    load = partial(wrk, gateway, seconds=bench.seconds)
    bench.compare(
        "forms of a request, RedisGate, 64 connections",
        {
            "GET, path": partial(load, gateway.get % KEY),
            "GET, JSON body": partial(load, "/", method="POST", body=get),
            "GET, path, a dozen headers": partial(load, gateway.get % KEY, headers=CLIENT_HEADERS),
            "GET, JSON body, a dozen headers": partial(load, "/", method="POST", body=get, headers=CLIENT_HEADERS),
            "SET, path": partial(load, gateway.set % KEY),
            "SET, JSON body": partial(load, "/", method="POST", body=set_),
            "SET, JSON body, a dozen headers": partial(load, "/", method="POST", body=set_, headers=CLIENT_HEADERS),
        },
    )
