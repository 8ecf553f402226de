"""Does a command cost more with many tokens and instances, and do unused instances let go of Redis?"""

import socket
import time
from functools import partial

from benchmarks.bench import Bench
from benchmarks.load import redis_clients, redis_command, wrk
from benchmarks.peers import Peer, start_redis, start_redisgate

TITLE = "many tokens, many instances"
IDLE_SECONDS = 2.0
MIXED_TOKENS = 1000


def run(bench: Bench) -> None:
    # A Redis of its own, so that every connection it has is one of these gateways'.
    redis, port = start_redis()
    try:
        _ask(bench, port)
    finally:
        redis.stop()


def _ask(bench: Bench, redis_port: int) -> None:
    redis_command(redis_port, b"SET", b"key:1", b"0123456789")
    cases = {}
    gateways = []
    for tokens, instances in ((1, 1), (1000, 1), (100_000, 1), (100_000, 1000)):
        bench.progress(f"starting with {tokens:,} tokens, {instances:,} instances")
        gateway = bench.keep(start_redisgate(redis_port, config=_config(redis_port, tokens, instances)))
        gateways.append(gateway)
        name = f"{tokens:,} tokens, {instances:,} instances"
        cases[name] = partial(wrk, gateway, "/get/key:1", headers=(_header(tokens - 1),), seconds=bench.seconds)
        if tokens != 1000:
            # wrk is slower with a script: compare these two with each other.
            in_turn = min(tokens, MIXED_TOKENS)
            cases[f"{name}, {in_turn:,} in turn by a script"] = partial(
                wrk, gateway, "/get/key:1", headers=(), script=_in_turn(in_turn), seconds=bench.seconds
            )
    bench.compare("single GET, 64 connections", cases)
    # One request to each of the thousand instances; then silence.
    _touch(gateways[-1], 1000)
    for gateway in gateways[:-1]:
        bench.drop(gateway)
    used = redis_clients(redis_port)
    deadline = time.monotonic() + 10 * IDLE_SECONDS
    while (left := redis_clients(redis_port)) and time.monotonic() < deadline:
        bench.progress(f"{left} connections to Redis are left")
        time.sleep(0.2)
    bench.record(
        f"connections of 1,000 instances, idle time {IDLE_SECONDS:g} s",
        {"after one request each": {"redis_connections": used}, "after the idle time": {"redis_connections": left}},
    )
    bench.drop(gateways[-1])


def _token(number: int) -> str:
    return f"token-{number:026d}"


def _header(number: int) -> str:
    return f"Authorization: Bearer {_token(number)}"


def _in_turn(tokens: int) -> str:
    """For wrk: as many clients with a token each take turns on the connections; no two requests in a row are alike."""
    return f"""
local number = 0
request = function()
  number = (number + 101) % {tokens}
  wrk.headers["Authorization"] = string.format("Bearer token-%026d", number * 97)
  return wrk.format(nil, nil)
end
"""


def _config(redis_port: int, tokens: int, instances: int) -> str:
    lines = []
    for number in range(instances):
        lines.append(f'[[instances]]\nid = "i{number}"\nurl = "redis://127.0.0.1:{redis_port}"\n')
        lines.append(f"idle_timeout = {IDLE_SECONDS}\npool_size = 2\n")
    for number in range(tokens):
        lines.append(
            f'[[tokens]]\ntoken = "{_token(number)}"\nname = "t{number}"\ninstance = "i{number % instances}"\n'
        )
    return "".join(lines)


def _touch(gateway: Peer, tokens: int) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as sock:
        for number in range(tokens):
            sock.sendall(f"GET /get/key:1 HTTP/1.1\r\nHost: x\r\n{_header(number)}\r\n\r\n".encode())
            if b" 200 " not in sock.recv(4096):
                raise RuntimeError(f"token {number} was not served")
