"""What credentials of the control plane open on the data plane, tried on real workers."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.conftest import Service, Urls
from tests.control.service import Api, connections, execute, register, seconds_until
from tests.http import Client
from tests.servers import RedisServer


@pytest.fixture(scope="module")
def service(database_urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Four workers."""
    service = Service(
        database_urls, tmp_path_factory.mktemp("service"), "--workers", "4", REDISGATE_ALLOWED_NETWORKS="127.0.0.0/8"
    )
    yield service
    service.stop()


@pytest.fixture(scope="module")
def other_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def owner(service: Service, database_urls: Urls) -> Api:
    person = register(service.port, "owner")
    execute(database_urls.owner, "UPDATE quotas SET max_api_keys = 1000, max_instances = 100")
    return person


@pytest.fixture(scope="module")
def instance(owner: Api, redis_server: RedisServer) -> dict[str, Any]:
    return owner.instance("first", redis_server.url)


@pytest.fixture(scope="module")
def second(owner: Api, instance: dict[str, Any], other_redis: RedisServer) -> dict[str, Any]:
    """Another instance of the same organization; the tests from here on have both."""
    return owner.instance("second", other_redis.url)


def get(service: Service, token: str | None, target: str, **headers: str) -> tuple[int, Any]:
    with Client(service.port, token) as client:
        response = client.request(
            "GET", target, b"", {name.replace("_", "-"): value for name, value in headers.items()}
        )
    return response.status, response.json()


UNAUTHORIZED = (401, {"error": "WRONGPASS invalid or missing auth token"})
PONG = (200, {"result": "PONG"})


# One instance


def test_a_key_works_without_a_name_while_there_is_one_instance(service: Service, owner: Api, instance: Any) -> None:
    key, _ = owner.key()
    assert get(service, key, "/ping") == PONG


def test_without_an_instance_a_key_says_so(service: Service) -> None:
    key, _ = register(service.port, "newcomer").key()
    status, body = get(service, key, "/ping")
    assert status == 404, body
    assert "no instance yet" in body["error"]


# Two instances


def test_several_instances_are_told_apart_by_id_and_by_slug(
    service: Service, owner: Api, instance: Any, second: Any
) -> None:
    key, _ = owner.key()
    for number, one in enumerate((instance, second)):
        assert get(service, key, f"/redis/{one['id']}/set/which/{number}") == (200, {"result": "OK"})
        assert get(service, key, f"/redis/{one['slug']}/get/which") == (200, {"result": str(number)})
    status, body = get(service, key, "/ping")
    assert (status, "name one" in body["error"]) == (400, True)
    assert get(service, key, "/redis/third/ping") == UNAUTHORIZED


def test_a_key_for_one_instance_opens_no_other(service: Service, owner: Api, instance: Any, second: Any) -> None:
    key, _ = owner.key(instance_ids=[instance["id"]])
    assert get(service, key, "/ping") == PONG
    assert get(service, key, f"/redis/{instance['id']}/ping") == PONG
    assert get(service, key, f"/redis/{second['id']}/ping") == UNAUTHORIZED
    assert get(service, key, "/redis/second/ping") == UNAUTHORIZED


def test_another_organizations_instance_does_not_exist(service: Service, instance: Any, second: Any) -> None:
    stranger = register(service.port, "stranger")
    key, _ = stranger.key()
    assert get(service, key, f"/redis/{instance['id']}/ping") == UNAUTHORIZED
    assert get(service, stranger.token, f"/redis/{instance['id']}/ping") == UNAUTHORIZED


@pytest.mark.parametrize(
    ("scopes", "prefixes", "allowed", "refused"),
    [
        (["read"], [], "get/a", "set/a/1"),
        (["write"], [], "set/a/1", None),
        (["read", "write", "+get"], [], "get/a", "set/a/1"),
        (["read", "write", "-@hash"], [], "set/a/1", "hset/h/f/1"),
        (["read", "write"], ["app:"], "set/app:1/x", "set/other/x"),
        (["read", "write"], ["app:"], "get/app:1", "eval/return 1/0"),
    ],
    ids=["read", "write", "only-get", "no-hashes", "prefix", "no-scripts-with-prefixes"],
)
def test_scopes_and_prefixes_hold(
    service: Service,
    owner: Api,
    instance: Any,
    second: Any,
    scopes: list[str],
    prefixes: list[str],
    allowed: str,
    refused: str | None,
) -> None:
    key, _ = owner.key(scopes=scopes, key_prefixes=prefixes)
    base = f"/redis/{instance['id']}/"
    assert get(service, key, base + allowed)[0] == 200
    if refused is not None:
        status, body = get(service, key, base + refused.replace(" ", "%20"))
        assert status == 400, body
        assert body["error"].startswith("NOPERM"), body


def test_a_key_for_managing_opens_no_instance(service: Service, owner: Api, instance: Any, second: Any) -> None:
    key, _ = owner.key(scopes=["manage:read"])
    assert get(service, key, f"/redis/{instance['id']}/ping") == UNAUTHORIZED
    assert get(service, key, f"/api/organizations/{owner.organization_id}/redis-instances")[0] == 200
    with Client(service.port, key) as client:
        target = f"/api/organizations/{owner.organization_id}/api-keys"
        assert client.post(target, {"name": "more"}).status == 403


def test_a_key_for_data_manages_nothing(service: Service, owner: Api, instance: Any, second: Any) -> None:
    key, _ = owner.key()
    assert get(service, key, f"/api/organizations/{owner.organization_id}/redis-instances")[0] == 403


def test_networks_hold(service: Service, owner: Api, instance: Any, second: Any) -> None:
    near, _ = owner.key(allowed_networks=["192.0.2.0/24", "127.0.0.0/8"], instance_ids=[instance["id"]])
    far, _ = owner.key(allowed_networks=["192.0.2.0/24", "2001:db8::/32"], instance_ids=[instance["id"]])
    assert get(service, near, "/ping") == PONG
    status, body = get(service, far, "/ping", x_forwarded_for="192.0.2.1")
    assert (status, body["error"][:6]) == (403, "NOPERM"), body  # nobody trusts this proxy


def test_a_key_that_expires_stops_on_open_connections(service: Service, owner: Api, instance: Any, second: Any) -> None:
    moment = time.time() + 3
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    key, _ = owner.key(expires_at=expires, instance_ids=[instance["id"]])
    with Client(service.port, key) as client:
        assert client.get("/ping").status == 200
        seconds_until(lambda: client.get("/ping").status == 401, 5, "the key to expire")
        assert time.time() >= int(moment)


def test_forged_and_foreign_tokens_are_refused(service: Service, owner: Api, instance: Any, second: Any) -> None:
    key, _ = owner.key()
    head, claims, signature = key.split(".")
    assert get(service, f"{head}.{claims}.{signature[:-4]}AAAA", "/ping") == UNAUTHORIZED
    assert get(service, f"{head}.{claims}.", "/ping") == UNAUTHORIZED
    assert get(service, "rgt_" + "A" * 44, "/ping") == UNAUTHORIZED


# Instance tokens


def test_instance_tokens_open_their_instance(service: Service, owner: Api, instance: Any, second: Any) -> None:
    token, readonly = instance["rest_token"], instance["readonly_rest_token"]
    assert get(service, token, "/set/t/1") == (200, {"result": "OK"})
    assert get(service, None, f"/get/t?_token={readonly}") == (200, {"result": "1"})
    assert get(service, readonly, f"/redis/{instance['slug']}/get/t") == (200, {"result": "1"})
    assert get(service, readonly, "/set/t/2")[0] == 400
    assert get(service, token, f"/redis/{second['id']}/get/t") == UNAUTHORIZED


# Sessions


def test_a_session_works_in_the_header_and_under_an_instances_id_only(
    service: Service, owner: Api, instance: Any, second: Any
) -> None:
    base = f"/redis/{instance['id']}/ping"
    assert get(service, owner.token, base) == PONG
    assert get(service, None, f"{base}?_token={owner.token}") == UNAUTHORIZED
    assert get(service, None, base, cookie=f"redisgate_session={owner.token}") == UNAUTHORIZED
    assert get(service, owner.token, "/ping") == UNAUTHORIZED
    assert get(service, owner.token, "/redis/first/ping") == UNAUTHORIZED
    # Also once it is known to be good.
    with Client(service.port, owner.token) as client:
        assert client.get(base).status == 200
        assert client.get("/ping").status == 401
        client.token = None
        assert client.get(f"{base}?_token={owner.token}").status == 401


def test_a_viewers_session_and_keys_only_read(service: Service, owner: Api, instance: Any, second: Any) -> None:
    member = register(service.port, "member")
    base = f"/redis/{instance['id']}/"
    assert get(service, member.token, base + "get/a") == UNAUTHORIZED
    invited = owner.call("POST", "invitations", {"email": member.email, "role": "member"})
    member.call("POST", "/api/invitations/accept", {"token": invited["token"]})
    member.organization_id = owner.organization_id
    key, _ = member.key()
    with Client(service.port, member.token) as session, Client(service.port, key) as keyed:
        seconds_until(lambda: session.get(base + "set/a/1").status == 200, 2, "the membership to be known")
        assert keyed.get(base + "set/a/1").status == 200
        who = next(one for one in owner.call("GET", "members")["items"] if one["email"] == member.email)
        owner.call("PATCH", f"members/{who['user_id']}", {"role": "viewer"})
        for client in (session, keyed):
            seconds_until(lambda client=client: client.get(base + "set/a/1").status == 400, 2, "the new role")
            assert client.get(base + "get/a").result == "1"
        owner.call("DELETE", f"members/{who['user_id']}")
        for client in (session, keyed):
            seconds_until(lambda client=client: client.get(base + "get/a").status == 401, 2, "the end of membership")


def test_signing_out_ends_a_session_on_the_data_plane(service: Service, owner: Api, instance: Any, second: Any) -> None:
    with Client(service.port, None) as client:
        login = client.post("/auth/login", {"email": owner.email, "password": "correct horse 1!"}).json()["data"]
    with connections(service.port, login["token"]) as clients:
        target = f"/redis/{instance['id']}/ping"
        assert {client.get(target).status for client in clients} == {200}
        with Client(service.port, login["token"]) as client:
            assert client.post("/auth/logout", {}).status < 300
        seconds_until(lambda: {client.get(target).status for client in clients} == {401}, 2, "the sign-out")


# Changes reach every worker


def test_a_revocation_holds_on_every_worker_within_a_second(
    service: Service, owner: Api, instance: Any, second: Any
) -> None:
    taken = []
    for _ in range(3):
        key, key_id = owner.key(instance_ids=[instance["id"]])
        with connections(service.port, key) as clients:
            assert {client.get("/ping").status for client in clients} == {200}
            owner.call("DELETE", f"api-keys/{key_id}")
            taken.append(
                seconds_until(lambda: {client.get("/ping").status for client in clients} == {401}, 2, "the revocation")
            )
    assert min(taken) < 0.5, taken  # by notification, not by the look once a second
    assert max(taken) < 1.0, taken


def test_a_rotated_key_works_on_for_the_overlap(service: Service, owner: Api, instance: Any, second: Any) -> None:
    old, key_id = owner.key(instance_ids=[instance["id"]])
    with connections(service.port, old, 8) as clients:
        assert {client.get("/ping").status for client in clients} == {200}
        rotated = owner.call("POST", f"api-keys/{key_id}/rotate", {"overlap_seconds": 2})
        began = time.monotonic()
        assert get(service, rotated["key"], "/ping") == PONG
        assert {client.get("/ping").status for client in clients} == {200}
        seconds_until(lambda: {client.get("/ping").status for client in clients} == {401}, 5, "the overlap's end")
        assert time.monotonic() - began > 1
    assert get(service, rotated["key"], "/ping") == PONG


def test_new_tokens_of_an_instance_end_the_old_ones(service: Service, owner: Api, other_redis: RedisServer) -> None:
    made = owner.instance("rotating", other_redis.url + "/1")
    with connections(service.port, made["rest_token"], 8) as clients:
        assert {client.get("/ping").status for client in clients} == {200}
        owner.call("POST", f"redis-instances/{made['id']}/rotate-credentials", {"password": False})
        seconds_until(lambda: {client.get("/ping").status for client in clients} == {401}, 2, "the rotation")


def test_a_deleted_instance_is_gone_for_every_credential(
    service: Service, owner: Api, other_redis: RedisServer
) -> None:
    made = owner.instance("passing", other_redis.url + "/2")
    key, _ = owner.key()
    target = f"/redis/{made['id']}/ping"
    with connections(service.port, key, 8) as clients, Client(service.port, owner.token) as session:
        assert {client.get(target).status for client in [*clients, session]} == {200}
        owner.call("DELETE", f"redis-instances/{made['id']}")
        seconds_until(lambda: {client.get(target).status for client in [*clients, session]} == {401}, 2, "the deletion")


def test_a_stopped_instance_is_unavailable_and_comes_back(
    service: Service, owner: Api, other_redis: RedisServer
) -> None:
    made = owner.instance("pausing", other_redis.url + "/3")
    target = "/ping"
    with Client(service.port, made["rest_token"]) as client:
        assert client.get(target).status == 200
        owner.call("PUT", f"redis-instances/{made['id']}/status", {"action": "stop"})
        seconds_until(lambda: client.get(target).status == 503, 2, "the stop")
        assert client.get(target).headers["retry-after"] == "1"
        owner.call("PUT", f"redis-instances/{made['id']}/status", {"action": "start"})
        seconds_until(lambda: client.get(target).status == 200, 5, "the start")


def test_a_subscription_ends_with_its_key_and_only_with_it(
    service: Service, owner: Api, instance: Any, second: Any
) -> None:
    key, key_id = owner.key(instance_ids=[instance["id"]])
    with Client(service.port, key) as client:
        client.send("GET", "/subscribe/news")
        assert client.read_head()[0] == 200
        assert b"subscribe,news,1" in client.read_chunk()
        owner.call("PUT", "quota", {"max_requests_per_second": 900})  # makes every gateway forget the key
        with Client(service.port, instance["rest_token"]) as publisher:
            seconds_until(lambda: publisher.get("/publish/news/hello").headers.get("ratelimit-limit"), 2, "the quota")
            assert publisher.get("/publish/news/still").result == 1
        owner.call("PUT", "quota", {"max_requests_per_second": None})
        owner.call("DELETE", f"api-keys/{key_id}")
        received = b""
        while chunk := client.read_chunk():
            received += chunk
        assert b"message,news,still" in received
        assert b"event: error" in received


def test_pipelined_requests_wait_for_a_key_that_is_not_known_yet(
    service: Service, owner: Api, instance: Any, second: Any
) -> None:
    key, _ = owner.key(instance_ids=[instance["id"]])
    with Client(service.port, key) as client:
        for number in range(50):
            client.send("GET", f"/echo/{number}")
        assert [client.read().result for _ in range(50)] == [str(number) for number in range(50)]


def test_many_at_once_with_an_unknown_key_are_all_answered(
    service: Service, owner: Api, instance: Any, second: Any
) -> None:
    key, _ = owner.key(instance_ids=[instance["id"]])
    with connections(service.port, key, 60) as clients:
        for client in clients:
            client.send("POST", "/", json.dumps(["ECHO", "x"]).encode())
        assert {client.read().result for client in clients} == {"x"}


# Usage and last use


def test_usage_is_counted_per_key_and_instance(service: Service, owner: Api, instance: Any, second: Any) -> None:
    key, key_id = owner.key(instance_ids=[second["id"]])

    def work() -> None:
        with Client(service.port, key) as client:
            for _ in range(20):
                client.get("/set/u/12345")
                client.get("/get/u")
            client.post("/pipeline", [["GET", "u"], ["INCR", "n"], ["PING"]])
            client.get("/lpush/u/1")  # the wrong type: an error reply

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def total() -> Any:
        return owner.call("GET", f"usage?step=minute&api_key_id={key_id}")["total"]

    seconds_until(lambda: total()["commands"] >= 6 * 44, 15, "the workers to write")
    found = total()
    assert found["commands"] == 6 * (20 + 20 + 3 + 1)
    assert found["reads"] == 6 * (20 + 1)
    assert found["writes"] == 6 * (20 + 1 + 1)
    assert found["requests"] == 6 * 42
    assert found["errors"] == 6
    assert found["bytes_in"] > 6 * 20 * len("setu12345getu")
    assert found["bytes_out"] > 6 * 20 * len('{"result":"OK"}{"result":"12345"}')
    assert 0 < found["latency_p50_ms"] <= found["latency_p95_ms"] <= found["latency_p99_ms"] < 5000
    assert found["cost"] > 0
    of_instance = owner.call("GET", f"redis-instances/{second['id']}/usage?step=minute&api_key_id={key_id}")
    assert of_instance["total"]["commands"] == found["commands"]
    elsewhere = owner.call("GET", f"redis-instances/{instance['id']}/usage?step=minute&api_key_id={key_id}")
    assert elsewhere["total"]["commands"] == 0
    costs = owner.call("GET", "cost")
    item = next(item for item in costs["items"] if item["api_key_id"] == key_id)
    assert (item["commands"], item["instance_id"]) == (found["commands"], second["id"])
    record = owner.call("GET", f"api-keys/{key_id}")
    assert record["last_used_from"] == "127.0.0.1"
    assert record["last_used_at"] is not None
    managing, managing_id = owner.key(scopes=["usage.read"])
    assert get(service, managing, f"/api/organizations/{owner.organization_id}/usage")[0] == 200
    seconds_until(lambda: owner.call("GET", f"api-keys/{managing_id}")["last_used_at"], 15, "the other use")


def test_health_of_an_instance_is_asked_now(owner: Api, service: Service, instance: Any, second: Any) -> None:
    health = owner.call("GET", f"redis-instances/{instance['id']}/health")
    assert health["reachable"] is True
    assert health["ping_ms"] > 0
    assert health["memory"] > 0
    assert health["connections"] >= 1


def test_requests_that_are_too_large_for_the_organization_are_refused(
    service: Service, redis_server: RedisServer
) -> None:
    small = register(service.port, "small")
    made = small.instance("small", redis_server.url + "/5")
    small.call("PUT", "quota", {"max_request_size": 1000})
    with Client(service.port, made["rest_token"]) as client:
        seconds_until(lambda: client.command("SET", "k", "x" * 1000).status == 413, 2, "the quota")
        error = client.command("SET", "k", "x" * 1000).error
        assert error == "ERR max request size exceeded. Limit: 1000 bytes, Actual: 1004 bytes"
        assert client.command("SET", "k", "x" * 900).result == "OK"


def test_networks_are_those_of_the_client_behind_trusted_proxies(
    database_urls: Urls, tmp_path: Path, redis_server: RedisServer
) -> None:
    trusting = {"REDISGATE_BASE_DOMAIN": "redis.test"} | {
        "REDISGATE_TRUSTED_PROXIES": "127.0.0.0/8,10.0.0.0/8",
        "REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8",
    }
    service = Service(database_urls, tmp_path, "--workers", "1", **trusting)
    try:
        owner = register(service.port, "proxied")
        made = owner.instance("proxied", redis_server.url + "/12")
        key, key_id = owner.key(allowed_networks=["203.0.113.0/24", "2001:db8::/32"])
        for forwarded, status in (
            ("203.0.113.9", 200),
            ("198.51.100.1, 203.0.113.9, 10.1.2.3", 200),
            ("2001:db8::7", 200),
            ("203.0.113.9, 198.51.100.1", 403),  # who says the first is not trusted
            ("nonsense", 403),
            ("203.0.113.9", 200),
        ):
            assert get(service, key, "/ping", x_forwarded_for=forwarded)[0] == status, forwarded
        assert get(service, key, "/ping")[0] == 403
        seconds_until(
            lambda: owner.call("GET", f"api-keys/{key_id}")["last_used_from"] == "203.0.113.9", 15, "the last use"
        )
        # An instance's own domain names it, for every credential but a session.
        plain, _ = owner.key()
        owner.instance("another", redis_server.url + "/13")
        for token, host, status in (
            (made["rest_token"], made["domain"], 200),
            (plain, made["domain"], 200),
            (plain, "nobody.redis.test", 401),
            (owner.token, made["domain"], 401),
            (owner.token, f"{made['id']}.redis.test", 401),
        ):
            assert status_at(service.port, host, token) == status, (host, token)
    finally:
        service.stop()


def status_at(port: int, host: str, token: str) -> int:
    """The status of GET /ping with this Host."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(
            f"GET /ping HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n".encode()
        )
        return int(sock.recv(4096).split()[1])
