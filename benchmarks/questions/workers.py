"""What do two workers give over one, on all cores; and what does TLS towards Redis cost?"""

import os
from functools import partial

from benchmarks.bench import Bench
from benchmarks.load import redis_command, wrk
from benchmarks.peers import start_redis_tls, start_redisgate

TITLE = "two workers, and TLS"


def run(bench: Bench) -> None:
    redis_command(bench.redis_port, b"SET", b"key:1", b"0123456789")
    everywhere = os.sched_getaffinity(0)
    gateways = {
        f"{workers} worker{'s' * (workers > 1)}": bench.keep(
            start_redisgate(bench.redis_port, workers=workers, affinity=everywhere)
        )
        for workers in (1, 2)
    }
    bench.compare(
        f"GET, 256 connections, load and servers on the same {len(everywhere)} cores",
        {
            name: partial(wrk, gateway, gateway.get % "key:1", connections=256, seconds=bench.seconds)
            for name, gateway in gateways.items()
        },
    )
    for gateway in gateways.values():
        bench.drop(gateway)
    redis, config = start_redis_tls()
    plain, tls = bench.peer("RedisGate"), start_redisgate(0, config=config)
    assert plain is not None
    try:
        bench.keep(tls)
        bench.compare(
            "GET, 64 connections, by the connection to Redis",
            {
                "TCP": partial(wrk, plain, plain.get % "key:1", seconds=bench.seconds),
                "TLS": partial(wrk, tls, tls.get % "key:1", seconds=bench.seconds),
            },
        )
        bench.drop(tls)
    finally:
        redis.stop()
