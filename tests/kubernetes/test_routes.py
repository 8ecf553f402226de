"""The gateway follows the cluster: real workers, real redis-servers, routes as the operator writes them."""

import base64
import contextlib
import hashlib
import http.client
import json
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import control.kubernetes
from control.kubernetes.routes import CONDITION, MAX_TOKENS, KeyTaken, RouteError, RouteTable, read_route
from redisgate.access import UNAUTHORIZED, AccessTable
from redisgate.shared import SharedState
from tests.http import Response
from tests.kubernetes.cluster import Cluster
from tests.servers import Gateway, RedisServer, free_port, wait_for

NAMESPACE = "redisgate"
CRD = Path(control.kubernetes.__file__).parent / "crd" / "redishttpinstances.yaml"


def namespace(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def start_cluster() -> Cluster:
    """With the definition of the resource and the namespaces that the tests use."""
    cluster = Cluster().start()
    cluster.create(yaml.safe_load(CRD.read_text()))
    for name in (NAMESPACE, "shop"):
        cluster.create(namespace(name))
    return cluster


def declare(cluster: Cluster, name: str, namespace: str = "shop", **spec: Any) -> dict[str, Any]:
    """A RedisHttpInstance."""
    return cluster.create(
        {
            "apiVersion": "redisgate.io/v1",
            "kind": "RedisHttpInstance",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"mode": "Standalone", **spec},
        }
    )


def route_of(instance: dict[str, Any], port: int, *tokens: Any, **more: Any) -> dict[str, Any]:
    """What the operator publishes of an instance: `tokens` are keys, or whole entries."""
    metadata = instance["metadata"]
    entries = [
        {"sha256": hashlib.sha256(token.encode()).hexdigest()} if isinstance(token, str) else token for token in tokens
    ]
    route = {
        "id": metadata["uid"],
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "host": "127.0.0.1",
        "port": port,
        "tokens": entries,
        **more,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "redisgate.io/route",
        "metadata": {
            "name": f"route-{metadata['uid']}",
            "namespace": NAMESPACE,
            "labels": {"redisgate.io/route": "true", "redisgate.io/instance-uid": metadata["uid"]},
        },
        "data": {"instance.json": base64.b64encode(json.dumps(route).encode()).decode()},
    }


def digest(token: str, **more: Any) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(token.encode()).hexdigest(), **more}


def condition(cluster: Cluster, name: str, namespace: str = "shop") -> dict[str, Any]:
    """RouteProgrammed, as it stands."""
    found = cluster.find("RedisHttpInstance", namespace, name) or {}
    conditions = found.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == CONDITION), {})


def get(port: int, token: str, target: str = "/get/key", host: str = "localhost") -> Response:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", target, headers={"Host": host, "Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return Response(response.status, dict(response.getheaders()), response.read())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = start_cluster()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


def follow(cluster: Cluster, directory: Path, **environ: str) -> Gateway:
    """A gateway without a database, an instance or a token of its own."""
    return Gateway(
        {
            "REDISGATE_KUBERNETES": "on",
            "REDISGATE_KUBECONFIG": str(cluster.kubeconfig(directory)),
            "REDISGATE_KUBERNETES_NAMESPACE": NAMESPACE,
            "REDISGATE_BASE_DOMAIN": "redis.test",
            "REDISGATE_WORKERS": "2",
            **environ,
        }
    )


@pytest.fixture(scope="module")
def gateway(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = follow(cluster, tmp_path_factory.mktemp("gateway"))
    yield gateway
    gateway.stop()


def everywhere(gateway: Gateway, token: str, status: int, target: str = "/get/key") -> float:
    """Seconds until every worker answers with `status`; at most one. Each new connection meets some worker."""
    began = time.monotonic()
    wait_for(
        lambda: all(get(gateway.port, token, target).status == status for _ in range(8)), 1.0, f"{status} everywhere"
    )
    return time.monotonic() - began


def test_a_new_instance_is_routed_a_rotated_key_used_and_a_deleted_one_refused_within_a_second(
    cluster: Cluster, gateway: Gateway, redis: RedisServer
) -> None:
    first, second = secrets.token_hex(16), secrets.token_hex(16)
    assert get(gateway.port, first).status == 401
    instance = declare(cluster, "cart")
    cluster.create(route_of(instance, redis.port, first))
    everywhere(gateway, first, 200)
    assert get(gateway.port, first, "/set/key/value").result == "OK"
    assert get(gateway.port, first).result == "value"
    # Rotated with an overlap: both work; then only the new one.
    cluster.apply(route_of(instance, redis.port, first, second))
    everywhere(gateway, second, 200)
    assert get(gateway.port, first).result == "value"
    cluster.apply(route_of(instance, redis.port, second))
    everywhere(gateway, first, 401)
    assert get(gateway.port, second).result == "value"
    # It counts from when it is being deleted, whatever an operator has yet to tidy up.
    cluster.delete("RedisHttpInstance", "shop", "cart")
    everywhere(gateway, second, 401)
    assert cluster.find("Secret", NAMESPACE, f"route-{instance['metadata']['uid']}") is not None


def test_a_new_password_is_used_from_when_it_is_published(
    cluster: Cluster, gateway: Gateway, redis: RedisServer
) -> None:
    token = secrets.token_hex(16)
    redis.raw(b"ACL SETUSER tenant on >old ~* +@all\r\n", 5)
    instance = declare(cluster, "secretive")
    cluster.create(route_of(instance, redis.port, token, user="tenant", password="old"))
    everywhere(gateway, token, 200)
    redis.raw(b"ACL SETUSER tenant >new\r\n", 5)
    cluster.apply(route_of(instance, redis.port, token, user="tenant", password="new", previous_password="old"))
    wait_for(lambda: condition(cluster, "secretive").get("status") == "True")
    redis.raw(b"ACL SETUSER tenant <old\r\n", 5)
    redis.raw(b"CLIENT KILL USER tenant\r\n", 2)
    everywhere(gateway, token, 200)


def test_keys_are_scoped_expire_and_reach_no_other_instance(
    cluster: Cluster, gateway: Gateway, redis: RedisServer
) -> None:
    full, reader, old, stranger = (secrets.token_hex(16) for _ in range(4))
    one, other = declare(cluster, "one"), declare(cluster, "other")
    tokens = [digest(full), digest(reader, scopes=["read"]), digest(old, expires="2020-01-01T00:00:00Z")]
    cluster.create(route_of(one, redis.port, *tokens, hosts=["one-shop.redis.test"]))
    cluster.create(route_of(other, redis.port, stranger, hosts=["other-shop.redis.test"]))
    everywhere(gateway, full, 200)
    everywhere(gateway, stranger, 200)
    assert get(gateway.port, reader).status == 200
    assert "NOPERM" in get(gateway.port, reader, "/set/key/x").error
    assert get(gateway.port, old).status == 401
    uid = one["metadata"]["uid"]
    assert get(gateway.port, full, f"/redis/{uid}/get/key").status == 200
    assert get(gateway.port, stranger, f"/redis/{uid}/get/key").status == 401
    assert get(gateway.port, full, host="one-shop.redis.test").status == 200
    assert get(gateway.port, stranger, host="one-shop.redis.test").status == 401


def test_limits_of_the_resource_count_over_all_workers(cluster: Cluster, gateway: Gateway, redis: RedisServer) -> None:
    token = secrets.token_hex(16)
    instance = declare(cluster, "limited")
    limits = {
        "rateLimit": {"requestsPerSecond": 5, "burst": 9},
        "maxRequestBytes": 1024,
        "commands": {"deny": ["FLUSHALL"]},
    }
    cluster.create(route_of(instance, redis.port, token, limits=limits, hosts=["limited.elsewhere.test"]))
    wait_for(lambda: condition(cluster, "limited").get("status") == "True")
    assert "FLUSHALL" in get(gateway.port, token, "/flushall").error.upper()
    statuses = [get(gateway.port, token).status for _ in range(12)]
    assert statuses.count(429) >= 5, statuses
    wait_for(lambda: get(gateway.port, token, f"/echo/{'x' * 1100}").status == 413, 3.0, "413")
    message = condition(cluster, "limited")["message"]
    assert "rateLimit.burst has no effect" in message
    assert "not under the gateway's base domain: limited.elsewhere.test" in message


def test_the_condition_tells_whether_there_is_a_route_and_is_written_once_by_all_workers(
    cluster: Cluster, gateway: Gateway, redis: RedisServer
) -> None:
    instance = declare(cluster, "told")
    wait_for(lambda: condition(cluster, "told").get("reason") == "NoRoute")
    before = len(cluster.requests)
    wrong = route_of(instance, redis.port, "key", limits={"commands": {"allow": ["NOSUCHCOMMAND"]}})
    cluster.create(wrong)
    wait_for(lambda: condition(cluster, "told").get("reason") == "RouteInvalid")
    assert "spec.gateway.commands" in condition(cluster, "told")["message"]
    assert get(gateway.port, "key").status == 401
    cluster.apply(route_of(instance, redis.port, "key"))
    wait_for(lambda: condition(cluster, "told").get("reason") == "Programmed")
    found = condition(cluster, "told")
    assert found["status"] == "True"
    assert found["observedGeneration"] == instance["metadata"]["generation"]
    cluster.edit("RedisHttpInstance", "shop", "told", lambda item: item["spec"].update(suspend=True))
    cluster.delete("Secret", NAMESPACE, f"route-{instance['metadata']['uid']}")
    wait_for(lambda: condition(cluster, "told").get("reason") == "Suspended")
    live = cluster.find("RedisHttpInstance", "shop", "told")
    assert live is not None
    managers = {entry["manager"] for entry in live["metadata"]["managedFields"]}
    assert "redisgate-gateway" in managers
    written = [
        path for method, path, _ in list(cluster.requests)[before:] if method == "PATCH" and "/told/status" in path
    ]
    # Invalid, programmed, that for the new generation, suspended; whether or not one came between two of them.
    assert 3 <= len(written) <= 4, written


def test_with_the_api_server_away_what_is_known_goes_on_and_what_is_not_is_answered_503(
    redis: RedisServer, tmp_path: Path
) -> None:
    cluster = start_cluster()
    token = secrets.token_hex(16)
    cluster.create(route_of(declare(cluster, "steady"), redis.port, token))
    gateway = follow(cluster, tmp_path)
    try:
        everywhere(gateway, token, 200)
        cluster.cut()
        cluster.end_watches()
        assert get(gateway.port, token).status == 200
        late = follow(cluster, tmp_path)
        try:
            answer = get(late.port, token)
            assert answer.status == 503
            assert "not read yet" in answer.error
            cluster.heal()
            wait_for(lambda: get(late.port, token).status == 200, 10.0, "the routes")
            # Each worker tries again in its own time.
            wait_for(lambda: all(get(late.port, "nobody's").status == 401 for _ in range(8)), 10.0, "401 everywhere")
        finally:
            late.stop()
    finally:
        gateway.stop()
        cluster.stop()


def test_deletions_in_a_gap_of_the_watch_and_a_silent_watch_are_seen(redis: RedisServer, tmp_path: Path) -> None:
    cluster = start_cluster()
    token, later = secrets.token_hex(16), secrets.token_hex(16)
    instance = declare(cluster, "gap")
    cluster.create(route_of(instance, redis.port, token))
    gateway = follow(cluster, tmp_path)
    try:
        everywhere(gateway, token, 200)
        cluster.cut()
        cluster.end_watches()
        cluster.delete("RedisHttpInstance", "shop", "gap")
        cluster.create(route_of(declare(cluster, "gap"), redis.port, later))
        cluster.forget_history()
        cluster.heal()
        wait_for(lambda: get(gateway.port, token).status == 401, 10.0, "the deletion")
        wait_for(lambda: get(gateway.port, later).status == 200, 10.0, "its successor")
    finally:
        gateway.stop()
        cluster.stop()


# In one process


@pytest.fixture
def table() -> Iterator[tuple[AccessTable, RouteTable]]:
    shared = SharedState.anonymous(1)
    access = AccessTable()
    yield access, RouteTable(access, shared, 0, base_domain="redis.test")
    access.abort()
    shared.close()


def fake(uid: str, name: str = "one") -> dict[str, Any]:
    return {"metadata": {"uid": uid, "name": name, "namespace": "shop"}}


async def test_an_unchanged_address_keeps_its_connections(table: tuple[AccessTable, RouteTable]) -> None:
    access, routes = table
    port = free_port()
    routes.put(read_route(route_of(fake("u1"), port, "first")))
    instance = access.instances["u1"]
    routes.put(read_route(route_of(fake("u1"), port, "second")))
    assert access.instances["u1"] is instance
    assert access.lookup(b"first") is None
    assert access.lookup(b"second") is not None
    routes.put(read_route(route_of(fake("u1"), port, "second", password="new")))
    assert access.instances["u1"] is not instance
    revision = access.revision
    routes.put(read_route(route_of(fake("u1"), port, "second", password="new")))
    assert access.revision == revision
    routes.remove("u1")
    assert access.lookup(b"second") is None
    assert not access.instances
    assert access.resolve(b"second", None, in_header=True, address=lambda: None) is UNAUTHORIZED


async def test_an_instance_has_the_name_of_its_row_too(table: tuple[AccessTable, RouteTable]) -> None:
    access, routes = table
    routes.put(read_route(route_of(fake("u1"), 1, "key", hosts=["cart-x.redis.test"])), "row-1")
    grant = access.lookup(b"key")
    assert grant is not None
    assert all(grant.names(name) for name in ("row-1", "u1", "cart-x", "one"))
    found = routes.address("u1")
    assert found is not None
    assert found.port == 1
    routes.remove("u1")
    assert routes.address("u1") is None


async def test_a_key_stays_with_the_instance_that_had_it_first(table: tuple[AccessTable, RouteTable]) -> None:
    access, routes = table
    routes.put(read_route(route_of(fake("theirs"), 1, "shared")))
    for _ in range(2):
        with pytest.raises(KeyTaken, match="another instance has one of its API keys"):
            routes.put(read_route(route_of(fake("mine"), 2, "own", "shared")))
        held, own = access.lookup(b"shared"), access.lookup(b"own")
        assert held is not None
        assert (held.instance_id, own) == ("theirs", None)
        routes.remove("mine")
    freed = routes.freed
    routes.put(read_route(route_of(fake("theirs"), 1, "other")))
    assert routes.freed == freed + 1
    routes.put(read_route(route_of(fake("mine"), 2, "own", "shared")))
    held = access.lookup(b"shared")
    assert held is not None
    assert held.instance_id == "mine"


def test_a_key_that_two_claim_opens_the_older_instance_on_every_worker_and_the_other_one_after_it(
    redis: RedisServer, tmp_path: Path
) -> None:
    cluster = start_cluster()
    shared = secrets.token_hex(16)
    instances = [declare(cluster, name) for name in ("one", "other")]
    # In the list, which goes by name, the younger one is first.
    instances.sort(key=lambda instance: str(instance["metadata"]["uid"]), reverse=True)
    created = str(cluster.create(route_of(instances[0], redis.port, shared))["metadata"]["creationTimestamp"])
    wait_for(lambda: datetime.now(UTC) >= datetime.fromisoformat(created) + timedelta(seconds=1), 2.0, "a second")
    cluster.create(route_of(instances[1], free_port(), shared))
    gateway = follow(cluster, tmp_path)
    first, second = (instance["metadata"]["name"] for instance in instances[:2])
    try:
        everywhere(gateway, shared, 200)
        wait_for(lambda: condition(cluster, second).get("reason") == "RouteInvalid", what="the refusal")
        assert "give it a key of its own" in condition(cluster, second)["message"]
        cluster.apply(route_of(instances[1], redis.port, shared))
        everywhere(gateway, shared, 200, f"/redis/{instances[0]['metadata']['uid']}/get/key")
        cluster.delete("RedisHttpInstance", "shop", first)
        everywhere(gateway, shared, 200, f"/redis/{instances[1]['metadata']['uid']}/get/key")
    finally:
        gateway.stop()
        cluster.stop()


@pytest.mark.parametrize(
    "forge",
    [
        lambda secret: secret.update(type="kubernetes.io/tls"),
        lambda secret: secret["metadata"].update(name="theirs"),
    ],
    ids=["another type", "another name"],
)
def test_a_secret_that_only_looks_like_a_route_changes_nothing(
    cluster: Cluster, gateway: Gateway, redis: RedisServer, forge: Any
) -> None:
    token, forged = secrets.token_hex(16), secrets.token_hex(16)
    victim = declare(cluster, f"victim-{secrets.token_hex(4)}")
    genuine = route_of(victim, redis.port, token)
    secret = route_of(victim, redis.port, forged)
    forge(secret)
    if secret["metadata"]["name"] == genuine["metadata"]["name"]:
        cluster.create(secret)
    else:
        cluster.create(genuine)
        everywhere(gateway, token, 200)
        cluster.create(secret)
    # What is heard of later has been heard of after it.
    later = secrets.token_hex(16)
    cluster.create(route_of(declare(cluster, f"later-{later}"), redis.port, later))
    everywhere(gateway, later, 200)
    assert all(get(gateway.port, forged).status == 401 for _ in range(8))
    if secret["metadata"]["name"] != genuine["metadata"]["name"]:
        cluster.delete("Secret", NAMESPACE, secret["metadata"]["name"])
        assert all(get(gateway.port, token).status == 200 for _ in range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda secret: secret.update(data={}), "no instance.json"),
        (lambda secret: secret["data"].update({"instance.json": "!"}), "cannot be read"),
        (lambda secret: secret["data"].update({"instance.json": "e30="}), "missing required field"),
        (lambda secret: secret["data"].update({"instance.json": "A" * 65537}), "larger than"),
        (lambda secret: secret["metadata"]["labels"].update({"redisgate.io/instance-uid": "u2"}), "another instance"),
    ],
    ids=["empty", "no base64", "no fields", "too large", "another's"],
)
def test_a_route_that_cannot_be_used_says_why(change: Any, message: str) -> None:
    secret = route_of(fake("u1"), 1, "key")
    change(secret)
    with pytest.raises(RouteError, match=message):
        read_route(secret)


@pytest.mark.parametrize(
    "tokens",
    [[{"sha256": "abcd"}], [{"sha256": "zz"}], [digest("k", expires="2030-01-01T00:00:00")], ["k"] * (MAX_TOKENS + 1)],
    ids=["short digest", "no digest", "no time zone", "too many"],
)
def test_keys_of_a_route_that_cannot_be_right_are_refused(tokens: list[Any]) -> None:
    with pytest.raises(RouteError):
        read_route(route_of(fake("u1"), 1, *tokens))
