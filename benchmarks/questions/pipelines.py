"""What does a command cost in a pipeline or a transaction, beside redis-py pipelining over TCP?"""

import json
import subprocess
import sys
from functools import partial

from benchmarks.bench import Bench, Figures
from benchmarks.load import Run, redis_command, wrk
from benchmarks.peers import Peer
from benchmarks.processes import cores, pin

TITLE = "pipelines and transactions"

_REDIS_PY = """
import json, sys, time
import redis
port, size, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
client = redis.Redis(port=port)
count, began, cpu = 0, time.perf_counter(), time.process_time()
while time.perf_counter() - began < seconds:
    pipeline = client.pipeline(transaction=False)
    for number in range(size):
        pipeline.get(f"key:{number}")
    replies = pipeline.execute()
    assert len(replies) == size and replies[0] == b"0123456789"
    count += 1
cpu = time.process_time() - cpu
elapsed = time.perf_counter() - began
print(json.dumps({"rate": count / elapsed, "cpu": cpu / count * 1e6, "commands_per_cpu_second": count * size / cpu}))
"""


def run(bench: Bench) -> None:
    gateway = bench.peer("RedisGate")
    assert gateway is not None
    for number in range(1000):
        redis_command(bench.redis_port, b"SET", b"key:%d" % number, b"0123456789")
    for size in (10, 100, 1000):
        bench.compare(
            f"pipeline of {size} GETs",
            {
                "RedisGate, /pipeline": partial(_post, bench, gateway, "/pipeline", size),
                "redis-py over TCP": partial(_redis_py, bench, size),
            },
        )
    bench.compare(
        "transaction of 10 GETs", {"RedisGate, /multi-exec": partial(_post, bench, gateway, "/multi-exec", 10)}
    )


def _post(bench: Bench, gateway: Peer, path: str, size: int) -> Figures:
    body = json.dumps([["GET", f"key:{number}"] for number in range(size)]).encode()
    found: Run = wrk(gateway, path, method="POST", body=body, connections=16, seconds=bench.seconds)
    return {
        "rate": found.rate,
        "cpu": found.cpu,
        "p50": found.p50,
        "p99": found.p99,
        "commands_per_cpu_second": size / found.cpu * 1e6,
    }


def _redis_py(bench: Bench, size: int) -> Figures:
    done = subprocess.run(
        [sys.executable, "-c", _REDIS_PY, str(bench.redis_port), str(size), str(bench.seconds)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=pin(cores()[0]),
    )
    result: Figures = json.loads(done.stdout)
    return result
