"""How long from `redisgate serve` to its first answer?"""

import time

from benchmarks.bench import Bench
from benchmarks.peers import start_redisgate

TITLE = "start"


def run(bench: Bench) -> None:
    def start() -> dict[str, float]:
        gateway = start_redisgate(bench.redis_port)
        milliseconds = (time.perf_counter() - gateway.server.started) * 1000
        gateway.server.stop()
        return {"milliseconds": milliseconds}

    bench.compare("from `redisgate serve --workers 1` to its first answer", {"RedisGate": start})
