"""Which requests are whose: hosts, reserved paths, browsers, names that nobody knows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http import Client
from tests.servers import Gateway, RedisServer


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Gateway]:
    config: Path = tmp_path_factory.mktemp("routing") / "redisgate.toml"
    config.write_text(f"""
base_domain = "rg.test"
cors_origins = ["https://app.test"]
[[instances]]
id = "Cache"
url = "{redis_server.unix_url}"
[[tokens]]
name = "full"
token = "token"
""")
    gateway = Gateway({}, ["--config", str(config), "--workers", "1"])
    yield gateway
    gateway.stop()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.port) as client:
        yield client


@pytest.mark.parametrize("host", ["cache.rg.test", "Cache.rg.test", "CACHE.RG.TEST:3000"])
def test_a_host_names_an_instance_in_any_case(client: Client, host: str) -> None:
    client.sock.sendall(f"GET /ping HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer token\r\n\r\n".encode())
    assert client.read().result == "PONG"


@pytest.mark.parametrize(
    "path",
    ["/invitations", "/invitations/x", "/reset", "/reset-password", "/dashboard", "/admin-x", "/docs/a", "/healthz"],
)
@pytest.mark.parametrize("token", ["token", None], ids=["with-token", "without"])
def test_the_control_planes_paths_are_no_commands(gateway: Gateway, path: str, token: str | None) -> None:
    with Client(gateway.port, token) as client:
        response = client.get(path)
        assert response.status == 404
        assert "reserved for the control plane" in response.error or path == "/healthz"


@pytest.mark.parametrize("path", ["/Invitations", "/RESET", "/redis/Cache/invitations"])
def test_other_spellings_and_places_are_commands(client: Client, path: str) -> None:
    assert client.get(path).status == 400


def test_a_preflight_allows_what_the_clients_send_and_has_no_length(client: Client) -> None:
    preflight = {"Origin": "https://app.test", "Access-Control-Request-Method": "GET"}
    response = client.request("OPTIONS", "/subscribe/x", b"", preflight)
    assert response.status == 204
    assert "content-length" not in response.headers
    allowed = response.headers["access-control-allow-headers"].lower().split(", ")
    assert {"authorization", "cache-control", "content-type", "upstash-encoding"} <= set(allowed)
    assert client.get("/ping").result == "PONG"


def test_unknown_names_are_asked_about_together_and_within_a_bound(client: Client) -> None:
    def asked() -> int:
        info = client.command("INFO", "commandstats").result
        line = next((line for line in info.splitlines() if line.startswith("cmdstat_command|info:")), "calls=0,")
        return int(line.partition("calls=")[2].partition(",")[0])

    before = asked()
    replies = client.post("/pipeline", [[f"nosuch{number}", "x"] for number in range(20_000)] + [["PING"]]).json()
    assert replies[-1] == {"result": "PONG"}
    for number in (0, 5000, 19_999):
        assert replies[number]["error"].startswith(
            f"ERR unknown command 'nosuch{number}', with args beginning with: 'x'"
        )
    assert asked() - before <= 8
