"""What happens when Redis, the network or a client misbehaves.

A client can always tell whether its write may have run.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.http import Client
from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for


class HostileRedis:
    """Answers the handshake as Redis would, then every command with what the script says."""

    def __init__(self) -> None:
        self.answer: Callable[[bytes], bytes | None] = lambda command: b"+OK\r\n"
        self.accepted = 0
        self.received: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        file = sock.makefile("rb")
        try:
            while line := file.readline():
                arguments = []
                for _ in range(int(line[1:])):
                    size = int(file.readline()[1:])
                    arguments.append(file.read(size + 2)[:-2])
                self._reply(sock, arguments)
        except (OSError, ValueError):
            pass
        finally:
            file.close()
            sock.close()

    def _reply(self, sock: socket.socket, arguments: list[bytes]) -> None:
        name = arguments[0].upper()
        if name in (b"PING", b"MULTI", b"EXEC"):
            sock.sendall({b"PING": b"+PONG\r\n", b"MULTI": b"+OK\r\n", b"EXEC": b"*0\r\n"}[name])
            return
        self.received.append(b" ".join(arguments))
        answer = self.answer(b" ".join(arguments))
        if answer is None:
            sock.shutdown(socket.SHUT_RDWR)
        else:
            sock.sendall(answer)

    def close(self) -> None:
        self._listener.close()
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def hostile() -> Iterator[HostileRedis]:
    server = HostileRedis()
    yield server
    server.close()


@pytest.fixture
def pair(hostile: HostileRedis, redis_server: RedisServer, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway before a hostile server ("bad") and a good one ("good")."""
    config = tmp_path / "c.toml"
    config.write_text(f"""
[[instances]]
id = "bad"
url = "redis://127.0.0.1:{hostile.port}"
command_timeout = "500ms"
stall_timeout = "500ms"
[[instances]]
id = "good"
url = "{redis_server.unix_url}"
[[tokens]]
name = "bad"
token = "bad-token"
instance = "bad"
[[tokens]]
name = "good"
token = "good-token"
instance = "good"
""")
    gateway = Gateway({}, ["--config", str(config), "--workers", "1"])
    yield gateway
    gateway.stop()


@pytest.mark.parametrize(
    "answer",
    [
        b"+OK\r\n+OK\r\n",
        b">2\r\n+a\r\n+b\r\n",
        b"%1\r\n+a\r\n+b\r\n",
        b"garbage\r\n",
        b"*2147483647\r\n",
        b"$99999999999\r\n",
        b"$-5\r\n",
        b"$3\r\nabcdef\r\n",
        b":1x\r\n",
        b"+a\nb\r\n",
        b"\x00" * 100,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        None,
    ],
    ids=lambda answer: repr(answer)[:24],
)
def test_a_server_that_breaks_the_protocol_costs_its_own_clients_and_nobody_else(
    hostile: HostileRedis, pair: Gateway, answer: bytes | None
) -> None:
    hostile.answer = lambda command: answer
    with Client(pair.port, "bad-token") as bad, Client(pair.port, "good-token") as good:
        good.command("SET", "k", "v")
        for _ in range(3):
            first = bad.get("/get/x")
            assert first.status in (200, 502), first
            if first.status == 502:
                assert "may have run" in first.error
            assert good.get("/get/k").result == "v"
        hostile.answer = lambda command: b"$2\r\nhi\r\n"
        wait_for(lambda: bad.get("/get/x").status == 200, what="recovery")
        assert bad.get("/get/x").result == "hi"


def test_two_replies_for_one_command_never_reach_the_next_client(hostile: HostileRedis, pair: Gateway) -> None:
    hostile.answer = lambda command: (
        b"$6\r\nstolen\r\n" if command.startswith(b"GET next") else b"+OK\r\n$6\r\nstolen\r\n"
    )
    with Client(pair.port, "bad-token") as client:
        for _ in range(20):
            assert client.get("/get/first").body in (
                b'{"result":"OK"}',
                b'{"error":"ERR the instance broke the protocol: a reply nobody waits for; the command may have run"}',
            )


def test_silence_is_504_for_the_one_and_the_neighbours_are_not_punished(hostile: HostileRedis, pair: Gateway) -> None:
    with Client(pair.port, "bad-token") as one, Client(pair.port, "bad-token") as two:
        hostile.answer = lambda command: b"" if b"silent" in command else b"+OK\r\n"
        one.send("GET", "/get/silent")
        response = one.read()
        assert response.status == 504
        assert "may have run" in response.error
        # The connection in doubt admits nothing new; a fresh one serves at once.
        assert two.get("/get/other").result == "OK"


def test_half_a_reply_is_504_and_the_rest_of_it_belongs_to_nobody(hostile: HostileRedis, pair: Gateway) -> None:
    hostile.answer = lambda command: b"$10\r\nabc" if b"half" in command else b"$2\r\nok\r\n"
    with Client(pair.port, "bad-token") as client:
        assert client.get("/get/half").status == 504
        assert client.get("/get/x").result == "ok"
        assert client.get("/get/x").result == "ok"


def read_to_the_end(client: Client) -> None:
    while client.read_chunk():
        pass


def test_a_broken_off_stream_is_never_taken_for_whole(hostile: HostileRedis, pair: Gateway) -> None:
    def answer(command: bytes) -> bytes | None:
        return b"$1000000\r\n" + b"x" * 400_000 if b"big" in command else None

    hostile.answer = answer
    with Client(pair.port, "bad-token") as client, Client(pair.port, "bad-token") as other:
        client.send("GET", "/get/big")
        assert client.read_head()[0] == 200
        assert client.read_chunk()
        other.send("GET", "/get/die")  # closes every connection? no: its own; the stall time ends the other
        with pytest.raises((EOFError, ConnectionError, ValueError)):
            read_to_the_end(client)


def test_an_unreachable_instance_is_503_with_retry_after_and_the_breaker_is_quick(tmp_path: Path) -> None:
    gateway = Gateway(
        {"REDISGATE_REDIS_URL": f"redis://127.0.0.1:{free_port()}", "REDISGATE_TOKEN": "token"}, ["--workers", "1"]
    )
    try:
        with Client(gateway.port) as client:
            for target in ("/get/x", "/eval/return%201/0", "/nosuch", "/subscribe/x", "/monitor"):
                response = client.get(target)
                assert response.status == 503, target
                assert response.headers["retry-after"] == "1"
                assert response.error.startswith("ERR ")
            assert client.post("/pipeline", [["GET", "x"]]).status == 503
            assert client.post("/multi-exec", [["GET", "x"]]).status == 503
    finally:
        gateway.stop()


def test_wrong_credentials_for_redis_are_said_without_showing_them() -> None:
    server = RedisServer("--requirepass", "right-password")
    gateway = Gateway(
        {"REDISGATE_REDIS_URL": f"redis://:wrong-password@127.0.0.1:{server.port}", "REDISGATE_TOKEN": "token"},
        ["--workers", "1"],
    )
    try:
        with Client(gateway.port) as client:
            response = client.get("/get/x")
            assert response.status == 503
            assert response.error == "ERR the instance does not let the gateway in"
            assert "wrong-password" not in response.error
        assert "wrong-password" not in gateway.log()
    finally:
        gateway.stop()
        server.stop()


def test_a_ledger_of_incrs_is_exact_when_redis_is_killed(tmp_path: Path) -> None:
    """Every acknowledged INCR is in the data; an INCR that failed with 503 is not; 502 and 504 may be either."""
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=tmp_path)
    gateway = Gateway(single_instance(server), ["--workers", "2"])
    counts = {200: 0, 502: 0, 503: 0, 504: 0}
    lock = threading.Lock()
    stop = threading.Event()

    def write(number: int) -> None:
        with Client(gateway.port) as client:
            while not stop.is_set():
                if number % 2:
                    statuses = [client.get("/incr/ledger").status]
                else:
                    response = client.post("/pipeline", [["INCR", "ledger"]] * 5)
                    statuses = [response.status] * 5
                with lock:
                    for status in statuses:
                        counts[status] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(3):
            before = counts[200]
            wait_for(lambda: counts[200] > before + 200, what="writes")  # noqa: B023
            server.kill()
            failed = counts[503]
            wait_for(lambda: counts[503] > failed, what="a refusal")  # noqa: B023
            server.start()
            with Client(gateway.port) as client:
                wait_for(lambda: client.get("/ping").status == 200, seconds=3, what="use again")
        stop.set()
        for thread in threads:
            thread.join(20)
        with Client(gateway.port) as client:
            total = int(client.get("/get/ledger").result)
        assert counts[200] <= total <= counts[200] + counts[502] + counts[504], counts
    finally:
        stop.set()
        gateway.stop()
        server.stop()


def test_reconnecting_is_no_stampede(hostile: HostileRedis, pair: Gateway) -> None:
    hostile.answer = lambda command: None if command == b"get die" else b"+OK\r\n"
    clients = [Client(pair.port, "bad-token") for _ in range(50)]
    try:
        assert clients[0].get("/get/x").status == 200
        clients[0].get("/get/die")
        accepted = hostile.accepted
        for client in clients:
            client.send("GET", "/get/x")
        assert [client.read().status for client in clients] == [200] * 50
        assert hostile.accepted - accepted <= 2
    finally:
        for client in clients:
            client.close()


def test_clients_that_leave_in_the_middle_disturb_nobody(gateway: Gateway, redis_server: RedisServer) -> None:
    with Client(gateway.port) as client:
        client.request("POST", "/set/large", b"x" * 8_000_000)
        partial = [
            b"GET /get/la",
            b"POST /set/k HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer token\r\nContent-Length: 1000000\r\n\r\nabc",
            b"GET /get/large HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer token\r\n\r\n",
            b"GET /eval/local%20t%3Dredis.call('time')[1]%20while%20redis.call('time')[1]-t<1%20do%20end/0 HTTP/1.1\r\n"
            b"Host: a\r\nAuthorization: Bearer token\r\n\r\n",
            b"GET /subscribe/x HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer token\r\n\r\n",
            b"GET /monitor HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer token\r\n\r\n",
        ]
        for number in range(30):
            with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
                if number % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                sock.sendall(partial[number % len(partial)] if number % len(partial) != 3 or number < 6 else partial[0])
        for _ in range(50):
            assert client.get("/echo/alive").result == "alive"
        assert len(client.get("/get/large").result) == 8_000_000
        client.command("DEL", "large")


def test_a_reader_that_stalls_does_not_hold_up_its_neighbours(gateway: Gateway) -> None:
    with Client(gateway.port) as client:
        client.request("POST", "/set/large", b"x" * 9_000_000)
        slow = []
        for _ in range(4):
            sock = socket.create_connection(("127.0.0.1", gateway.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(b"GET /get/large HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer token\r\n\r\n")
            slow.append(sock)
        for _ in range(100):
            assert client.get("/echo/x").result == "x"
        for sock in slow:
            sock.close()
        client.command("DEL", "large")


def test_readers_that_take_nothing_do_not_use_up_the_connections(redis_server: RedisServer, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"""
[[instances]]
id = "one"
url = "{redis_server.unix_url}"
pool_size = 3
[[tokens]]
name = "t"
token = "token"
""")
    gateway = Gateway({}, ["--config", str(config), "--workers", "1"])
    stalled = []
    try:
        with Client(gateway.port) as client:
            client.request("POST", "/set/large", b"x" * 9_000_000)
            for _ in range(5):
                reader = Client(gateway.port)
                stalled.append(reader)
                reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.send("GET", "/get/large")
                assert reader.read_head()[0] == 200
            assert client.get("/ping").result == "PONG"
            assert client.get("/eval/return%201/0").result == 1
            client.command("DEL", "large")
    finally:
        for reader in stalled:
            reader.close()
        gateway.stop()


def test_a_slow_listener_is_cut_off_with_an_error_event(redis_server: RedisServer) -> None:
    gateway = Gateway(
        single_instance(redis_server),
        ["--workers", "1", "--max-client-buffer-bytes", "200000", "--write-timeout", "20"],
    )
    try:
        with Client(gateway.port) as client, Client(gateway.port) as listener:
            listener.send("GET", "/subscribe/flood")
            assert listener.read_head()[0] == 200
            listener.read_chunk()
            for _ in range(200):
                client.request("POST", "/publish/flood", b"y" * 100_000)
                if client.get("/publish/flood/x").result == 0:
                    break
            else:
                raise AssertionError("the slow listener was never cut off")
            last = b""
            while chunk := listener.read_chunk():
                last = chunk
            assert last.startswith(b"event: error\ndata: ERR ")
            assert listener.file.read() == b""
    finally:
        gateway.stop()


def test_a_stream_that_redis_ends_closes_its_connection(gateway: Gateway, redis_server: RedisServer) -> None:
    request = "GET /subscribe/e HTTP/{}\r\nHost: a\r\nAuthorization: Bearer token\r\n\r\n"
    for version in ("1.0", "1.1"):
        with Client(gateway.port) as listener:
            # What is pipelined behind a stream is not answered, and the client is told so.
            listener.sock.sendall(request.format(version).encode() + b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
            status, headers = listener.read_head()
            assert (status, headers["connection"]) == (200, "close")
            while b"data: subscribe,e,1" not in listener.file.readline():
                pass
            redis_server.raw(b"CLIENT KILL TYPE pubsub\r\n", 1)
            rest = listener.file.read()
            assert b"event: error\n" in rest
            assert rest.endswith(b"0\r\n\r\n") == (version == "1.1")


def test_too_many_waiting_commands_are_refused_before_they_are_sent(redis_server: RedisServer, tmp_path: Path) -> None:
    server = RedisServer()
    config = tmp_path / "c.toml"
    config.write_text(f"""
[[instances]]
id = "one"
url = "{server.unix_url}"
max_waiting = 20
[[tokens]]
name = "t"
token = "token"
""")
    gateway = Gateway({}, ["--config", str(config), "--workers", "1"])
    clients = [Client(gateway.port) for _ in range(40)]
    try:
        clients[0].get("/ping")
        server.pause()
        for client in clients:
            client.send("GET", "/incr/n")
        wait_for(lambda: sum(_readable(client.sock) for client in clients) >= 20, what="refusals")
        server.resume()
        statuses = [client.read().status for client in clients]
        assert statuses.count(503) == 20
        assert int(clients[0].get("/get/n").result) == statuses.count(200) == 20
    finally:
        for client in clients:
            client.close()
        gateway.stop()
        server.stop()


def test_pipelines_of_many_commands_are_not_refused(redis_server: RedisServer) -> None:
    server = RedisServer()
    gateway = Gateway(single_instance(server), ["--workers", "1"])
    clients = [Client(gateway.port) for _ in range(12)]
    try:
        clients[0].get("/ping")
        body = json.dumps([["INCR", "n"]] * 1_000).encode()
        server.pause()
        for client in clients[:-1]:
            client.send("POST", "/pipeline", body)
            with Client(gateway.port, None) as other:  # once this is answered, the pipeline has been taken
                assert other.get("/health").status == 200
        clients[-1].send("GET", "/incr/n")
        server.resume()
        assert [client.read().status for client in clients] == [200] * 12
        assert clients[0].get("/get/n").result == "11001"
        # Longer ones have a connection of their own, so that nobody waits for them.
        own = clients[0].get("/client/id").result
        assert clients[0].post("/pipeline", [["CLIENT", "ID"]] * 1_000).json()[0]["result"] == own
        assert clients[0].post("/pipeline", [["CLIENT", "ID"]] * 1_001).json()[0]["result"] != own
    finally:
        for client in clients:
            client.close()
        gateway.stop()
        server.stop()


def _readable(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        sock.settimeout(20)


def test_concurrent_transactions_never_mix(gateway: Gateway) -> None:
    errors: list[object] = []

    def run(number: int) -> None:
        try:
            with Client(gateway.port) as client:
                for turn in range(40):
                    value = f"{number}-{turn}"
                    items = client.post(
                        "/multi-exec",
                        [["SET", "shared", value], ["GET", "shared"], ["APPEND", "shared", "!"], ["GET", "shared"]],
                    ).json()
                    assert [item["result"] for item in items] == ["OK", value, len(value) + 1, value + "!"]
                    assert client.post("/multi-exec", [["SET", "shared", "x"], ["INCR"]]).status == 400
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_a_killed_worker_is_replaced(redis_server: RedisServer) -> None:
    gateway = Gateway(single_instance(redis_server), ["--workers", "1"])
    try:
        children = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        with Client(gateway.port) as client:  # waits in the queue of the socket that the supervisor keeps open
            assert client.get("/ping").result == "PONG"
    finally:
        gateway.stop()


def test_reloads_under_load_lose_no_request(redis_server: RedisServer) -> None:
    """Clients that keep their connections, and reopen them when a response says `Connection: close`, notice nothing."""
    gateway = Gateway(single_instance(redis_server), ["--workers", "2"])
    stop = threading.Event()
    done: list[int] = []
    problems: list[str] = []

    def hammer() -> None:
        count = 0
        client = Client(gateway.port)
        try:
            while not stop.is_set():
                response = client.get("/incr/reloads")
                count += 1
                if response.status != 200:
                    problems.append(repr(response))
                if response.headers.get("connection") == "close":
                    client.close()
                    client = Client(gateway.port)
        except Exception as error:
            problems.append(repr(error))
        finally:
            client.close()
            done.append(count)

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        for reload in range(1, 4):
            gateway.process.send_signal(signal.SIGHUP)
            # Each reload replaces both workers, after the two that were started first.
            wait_for(lambda: gateway.log().count(" serves") == 2 + 2 * reload, what="new workers")  # noqa: B023
            wait_for(lambda: gateway.log().count(" drains") == 2 * reload, what="old workers")  # noqa: B023
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
        gateway.stop()
    assert problems == []
    assert sum(done) > 100
    answered = redis_server.raw(b"GET reloads\r\n", 4).split(b"\r\n")[1]
    assert int(answered) == sum(done)
