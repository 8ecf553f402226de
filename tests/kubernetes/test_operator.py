"""The operator: what it brings about, and that nothing which happens to it or to its objects has the wrong end.

The pods are real redis-servers (kubelet.py). Each complaint of people with such operators is a test.
"""

import base64
import contextlib
import hashlib
import json
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import trustme
import yaml

import control.kubernetes.operator as operators
import control.kubernetes.plan as planning
from control.kubernetes.commands import manifests
from control.kubernetes.plan import OperatorSettings
from control.kubernetes.spec import SpecError
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.operators import RunningOperator
from tests.servers import free_port, wait_for

Object = dict[str, Any]
KIND = "RedisHttpInstance"
DISK: Object = {"persistence": {"size": "1Gi"}}
SECONDS = 20.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(bookmark_seconds=0.2) as cluster:
        for manifest in yaml.safe_load_all(manifests()):
            cluster.create(manifest)
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "redisgate"}})
        yield cluster


@pytest.fixture(scope="module")
def kubelet(cluster: Cluster) -> Iterator[Kubelet]:
    with Kubelet(cluster) as kubelet:
        yield kubelet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operators")


@pytest.fixture(scope="module")
def operator(cluster: Cluster, kubelet: Kubelet, folder: Path) -> Iterator[RunningOperator]:
    """One that lives through many tests. Those that need an operator of their own come first in this file: with two,
    neither would be alone."""
    with RunningOperator(cluster, folder, silence=1.0) as operator:
        yield operator


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(operators, "FOREIGN_SECONDS", 0.2)
    monkeypatch.setattr(operators, "REACH_SECONDS", 0.1)


class Shop:
    """A namespace, and what is declared in it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = f"shop-{uuid.uuid4().hex[:6]}"
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name}})

    def declare(self, name: str = "cache", **spec: Any) -> Object:
        metadata = {"name": name, "namespace": self.name, "labels": {"redisgate.io/organization": "acme"}}
        spec = {"mode": "Standalone", "deletionPolicy": "Delete"} | spec
        return self.cluster.create({"apiVersion": "redisgate.io/v1", "kind": KIND, "metadata": metadata, "spec": spec})

    def get(self, name: str = "cache") -> Object | None:
        return self.cluster.find(KIND, self.name, name)

    def change(self, name: str = "cache", **spec: Any) -> Object:
        return self.cluster.edit(KIND, self.name, name, lambda item: item["spec"].update(spec))

    def delete(self, name: str = "cache") -> None:
        self.cluster.delete(KIND, self.name, name)

    def find(self, kind: str, name: str = "cache") -> Object | None:
        return self.cluster.find(kind, self.name, name)

    def secret(self, name: str) -> dict[str, str]:
        secret = self.find("Secret", name)
        assert secret is not None, name
        return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}

    def route(self, name: str = "cache") -> Object | None:
        item = self.get(name)
        assert item is not None
        secret = self.cluster.find("Secret", "redisgate", f"route-{item['metadata']['uid']}")
        return None if secret is None else json.loads(base64.b64decode(secret["data"]["instance.json"]))

    def condition(self, kind: str, name: str = "cache") -> Object:
        item = self.get(name)
        conditions = ((item or {}).get("status") or {}).get("conditions", [])
        return next((each for each in conditions if each["type"] == kind), {})

    def wait(self, kind: str = "Ready", status: str = "True", reason: str = "", name: str = "cache") -> Object:
        """Until a condition is so for the newest generation."""
        seen: Object = {}

        def holds() -> bool:
            nonlocal seen
            item, seen = self.get(name), self.condition(kind, name)
            return (
                item is not None
                and item["metadata"].get("generation") == (item.get("status") or {}).get("observedGeneration")
                and seen.get("status") == status
                and (not reason or seen["reason"] == reason)
            )

        try:
            wait_for(holds, SECONDS, f"{name} to be {kind}={status} {reason}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {(self.get(name) or {}).get('status')}") from None
        return seen

    def gone(self, uid: str) -> None:
        """Nothing with its labels is left anywhere."""
        labels = f"redisgate.io/instance-uid={uid}"
        try:
            wait_for(lambda: not self.cluster.everything(labels), SECONDS)
        except AssertionError:
            left = [(item["kind"], item["metadata"]["name"]) for item in self.cluster.everything(labels)]
            raise AssertionError(f"left: {left}") from None

    def events(self, reason: str) -> list[Object]:
        return [event for event in self.cluster.all("Event", self.name) if event["reason"] == reason]

    def redis(self, name: str = "cache") -> Any:
        """As the gateway, with what its route says."""
        route = self.route(name)
        assert route is not None
        return redis_py.Redis(
            host=route["host"],
            port=route["port"],
            username=route["user"],
            password=route["password"],
            decode_responses=True,
        )


@pytest.fixture
def shop(cluster: Cluster) -> Iterator[Shop]:
    yield Shop(cluster)
    cluster.heal()


def uid_of(item: Object | None) -> str:
    assert item is not None
    return str(item["metadata"]["uid"])


def empty(cluster: Cluster, folder: Path, shop: Shop) -> None:
    """So that the operator of the next test finds nothing of this one."""
    with RunningOperator(cluster, folder):
        for item in cluster.all(KIND, shop.name):
            cluster.delete(KIND, shop.name, item["metadata"]["name"])
        wait_for(lambda: not cluster.all(KIND, shop.name), SECONDS)


# An operator that is killed, is two, or is not there


def everything_of(cluster: Cluster, uid: str) -> set[tuple[str, str]]:
    return {(item["kind"], item["metadata"]["name"]) for item in cluster.everything(f"redisgate.io/instance-uid={uid}")}


def expected(uid: str) -> set[tuple[str, str]]:
    names = {
        "Secret": ["cache-auth-1", "cache-api-key", "cache-config", f"route-{uid}"],
        "Service": ["cache", "cache-headless"],
        "StatefulSet": ["cache"],
        "NetworkPolicy": ["cache"],
        "PodDisruptionBudget": ["cache"],
        "Ingress": [f"route-{uid}"],
    }
    return {(kind, name) for kind, all_of_them in names.items() for name in all_of_them}


@pytest.mark.parametrize("after", [False, True], ids=["unheard", "unanswered"])
def test_killed_at_any_call_while_it_makes(cluster: Cluster, folder: Path, shop: Shop, after: bool) -> None:
    """The next one finishes, and whatever password was made first stays."""
    for lives in range(60):
        uid = uid_of(shop.declare(**DISK))
        first = RunningOperator(cluster, folder, lives=lives, after=after)
        with first:
            wait_for(lambda first=first: first.ended.is_set() or shop.condition("Ready"), SECONDS)
        made = {
            item["metadata"]["name"]: item["data"]
            for item in cluster.all("Secret", shop.name)
            if item["metadata"]["name"] in ("cache-auth-1", "cache-api-key")
        }
        with RunningOperator(cluster, folder):
            wait_for(lambda uid=uid: everything_of(cluster, uid) == expected(uid), SECONDS)
            shop.wait(status="False", reason="PodsNotReady")
            for name, data in made.items():
                secret = shop.find("Secret", name)
                assert secret is not None
                assert secret["data"] == data, f"{name} was made anew"
            shop.delete()
            shop.gone(uid)
            wait_for(lambda: shop.get() is None, SECONDS)
        if not first.died:
            assert lives >= len(expected(uid)), "it made everything in fewer calls than there are objects"
            return
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("after", [False, True], ids=["unheard", "unanswered"])
def test_killed_at_any_call_while_it_deletes(cluster: Cluster, folder: Path, shop: Shop, after: bool) -> None:
    for lives in range(30):
        uid = uid_of(shop.declare(**DISK))
        with RunningOperator(cluster, folder):
            shop.wait(status="False", reason="PodsNotReady")
        shop.delete()
        first = RunningOperator(cluster, folder, lives=lives, after=after)
        with first:
            wait_for(lambda first=first: first.ended.is_set() or shop.get() is None, SECONDS)
        with RunningOperator(cluster, folder):
            wait_for(lambda: shop.get() is None, SECONDS)
            shop.gone(uid)
        if not first.died:
            assert lives > 2
            return
    raise AssertionError("it never came to its end")


def test_deleted_and_made_again_while_the_operator_is_away(cluster: Cluster, folder: Path, shop: Shop) -> None:
    """The successor of the name has nothing of its forebear: no volume, no password, no object."""
    old = uid_of(shop.declare(**DISK))
    with RunningOperator(cluster, folder):
        shop.wait(status="False", reason="PodsNotReady")
    password = shop.secret("cache-auth-1")
    shop.delete()
    assert shop.get() is not None, "the finalizer keeps it"
    # somebody forces it away, and the collector of the cluster has not come by
    cluster.collector_paused = True
    cluster.edit(KIND, shop.name, "cache", lambda item: item["metadata"].update(finalizers=[]))
    new = uid_of(shop.declare(**DISK))
    with RunningOperator(cluster, folder):
        shop.wait(status="False", reason="NameTaken")
        assert {key for key in everything_of(cluster, new) if key[0] != "Secret"} == set()
        cluster.collector_paused = False
        cluster.resume_collector()
        wait_for(lambda: everything_of(cluster, new) == expected(new), SECONDS)
        shop.wait(status="False", reason="PodsNotReady")
        assert shop.secret("cache-auth-1") != password
    assert old != new
    empty(cluster, folder, shop)


def test_two_replicas_are_one_operator(cluster: Cluster, folder: Path, shop: Shop) -> None:
    with RunningOperator(cluster, folder, lease=True) as first:
        shop.declare(**DISK)
        shop.wait(status="False", reason="PodsNotReady")
        with RunningOperator(cluster, folder, lease=True):
            password = shop.secret("cache-auth-1")
            first.stop()
            shop.change(memory={"evictionPolicy": "allkeys-lru"})
            shop.wait(status="False", reason="PodsNotReady")
            assert shop.secret("cache-auth-1") == password
            assert "maxmemory-policy allkeys-lru" in shop.secret("cache-config")["redis.conf"]
    empty(cluster, folder, shop)


def test_two_operators_without_a_lease_make_one_password(cluster: Cluster, folder: Path, shop: Shop) -> None:
    with RunningOperator(cluster, folder), RunningOperator(cluster, folder):
        for number in range(5):
            shop.declare(f"c{number}")
        for number in range(5):
            shop.wait(status="False", reason="PodsNotReady", name=f"c{number}")
            route, password = shop.route(f"c{number}"), shop.secret(f"c{number}-auth-1")["password"]
            assert route is not None
            assert route["password"] == password
            digest = hashlib.sha256(shop.secret(f"c{number}-api-key")["token"].encode()).hexdigest()
            assert route["tokens"][0]["sha256"] == digest
    empty(cluster, folder, shop)


def test_a_newer_operator_restarts_nothing(cluster: Cluster, folder: Path, shop: Shop) -> None:
    shop.declare(monitoring={}, **DISK)
    shop.declare("memory", monitoring={})
    with RunningOperator(cluster, folder):
        shop.wait(status="False", reason="PodsNotReady")
        shop.wait(status="False", reason="PodsNotReady", name="memory")
    before = [item["spec"] for kind in ("StatefulSet", "Deployment") for item in cluster.all(kind, shop.name)]
    newer = OperatorSettings(base_domain="db.example", image="redisgate/redisgate:99", exporter_image="exporter:99")
    with RunningOperator(cluster, folder, settings=newer):
        shop.change(memory={"evictionPolicy": "allkeys-lru"})
        shop.wait(status="False", reason="PodsNotReady")
    after = [item["spec"] for kind in ("StatefulSet", "Deployment") for item in cluster.all(kind, shop.name)]
    assert before == after
    empty(cluster, folder, shop)


# From here on there is one operator


def test_from_a_resource_to_a_redis_and_back(shop: Shop, operator: RunningOperator, kubelet: Kubelet) -> None:
    item = shop.declare(resources={"limits": {"memory": "64Mi"}}, memory={"maxmemoryPercent": 50}, **DISK)
    uid = uid_of(item)
    shop.wait()
    status = (shop.get() or {})["status"]
    assert status["pods"] == "1/1"
    assert status["primary"] == "cache-0"
    assert status["endpoints"]["http"] == shop.secret("cache-api-key")["url"]
    assert status["endpoints"]["http"].startswith("https://cache-")
    assert status["version"][0].isdigit()
    assert status["credentials"]["secretName"] == "cache-auth-1"
    with shop.redis() as redis:
        assert redis.set("a", "1")
        for command in (["CONFIG", "SET", "maxmemory", "0"], ["ACL", "LIST"], ["SHUTDOWN"], ["REPLICAOF", "no", "one"]):
            with pytest.raises(redis_py.exceptions.NoPermissionError):
                redis.execute_command(*command)
        assert redis.config_get("maxmemory") == {"maxmemory": str(32 * 1024 * 1024)}
    with pytest.raises(redis_py.exceptions.AuthenticationError):
        redis_py.Redis(port=kubelet.port(shop.name, "cache")).ping()
    for child in shop.cluster.everything(f"redisgate.io/instance-uid={uid}"):
        assert child["metadata"]["labels"]["redisgate.io/organization"] == "acme"
    wait_for(lambda: shop.events("Ready"), SECONDS)
    assert [event["message"] for event in shop.events("Ready")] == ["Redis answers"]
    shop.delete()
    wait_for(lambda: shop.get() is None, SECONDS)
    shop.gone(uid)


def test_a_password_is_rotated_with_an_overlap_and_without_a_restart(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(auth={"rotation": {"overlap": "2s"}}, **DISK)
    shop.wait()
    old, port = shop.redis(), (shop.route() or {})["port"]
    assert old.set("kept", "yes")
    run_id = old.info("server")["run_id"]
    shop.change(auth={"rotation": {"overlap": "2s", "trigger": "once"}})
    wait_for(lambda: shop.find("Secret", "cache-auth-2"), SECONDS)
    wait_for(lambda: (shop.route() or {})["password"] == shop.secret("cache-auth-2")["password"], SECONDS)
    old.connection_pool.disconnect()
    assert old.ping(), "the former password is good for a while"
    with shop.redis() as new:
        assert new.get("kept") == "yes"
        assert new.info("server")["run_id"] == run_id
    wait_for(lambda: "previousValidUntil" in (shop.get() or {})["status"]["credentials"], SECONDS)
    wait_for(lambda: shop.find("Secret", "cache-auth-1") is None, SECONDS)

    def refused() -> bool:
        old.connection_pool.disconnect()
        with contextlib.suppress(redis_py.exceptions.AuthenticationError):
            old.ping()
            return False
        return True

    wait_for(refused, SECONDS, "the former password to end")
    assert (shop.route() or {})["port"] == port
    wait_for(lambda: shop.events("CredentialsRotated"), SECONDS)
    # nothing more happens of itself
    shop.change(memory={"evictionPolicy": "allkeys-lru"})
    shop.wait()
    assert shop.find("Secret", "cache-auth-3") is None


def test_a_password_that_is_old_is_rotated(
    shop: Shop, operator: RunningOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.declare(auth={"rotation": {"every": "1h"}}, **DISK)
    shop.wait()
    made = (shop.find("Secret", "cache-auth-1") or {})["metadata"]["creationTimestamp"]
    this = int(time.time())
    wait_for(lambda: int(time.time()) > this, SECONDS)  # the next one is of another second
    age = operators._age
    monkeypatch.setattr(operators, "_age", lambda text: age(text) + (3600 if text == made else 0))
    shop.change(memory={"evictionPolicy": "allkeys-lru"})
    wait_for(lambda: (shop.route() or {})["password"] != shop.secret("cache-auth-1")["password"], SECONDS)
    assert (shop.route() or {})["password"] == shop.secret("cache-auth-2")["password"]
    shop.wait()
    assert shop.find("Secret", "cache-auth-3") is None


def test_the_way_into_an_unreachable_redis_is_kept(shop: Shop, operator: RunningOperator) -> None:
    """A password that ran out while Redis could not be told of its successor still opens it."""
    shop.declare(auth={"rotation": {"overlap": "0s"}}, **DISK)
    shop.wait()
    address = shop.find("Service")["metadata"]["annotations"]["redisgate.io/address"]  # type: ignore[index]

    def lead_to(address: str) -> None:
        shop.cluster.edit(
            "Service",
            shop.name,
            "cache",
            lambda item: item["metadata"]["annotations"].update({"redisgate.io/address": address}),
        )

    lead_to(f"127.0.0.1:{free_port()}")
    shop.change(auth={"rotation": {"overlap": "0s", "trigger": "once"}})
    wait_for(lambda: shop.find("Secret", "cache-auth-2"), SECONDS)
    shop.wait("Degraded", "True", "Unreachable")
    assert shop.find("Secret", "cache-auth-1") is not None
    assert (shop.route() or {})["password"] == shop.secret("cache-auth-1")["password"], "the gateway goes on"
    lead_to(address)
    wait_for(lambda: (shop.route() or {})["password"] == shop.secret("cache-auth-2")["password"], SECONDS)
    wait_for(lambda: shop.find("Secret", "cache-auth-1") is None, SECONDS)
    shop.wait()


def test_a_password_of_ones_own(shop: Shop, operator: RunningOperator) -> None:
    def own(password: str) -> Object:
        data = {"password": base64.b64encode(password.encode()).decode()}
        metadata = {"name": "own", "namespace": shop.name}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}

    shop.declare(auth={"existingSecret": "own"})
    problem = shop.wait(status="False", reason="SecretMissing")
    assert problem["message"].startswith("spec.auth.existingSecret: Secret own has no key")
    shop.cluster.create(own("first"))
    shop.wait()
    assert (shop.route() or {})["password"] == "first"
    shop.cluster.apply(own("second"))
    wait_for(lambda: (shop.route() or {})["password"] == "second", SECONDS)
    with shop.redis() as redis:
        assert redis.ping()


def test_settings_change_while_it_runs(shop: Shop, operator: RunningOperator) -> None:
    """Without a volume a restart would lose everything."""
    shop.declare(config={"maxclients": "100"})
    shop.wait()
    redis = shop.redis()
    redis.set("a", "1")
    shop.change(config={"maxclients": "200"}, memory={"evictionPolicy": "volatile-ttl"})
    shop.wait()
    assert redis.config_get("maxclients") == {"maxclients": "200"}
    assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-ttl"}
    assert redis.get("a") == "1"
    shop.change(config={"maxclients": "many"})
    problem = shop.wait("Degraded", "True", "SettingRefused")
    assert problem["message"].startswith("Redis goes on without: spec.config.maxclients: ")
    shop.change(config={})
    shop.wait("Degraded", "False")


def test_a_setting_that_redis_does_not_know_is_not_in_its_file(shop: Shop, operator: RunningOperator) -> None:
    """It would not start with it."""
    shop.declare(config={"timeout": "300", "commandlog-slow-execution-max-len": "64"}, **DISK)
    shop.wait()
    shop.wait("Degraded", "True", "SettingRefused")
    wait_for(lambda: "timeout 300\n" in shop.secret("cache-config")["redis.conf"], SECONDS)
    assert "commandlog" not in shop.secret("cache-config")["redis.conf"]
    shop.change(suspend=True)
    shop.wait(status="False", reason="Suspended")
    shop.change(suspend=False)
    shop.wait()
    with shop.redis() as redis:
        assert redis.config_get("timeout") == {"timeout": "300"}


FORMS = [("RDB", "AOF"), ("AOF", "RDB"), ("RDB", "AOFAndRDB"), ("AOFAndRDB", "RDB"), ("AOF", "AOFAndRDB")]


def stored(strategy: str) -> Object:
    return {"persistence": {"size": "1Gi", "strategy": strategy}}


def restart(shop: Shop) -> None:
    shop.change(suspend=True)
    shop.wait(status="False", reason="Suspended")
    wait_for(lambda: not shop.cluster.all("Pod", shop.name), SECONDS)
    shop.change(suspend=False)
    shop.wait()


@pytest.mark.parametrize(("former", "newer"), FORMS, ids=["-".join(form) for form in FORMS])
def test_another_strategy_loses_nothing(shop: Shop, operator: RunningOperator, former: str, newer: str) -> None:
    """Redis starts from one form of its data and ignores the other."""
    shop.declare(**stored(former))
    shop.wait()
    with shop.redis() as redis:
        redis.set("a", "1")
    append_only = f"appendonly {'yes' if newer.startswith('AOF') else 'no'}"
    # while it is stopped nobody can write the other form
    shop.change(suspend=True)
    shop.wait(status="False", reason="Suspended")
    wait_for(lambda: not shop.cluster.all("Pod", shop.name), SECONDS)
    shop.change(**stored(newer))
    if former.startswith("AOF") != newer.startswith("AOF"):
        problem = shop.wait("Degraded", "True", "StrategyWaits")
        assert f"kept as {former} until a running Redis has written all of it as {newer}" in problem["message"]
        assert append_only not in shop.secret("cache-config")["redis.conf"]
    shop.change(suspend=False)
    shop.wait()
    with shop.redis() as redis:
        assert redis.get("a") == "1"
        redis.set("b", "2")
    wait_for(lambda: append_only in shop.secret("cache-config")["redis.conf"], SECONDS)
    shop.wait("Degraded", "False")
    restart(shop)
    with shop.redis() as redis:
        assert redis.mget("a", "b") == ["1", "2"]


def test_another_strategy_together_with_a_restart_loses_nothing(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**stored("RDB"))
    shop.wait()
    with shop.redis() as redis:
        redis.mset({f"k{number}": "x" * 100 for number in range(200)})
    shop.change(resources={"limits": {"memory": "300Mi"}}, **stored("AOF"))
    wait_for(lambda: "appendonly yes" in shop.secret("cache-config")["redis.conf"], SECONDS)
    restart(shop)
    with shop.redis() as redis:
        assert redis.dbsize() == 200


def test_a_pod_that_can_be_corrected_replaces_one_that_cannot(
    shop: Shop, operator: RunningOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A StatefulSet of a former version waits for a broken pod for ever: it is replaced, and the pod stays."""
    monkeypatch.setattr(planning, "POD_MANAGEMENT", "OrderedReady")
    shop.declare(**DISK)
    shop.wait()
    before, pod = uid_of(shop.find("StatefulSet")), uid_of(shop.find("Pod", "cache-0"))
    monkeypatch.setattr(planning, "POD_MANAGEMENT", "Parallel")
    shop.change(memory={"evictionPolicy": "allkeys-lru"})

    def replaced() -> bool:
        live = shop.find("StatefulSet")
        return live is not None and uid_of(live) != before and live["spec"]["podManagementPolicy"] == "Parallel"

    wait_for(replaced, SECONDS)
    shop.wait()
    assert uid_of(shop.find("Pod", "cache-0")) == pod


def test_what_grows_stays_ready(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**DISK)
    shop.wait()
    # as the cluster's collector does: the StatefulSet goes after its pods have been orphaned
    hold = "test/hold"
    shop.cluster.edit("StatefulSet", shop.name, "cache", lambda item: item["metadata"].update(finalizers=[hold]))
    shop.change(persistence={"size": "2Gi"})
    wait_for(lambda: shop.condition("Progressing").get("reason") == "Replacing", SECONDS)
    assert shop.condition("Progressing")["status"] == "True"
    assert shop.condition("Ready")["status"] == "True"
    assert not shop.events("WaitingForDeletion")
    shop.cluster.edit("StatefulSet", shop.name, "cache", lambda item: item["metadata"].update(finalizers=[]))
    shop.wait("StorageReady", "False", "Resizing")
    shop.wait()


def test_secrets_that_are_not_for_it_are_refused(shop: Shop, operator: RunningOperator) -> None:
    shop.declare()
    shop.wait()
    opaque = {"metadata": {"name": "opaque", "namespace": shop.name}, "data": {"tls.key": "eA=="}}
    shop.cluster.create({"apiVersion": "v1", "kind": "Secret", "type": "Opaque"} | opaque)
    wanted = {
        "not of type kubernetes.io/tls": {"tls": {"secretName": "opaque"}},
        "the operator's own": {"auth": {"existingSecret": "cache-auth-1"}},
    }
    for number, (text, spec) in enumerate(wanted.items()):
        shop.declare(f"c{number}", **spec)
        problem = shop.wait(status="False", reason="SecretRefused", name=f"c{number}")
        assert text in problem["message"]
        assert shop.find("Deployment", f"c{number}") is None


def test_suspended_data_stays(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**DISK)
    shop.wait()
    with shop.redis() as redis:
        redis.set("a", "1")
    shop.change(suspend=True)
    shop.wait("Suspended", "True")
    wait_for(lambda: shop.route() is None, SECONDS)
    shop.wait(status="False", reason="Suspended")
    wait_for(lambda: not shop.cluster.all("Pod", shop.name), SECONDS)
    shop.change(suspend=False)
    shop.wait()
    with shop.redis() as redis:
        assert redis.get("a") == "1"


def test_a_volume_grows_and_the_pod_stays(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**DISK)
    shop.wait()
    with shop.redis() as redis:
        redis.set("a", "1")
    before = uid_of(shop.find("StatefulSet"))
    (claim,) = shop.cluster.all("PersistentVolumeClaim", shop.name)
    shop.change(persistence={"size": "2Gi"})

    def grown() -> bool:
        live = shop.find("StatefulSet")
        return (
            live is not None
            and uid_of(live) != before
            and live["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "2Gi"
        )

    deleted = [path for method, path, _ in shop.cluster.requests if method == "DELETE" and f"/{shop.name}/pods" in path]
    wait_for(grown, SECONDS)
    now = shop.find("PersistentVolumeClaim", claim["metadata"]["name"])
    assert now is not None
    assert now["spec"]["resources"]["requests"]["storage"] == "2Gi"
    assert uid_of(now) == uid_of(claim)
    assert deleted == []
    shop.wait("StorageReady", "False", "Resizing")
    shop.cluster.set_status(
        "PersistentVolumeClaim", shop.name, claim["metadata"]["name"], {"capacity": {"storage": "2Gi"}}
    )
    shop.wait("StorageReady")
    shop.wait()
    with shop.redis() as redis:
        assert redis.get("a") == "1"


def test_a_volume_that_may_not_grow(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**DISK)
    shop.wait()
    before = uid_of(shop.find("StatefulSet"))
    shop.cluster.fail(403, method="PATCH", path=f"/{shop.name}/persistentvolumeclaims/", reason="Forbidden")
    shop.change(persistence={"size": "2Gi"})
    shop.wait("StorageReady", "False", "ResizeRefused")
    shop.wait()
    assert uid_of(shop.find("StatefulSet")) == before
    shop.cluster.heal()
    shop.change(persistence={"size": "3Gi"})
    wait_for(lambda: (live := shop.find("StatefulSet")) is not None and uid_of(live) != before, SECONDS)


def test_a_full_volume_grows_although_the_pod_is_not_ready(
    shop: Shop, operator: RunningOperator, kubelet: Kubelet
) -> None:
    shop.declare(**DISK)
    shop.wait()
    before = uid_of(shop.find("StatefulSet"))
    kubelet.paused = True
    try:
        shop.change(persistence={"size": "2Gi"}, resources={"limits": {"memory": "64Mi"}})
        wait_for(lambda: (live := shop.find("StatefulSet")) is not None and uid_of(live) != before, SECONDS)
        (claim,) = shop.cluster.all("PersistentVolumeClaim", shop.name)
        assert claim["spec"]["resources"]["requests"]["storage"] == "2Gi"
    finally:
        kubelet.paused = False
    shop.wait()


def test_a_retained_volume_is_nobody_elses(shop: Shop, operator: RunningOperator) -> None:
    first = uid_of(shop.declare(deletionPolicy="Retain", **DISK))
    shop.wait()
    with shop.redis() as redis:
        redis.set("secret", "of the first tenant")
    (kept,) = shop.cluster.all("PersistentVolumeClaim", shop.name)
    shop.delete()
    wait_for(lambda: shop.get() is None, SECONDS)
    wait_for(
        lambda: everything_of(shop.cluster, first) == {("PersistentVolumeClaim", kept["metadata"]["name"])}, SECONDS
    )
    second = uid_of(shop.declare(**DISK))
    shop.wait()
    with shop.redis() as redis:
        assert redis.get("secret") is None
    shop.delete()
    shop.gone(second)
    assert shop.find("PersistentVolumeClaim", kept["metadata"]["name"]) is not None


def test_what_was_edited_or_deleted_by_hand_is_mended(shop: Shop, operator: RunningOperator) -> None:
    uid = uid_of(shop.declare(**DISK))
    shop.wait()
    password, key = shop.secret("cache-auth-1"), shop.secret("cache-api-key")

    def open_up(policy: Object) -> None:
        policy["spec"]["ingress"] = [{}]

    shop.cluster.edit("NetworkPolicy", shop.name, "cache", open_up)
    wait_for(lambda: (shop.find("NetworkPolicy") or {})["spec"]["ingress"] != [{}], SECONDS)
    for kind, name in expected(uid) - {("Secret", "cache-auth-1"), ("Secret", "cache-api-key")}:
        namespace = "redisgate" if name.startswith("route-") else shop.name
        shop.cluster.delete(kind, namespace, name)
        wait_for(
            lambda kind=kind, namespace=namespace, name=name: shop.cluster.find(kind, namespace, name), SECONDS, name
        )
    shop.wait()
    assert shop.secret("cache-auth-1") == password
    assert shop.secret("cache-api-key") == key
    # a lost API key is a new one, and the former is refused; so keys are rotated
    shop.cluster.delete("Secret", shop.name, "cache-api-key")
    wait_for(lambda: shop.find("Secret", "cache-api-key"), SECONDS)
    digest = hashlib.sha256(shop.secret("cache-api-key")["token"].encode()).hexdigest()
    wait_for(lambda: (shop.route() or {})["tokens"][0]["sha256"] == digest, SECONDS)
    # a key that somebody chose is taken
    own = base64.b64encode(b"chosen" * 6).decode()
    shop.cluster.edit("Secret", shop.name, "cache-api-key", lambda secret: secret["data"].update(token=own))
    digest = hashlib.sha256(b"chosen" * 6).hexdigest()
    wait_for(lambda: (shop.route() or {})["tokens"][0]["sha256"] == digest, SECONDS)


def test_a_lost_password_is_said_and_what_to_do(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**DISK)
    shop.wait()
    shop.cluster.delete("Secret", shop.name, "cache-auth-1")
    problem = shop.wait("CredentialsReady", "False", "LoginLost")
    assert "Delete pod cache-0" in problem["message"]


def forged(instance: Object, namespace: str, generation: str, **data: str) -> Object:
    """What somebody who may make Secrets in a namespace can do."""
    labels = {
        "app.kubernetes.io/managed-by": "redisgate-operator",
        "app.kubernetes.io/component": "login",
        "redisgate.io/instance-uid": uid_of(instance),
        "redisgate.io/instance-name": instance["metadata"]["name"],
        "redisgate.io/instance-namespace": instance["metadata"]["namespace"],
        "redisgate.io/generation": generation,
    }
    metadata = {"name": f"cache-auth-{generation}", "namespace": namespace, "labels": labels}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": encoded}


@pytest.mark.parametrize("generation", ["999", "x"])
@pytest.mark.parametrize("beside", [False, True], ids=["elsewhere", "beside"])
def test_nobody_takes_an_instance_over_by_its_labels(
    shop: Shop, operator: RunningOperator, beside: bool, generation: str
) -> None:
    victim = shop.declare()
    shop.wait()
    before = shop.secret("cache-auth-1")
    namespace = shop.name if beside else Shop(shop.cluster).name
    passwords = {"password": "theirs", "admin-password": "theirs"} if generation == "999" else {}
    shop.cluster.create(forged(victim, namespace, generation, **passwords))
    shop.change(memory={"evictionPolicy": "allkeys-lru"})
    shop.wait()
    wait_for(lambda: "allkeys-lru" in shop.secret("cache-config")["redis.conf"], SECONDS)
    assert (shop.route() or {})["password"] == before["password"]
    assert ((shop.get() or {})["status"]["credentials"])["generation"] == 1


def test_a_login_without_passwords_is_said(shop: Shop, operator: RunningOperator) -> None:
    shop.declare()
    shop.wait()
    shop.cluster.edit("Secret", shop.name, "cache-auth-1", lambda secret: secret.update(data={}))
    problem = shop.wait(status="False", reason="LoginBroken")
    assert "Secret cache-auth-1 is not as the operator makes it" in problem["message"]


def test_an_instance_that_names_its_own_host_is_heard(shop: Shop, operator: RunningOperator) -> None:
    shop.declare()
    shop.wait()
    host = (shop.get() or {})["status"]["endpoints"]["http"].removeprefix("https://")
    for percent in ("allkeys-lru", "allkeys-lfu", "allkeys-random"):
        shop.change(gateway={"hosts": [host]}, memory={"evictionPolicy": percent})
        shop.wait()
        wait_for(lambda percent=percent: percent in shop.secret("cache-config")["redis.conf"], SECONDS)
    assert (shop.route() or {})["hosts"] == [host]
    shop.delete()
    wait_for(lambda: shop.get() is None, SECONDS)


def test_a_specification_that_the_definition_let_through_is_refused_in_the_status(
    shop: Shop, operator: RunningOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> float:
        raise SpecError("spec.auth.rotation.overlap: what a former definition let through")

    monkeypatch.setattr(operators, "seconds", cannot)
    shop.declare()
    problem = shop.wait(status="False", reason="InvalidSpec")
    assert problem["message"].startswith("spec.auth.rotation.overlap: ")


def test_foreign_objects_are_left_alone(shop: Shop, operator: RunningOperator) -> None:
    metadata = {"name": "cache", "namespace": shop.name}
    foreign = shop.cluster.create(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
        }
    )
    uid = uid_of(shop.declare(**DISK))
    problem = shop.wait(status="False", reason="NameTaken")
    assert "NetworkPolicy" in problem["message"]
    wait_for(lambda: shop.events("NameTaken"), SECONDS)
    shop.delete()
    shop.gone(uid)
    assert shop.find("NetworkPolicy") == foreign


def test_an_api_server_that_goes_away(shop: Shop, operator: RunningOperator) -> None:
    uid = uid_of(shop.declare(**DISK))
    shop.wait()
    password = shop.secret("cache-auth-1")
    shop.cluster.cut(seconds=2.0)
    shop.cluster.end_watches()
    shop.change(memory={"evictionPolicy": "allkeys-lfu"})
    shop.cluster.edit("NetworkPolicy", shop.name, "cache", lambda item: item["spec"].update(ingress=[{}]))
    shop.wait()
    wait_for(lambda: (shop.find("NetworkPolicy") or {})["spec"]["ingress"] != [{}], SECONDS)
    assert "maxmemory-policy allkeys-lfu" in shop.secret("cache-config")["redis.conf"]
    assert shop.secret("cache-auth-1") == password
    assert {kind for kind in everything_of(shop.cluster, uid) if kind[0] == "Secret" and "auth" in kind[1]} == {
        ("Secret", "cache-auth-1")
    }


def test_what_happens_in_a_gap_is_met(shop: Shop, operator: RunningOperator) -> None:
    """410 Gone: a deletion that no watch told."""
    shop.declare(**DISK)
    shop.wait()
    shop.cluster.cut(path="networkpolicies")
    shop.cluster.end_watches("networkpolicies")
    wait_for(lambda: shop.cluster.watching("networkpolicies") == 0, SECONDS)
    shop.cluster.delete("NetworkPolicy", shop.name, "cache")
    shop.cluster.forget_history()
    shop.cluster.heal()
    wait_for(lambda: shop.find("NetworkPolicy"), SECONDS)


def test_a_half_open_watch_is_noticed(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(**DISK)
    shop.wait()
    wait_for(lambda: shop.cluster.silence_watches("redishttpinstances"), SECONDS)
    shop.cluster.silence_watches()
    shop.change(memory={"evictionPolicy": "allkeys-random"})
    shop.wait()


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_conflicts_and_lost_answers(shop: Shop, operator: RunningOperator, after: bool) -> None:
    for method in ("PATCH", "POST"):
        shop.cluster.fail(
            409 if not after else 503, method=method, path=f"/{shop.name}/", count=3, after=after, reason="Conflict"
        )
    uid = uid_of(shop.declare(**DISK))
    shop.wait()
    with shop.redis() as redis:
        assert redis.ping()
    assert {name for kind, name in everything_of(shop.cluster, uid) if "auth" in name} == {"cache-auth-1"}


def test_modes_that_are_not_built_say_so(shop: Shop, operator: RunningOperator) -> None:
    for mode, more in (("Sentinel", {}), ("Cluster", {"shards": 3})):
        name = mode.lower()
        uid = uid_of(shop.declare(name, mode=mode, replicas=2, **more))
        problem = shop.wait(status="False", reason="ModeNotBuilt", name=name)
        assert f"mode {mode} is not built yet" in problem["message"]
        assert everything_of(shop.cluster, uid) == set()
        shop.delete(name)
        wait_for(lambda name=name: shop.get(name) is None, SECONDS)


def test_the_oldest_claim_of_a_host_wins(shop: Shop, operator: RunningOperator) -> None:
    host = f"{shop.name}.db.example"
    shop.declare("first", gateway={"hosts": [host]})
    shop.wait(name="first")
    second = int(time.time())
    wait_for(lambda: int(time.time()) > second, SECONDS)  # claims are as old as the second they are from
    shop.declare("second", gateway={"hosts": [host, "bank.example", "a.b.db.example"]})
    shop.wait(name="second")
    problem = shop.condition("Degraded", "second")
    assert problem["reason"] == "HostRefused"
    for text in ("another instance has it", "bank.example: it is not under db.example", "more than one label"):
        assert text in problem["message"]
    assert host in (shop.route("first") or {})["hosts"]
    assert len((shop.route("second") or {})["hosts"]) == 1
    # An older resource that asks later does not get what works for another.
    other = f"other-{host}"
    shop.change("second", gateway={"hosts": [host, other]})
    wait_for(lambda: [each["host"] for each in (shop.get("second") or {})["status"]["hosts"]] == [other], SECONDS)
    shop.change("first", gateway={"hosts": [host, other]})
    wait_for(lambda: f"{other}: another instance has it" in shop.condition("Degraded", "first")["message"], SECONDS)
    assert other in (shop.route("second") or {})["hosts"]
    shop.delete("first")
    wait_for(lambda: host in (shop.route("second") or {})["hosts"], SECONDS)


def test_a_namespace_of_its_own_does_not_escape_a_quota(shop: Shop, operator: RunningOperator) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team", "namespace": shop.name}}
    shop.cluster.create(quota | {"spec": {"hard": {"limits.memory": "1Gi"}}})
    item = shop.declare(placement={"namespaceMode": "Dedicated"})
    refused = shop.wait(status="False", reason="NamespaceRefused")
    assert f"{shop.name} has a ResourceQuota" in refused["message"]
    assert everything_of(shop.cluster, item["metadata"]["uid"]) == set()
    shop.cluster.delete("ResourceQuota", shop.name, "team")
    shop.wait()


def test_a_namespace_of_its_own(shop: Shop, operator: RunningOperator) -> None:
    item = shop.declare(placement={"namespaceMode": "Dedicated"}, **DISK)
    shop.wait()
    namespace = (shop.get() or {})["status"]["namespace"]
    assert namespace.startswith("cache-")
    assert shop.cluster.find("StatefulSet", namespace, "cache") is not None
    assert shop.find("StatefulSet") is None
    labels = f"redisgate.io/instance-uid={uid_of(item)}"
    for child in shop.cluster.everything(labels):
        references = child["metadata"].get("ownerReferences", [])
        foreign = [each for each in references if each["kind"] == KIND]
        assert not foreign or child["metadata"]["namespace"] == shop.name, "it would be collected"
    with shop.redis() as redis:
        assert redis.ping()
    shop.delete()
    wait_for(lambda: shop.get() is None, SECONDS)
    shop.gone(uid_of(item))
    assert shop.cluster.find("Namespace", "", namespace) is None


def certificate(shop: Shop, authority: trustme.CA) -> Object:
    issued = authority.issue_cert("127.0.0.1")
    files = {
        "tls.crt": issued.cert_chain_pems[0].bytes(),
        "tls.key": issued.private_key_pem.bytes(),
        "ca.crt": authority.cert_pem.bytes(),
    }
    data = {name: base64.b64encode(content).decode() for name, content in files.items()}
    metadata = {"name": "cache-cert", "namespace": shop.name}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "kubernetes.io/tls", "data": data}


def test_tls_and_a_renewed_certificate(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(tls={"secretName": "cache-cert"}, **DISK)
    problem = shop.wait("TLSReady", "False", "SecretMissing")
    assert "spec.tls.secretName: there is no Secret cache-cert" in problem["message"]
    authority = trustme.CA()
    shop.cluster.create(certificate(shop, authority))
    shop.wait("TLSReady")
    shop.wait()
    assert (shop.get() or {})["status"]["endpoints"]["redis"].startswith("rediss://")
    told = shop.route() or {}
    assert told["tls"] is True
    assert told["ca"] == authority.cert_pem.bytes().decode()

    def serial() -> int:
        told = shop.route() or {}
        context = ssl.create_default_context(cadata=told["ca"])
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", told["port"])) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            return int((secured.getpeercert() or {})["serialNumber"], 16)
        return 0

    before = serial()
    assert before
    shop.cluster.apply(certificate(shop, authority))
    wait_for(lambda: serial() not in (0, before), SECONDS, "the renewed certificate")
    shop.wait()


def define(cluster: Cluster, group: str, plural: str, kind: str) -> None:
    """As cert-manager and the Prometheus operator do."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    cluster.create(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {
                "group": group,
                "scope": "Namespaced",
                "names": {"plural": plural, "singular": kind.lower(), "kind": kind},
                "versions": [version],
            },
        }
    )


def test_what_others_have_to_define(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(tls={"issuerRef": {"name": "ca"}}, monitoring={"podMonitor": True})
    problem = shop.wait(status="False", reason="MissingInCluster")
    assert "could not find the requested resource" in problem["message"]
    define(shop.cluster, "cert-manager.io", "certificates", "Certificate")
    define(shop.cluster, "monitoring.coreos.com", "podmonitors", "PodMonitor")
    shop.wait("TLSReady", "False", "CertificatePending")
    wanted = shop.find("Certificate", "cache-tls")
    assert wanted is not None
    assert wanted["spec"]["dnsNames"][0] == f"cache.{shop.name}.svc.cluster.local"
    issued = certificate(shop, trustme.CA())
    issued["metadata"]["name"] = wanted["spec"]["secretName"]
    shop.cluster.create(issued)
    shop.wait("TLSReady")
    shop.wait()
    assert shop.find("PodMonitor") is not None
    shop.cluster.edit(KIND, shop.name, "cache", lambda item: [item["spec"].pop(key) for key in ("tls", "monitoring")])
    wait_for(lambda: shop.find("PodMonitor") is None and shop.find("Certificate", "cache-tls") is None, SECONDS)
    shop.wait()


def backup(**more: Any) -> Object:
    return {"schedule": "@daily", "s3": {"bucket": "backups", "credentialsSecret": "s3"}} | more


def test_the_state_of_backups(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(backup=backup(), **DISK)
    shop.wait("BackupHealthy", "False", "SecretMissing")
    shop.cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3", "namespace": shop.name}})
    shop.wait("BackupHealthy", "True", "Scheduled")
    shop.wait()
    shop.cluster.set_status("CronJob", shop.name, "cache-backup", {"lastSuccessfulTime": "2026-01-01T00:00:00Z"})
    shop.wait("BackupHealthy", "True", "BackedUp")
    assert (shop.get() or {})["status"]["backup"]["lastSuccess"] == "2026-01-01T00:00:00Z"
    schedule = shop.find("CronJob", "cache-backup")
    assert schedule is not None
    template = schedule["spec"]["jobTemplate"]
    metadata = {"name": "cache-backup-1", "namespace": shop.name, "labels": template["metadata"]["labels"]}
    shop.cluster.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]})
    failed = {"type": "Failed", "status": "True", "message": "3 times", "lastTransitionTime": "2026-01-02T00:00:00Z"}
    shop.cluster.set_status("Job", shop.name, "cache-backup-1", {"conditions": [failed]})
    problem = shop.wait("BackupHealthy", "False", "BackupFailed")
    assert "cache-backup-1: 3 times" in problem["message"]
    wait_for(lambda: shop.events("BackupFailed"), SECONDS)
    shop.cluster.set_status("CronJob", shop.name, "cache-backup", {"lastSuccessfulTime": "2026-01-03T00:00:00Z"})
    shop.wait("BackupHealthy", "True", "BackedUp")


def test_a_restored_instance_needs_its_bucket_once(shop: Shop, operator: RunningOperator, kubelet: Kubelet) -> None:
    kubelet.paused = True
    try:
        origin = {"fromBackup": "old.rdb", "s3": {"bucket": "backups", "credentialsSecret": "s3"}}
        shop.declare(bootstrap=origin, **DISK)
        problem = shop.wait("Degraded", "True", "SecretMissing")
        assert "spec.bootstrap.s3.credentialsSecret" in problem["message"]
    finally:
        kubelet.paused = False
    shop.cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3", "namespace": shop.name}})
    shop.wait("Degraded", "False")
    shop.wait()
    wait_for(lambda: (shop.get() or {})["status"].get("version"), SECONDS)
    shop.cluster.delete("Secret", shop.name, "s3")
    shop.change(memory={"evictionPolicy": "allkeys-lru"})
    shop.wait("Degraded", "False")
    shop.wait()


def test_a_last_backup_comes_before_the_end(shop: Shop, operator: RunningOperator) -> None:
    shop.cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3", "namespace": shop.name}})
    uid = uid_of(shop.declare(backup=backup(), deletionPolicy="BackupThenDelete", **DISK))
    shop.wait()
    shop.delete()
    job = "cache-final-backup"
    wait_for(lambda: shop.find("Job", job), SECONDS)
    assert shop.route() is None
    shop.wait("Ready", "False", "FinalBackup")
    failed = {"type": "Failed", "status": "True", "message": "no bucket"}
    shop.cluster.set_status("Job", shop.name, job, {"conditions": [failed]})
    problem = shop.wait("Ready", "False", "FinalBackupFailed")
    assert "no bucket; delete the Job to try again, or set deletionPolicy" in problem["message"]
    assert shop.find("StatefulSet") is not None
    shop.cluster.delete("Job", shop.name, job)
    wait_for(lambda: (again := shop.find("Job", job)) is not None and "status" not in again, SECONDS)
    shop.cluster.set_status("Job", shop.name, job, {"conditions": [{"type": "Complete", "status": "True"}]})
    wait_for(lambda: shop.get() is None, SECONDS)
    shop.gone(uid)


def test_what_the_cluster_refuses_is_said(shop: Shop, operator: RunningOperator) -> None:
    shop.cluster.fail(422, method="PATCH", path=f"/{shop.name}/networkpolicies/", reason="Invalid")
    shop.declare()
    shop.wait(status="False", reason="RefusedByCluster")
    wait_for(lambda: shop.events("RefusedByCluster"), SECONDS)
    shop.cluster.heal()
    shop.wait()


def test_a_status_that_does_not_change_is_not_written(shop: Shop, operator: RunningOperator) -> None:
    shop.declare(backup=backup(), **DISK)
    shop.wait()
    wait_for(lambda: shop.events("Ready"), SECONDS)  # the last that is written
    version = (shop.get() or {})["metadata"]["resourceVersion"]
    seen = len(shop.cluster.requests)
    wait_for(  # it looks at the Secret that it misses again and again
        lambda: sum(f"/{shop.name}/secrets/s3" in path for _, path, _ in list(shop.cluster.requests)[seen:]) >= 3,
        SECONDS,
    )
    assert (shop.get() or {})["metadata"]["resourceVersion"] == version
    writes = [
        (method, path)
        for method, path, _ in list(shop.cluster.requests)[seen:]
        if method != "GET" and f"/{shop.name}/" in path
    ]
    assert writes == []
