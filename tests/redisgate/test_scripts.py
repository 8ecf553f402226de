"""Script flags that a server does not know, and what must not make the gateway think so."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http import Client
from tests.servers import Gateway, RedisServer, needs_redis_7, single_instance, wait_for

pytestmark = needs_redis_7

NO_WRITES = "#!lua flags=no-writes\nreturn redis.call('SET', 'scripts:k', 'written')"
LOCKING = "#!lua flags=allow-key-locking\nreturn 'ran'"


@pytest.fixture
def gateway(redis_server: RedisServer) -> Iterator[Gateway]:
    """One worker that has asked nothing yet."""
    gateway = Gateway(single_instance(redis_server), ["--workers", "1"])
    yield gateway
    gateway.stop()


def test_a_user_who_may_not_ask_takes_no_flag_from_the_others(gateway: Gateway, redis_server: RedisServer) -> None:
    redis_server.raw(b"ACL SETUSER dave on >wonder ~* +eval +ping\r\n", 5)
    with Client(gateway.port) as client:
        token = client.command("ACL", "RESTTOKEN", "dave", "wonder").result
        with Client(gateway.port, token) as dave:
            assert dave.command("EVAL", "#!lua flags=no-writes\nreturn 'read'", 0).result == "read"
        assert "Write commands are not allowed" in client.command("EVAL", NO_WRITES, 0).error


def test_a_busy_server_is_asked_again(gateway: Gateway, redis_server: RedisServer) -> None:
    redis_server.raw(b"CONFIG SET busy-reply-threshold 1\r\n", 5)
    endless = b"EVAL 'while true do end' 0\r\n"
    thread = threading.Thread(target=redis_server.raw, args=(endless, 5))
    thread.start()
    try:
        wait_for(lambda: redis_server.raw(b"PING\r\n", 5).startswith(b"-BUSY"), what="the script to run")
        with Client(gateway.port) as client:
            # Connecting waits for a server that is busy; what it says then is the client's to hear.
            response = client.command("EVAL", NO_WRITES, 0)
            assert response.status in (400, 503)
            assert "BUSY" in response.error or response.status == 503
    finally:
        redis_server.raw(b"SCRIPT KILL\r\n", 5)
        thread.join()
    with Client(gateway.port) as client:
        wait_for(lambda: client.command("PING").status == 200, what="the gateway to reach the server again")
        assert "Write commands are not allowed" in client.command("EVAL", NO_WRITES, 0).error


def test_made_up_flags_push_out_none_that_are_in_use(gateway: Gateway) -> None:
    with Client(gateway.port) as client:
        assert client.command("EVAL", LOCKING, 0).result == "ran"
        made_up = [["EVAL", f"#!lua flags=made-up-{number}\nreturn {number}", 0] for number in range(150)]
        replies = client.post("/pipeline", made_up).json()
        assert replies == [{"result": number} for number in range(150)]
        many = ",".join(f"other-{number}" for number in range(100))
        assert client.command("EVAL", f"#!lua flags={many},no-writes\nreturn 1", 0).result == 1
        assert client.command("EVAL", LOCKING, 0).result == "ran"
        assert "Write commands are not allowed" in client.command("EVAL", NO_WRITES, 0).error


def test_a_flag_of_any_length_is_unknown_and_not_kept(gateway: Gateway) -> None:
    def resident() -> int:
        (worker,) = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children").read_text().split()
        status = Path(f"/proc/{worker}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    with Client(gateway.port) as client:
        before = 0
        for number in range(30):
            flag = f"{number}" + "x" * 3_000_000
            assert client.command("EVAL", f"#!lua flags={flag}\nreturn 1", 0).result == 1
            before = before or resident()
        assert resident() - before < 40_000_000
