"""Capacity of an instance: beyond it what needs memory is refused, and the rest goes on."""

from tests.http import Client
from tests.servers import Gateway, RedisServer, single_instance, wait_for

OVER = "ERR DB capacity quota exceeded"


def test_beyond_its_capacity_an_instance_can_be_read_and_emptied() -> None:
    server = RedisServer()
    gateway = None
    try:
        environ = single_instance(server, REDISGATE_REDIS_CAPACITY="6MiB", REDISGATE_REDIS_IDLE_TIMEOUT="300ms")
        gateway = Gateway(environ, ["--workers", "1"])
        with Client(gateway.port) as client:
            assert client.command("SET", "k", "v").result == "OK"
            assert client.request("POST", "/set/large", b"x" * 8_000_000).result == "OK"
            wait_for(lambda: client.command("SET", "k", "w").status == 400, what="the capacity to be noticed")
            assert client.command("SET", "k", "w").error == OVER
            assert client.get("/set/k/w").error == OVER
            assert client.command("GET", "k").result in ("v", "w")
            items = client.post("/pipeline", [["LPUSH", "l", "x"], ["EXISTS", "k"], ["NOSUCH"]]).json()
            assert items[:2] == [{"error": OVER}, {"result": 1}]
            assert items[2]["error"].startswith("ERR unknown command")
            transaction = client.post("/multi-exec", [["DEL", "k"], ["INCR", "n"]])
            assert (transaction.status, transaction.error) == (400, OVER)
            assert client.command("EXISTS", "k").result == 1
            with Client(gateway.port, "readonly-token") as reader:
                assert reader.command("SET", "k", "x").error.startswith("NOPERM")
            assert client.command("DEL", "large").result == 1
            wait_for(lambda: client.command("SET", "k", "w").status == 200, what="the capacity to be noticed")
        # Looking at the memory keeps no connection open.
        wait_for(lambda: server.raw(b"INFO clients\r\n", 80).count(b"connected_clients:1\r"), what="the pool to close")
    finally:
        if gateway is not None:
            gateway.stop()
        server.stop()
