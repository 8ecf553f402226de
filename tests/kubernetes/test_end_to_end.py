"""From a declared resource to its data: kubectl, a real operator, real gateways, a real redis-server for each pod.

Each of them has the rights of deploy/rbac and no others, so all that is tested here is tested with exactly those.
"""

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.control.conftest import Service, Urls, migrated, postgres_server  # noqa: F401
from tests.control.service import PASSWORD, Api, register
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.test_routes import condition, get, namespace
from tests.servers import Gateway, wait_for

NAMESPACE = "redisgate"
RBAC = Path(__file__).parents[2] / "deploy" / "rbac"
ACCOUNTS = ("gateway", "control-plane", "operator")
STOP_SECONDS = 15.0
MIB = 1024 * 1024


class Operator:
    """`redisgate operator` as a process of its own."""

    def __init__(self, kubeconfig: Path, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [
                *[sys.executable, "-W", "error", "-m", "redisgate", "operator", "--outside-cluster", "--leader-elect"],
                *["--kubeconfig", str(kubeconfig), "--operator-namespace", NAMESPACE, "--base-domain", "redis.test"],
                *arguments,
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def log(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_SECONDS)
        log = self.log()
        self._log.close()
        assert status == 0, log
        assert "Traceback" not in log, log

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


class World:
    """A cluster at work."""

    def __init__(self, directory: Path) -> None:
        self.cluster = Cluster().start()
        for name in (NAMESPACE, "shop"):
            self.cluster.create(namespace(name))
        self.kubeconfig = self.cluster.kubeconfig(directory)
        self.kubectl("apply", "--filename", "-", text=_definition())
        for path in sorted(RBAC.glob("*.yaml")):
            self.kubectl("apply", "--filename", str(path))
        self.directory = directory
        self.kubelet = Kubelet(self.cluster)
        self.operator = Operator(self.kubeconfig_of("redisgate-operator"))
        wait_for(lambda: "are looked after" in self.operator.log(), what="the operator")

    def kubectl(self, *arguments: str, text: str = "") -> str:
        """What it prints; fails if it does."""
        if shutil.which("kubectl") is None:
            pytest.fail("kubectl is not installed; Debian, Ubuntu: apt-get install kubernetes-client")
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr + self.operator_log()
        return done.stdout

    def kubeconfig_of(self, account: str) -> Path:
        """With the rights of a service account. Not for kubectl, which sends no token without TLS."""
        return self.cluster.kubeconfig(self.directory, self.cluster.service_account_token(NAMESPACE, account))

    def operator_log(self) -> str:
        return self.operator.log() if hasattr(self, "operator") else ""

    def apply(self, name: str, namespace: str = "shop", **spec: Any) -> None:
        """By kubectl."""
        resource = {
            "apiVersion": "redisgate.io/v1",
            "kind": "RedisHttpInstance",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"mode": "Standalone", "deletionPolicy": "Delete", **spec},
        }
        self.kubectl("apply", "--filename", "-", text=json.dumps(resource))

    def secret(self, name: str, namespace: str = "shop") -> dict[str, str]:
        """Its values."""
        found = self.cluster.find("Secret", namespace, name) or {"data": {}}
        return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}

    def resource(self, name: str, namespace: str = "shop") -> dict[str, Any]:
        found = self.cluster.find("RedisHttpInstance", namespace, name)
        assert found is not None
        return found

    def ready(self, name: str, namespace: str = "shop") -> bool:
        found = self.cluster.find("RedisHttpInstance", namespace, name) or {}
        return any(
            each["type"] == "Ready" and each["status"] == "True"
            for each in (found.get("status") or {}).get("conditions", [])
        )


def _definition() -> str:
    command = [sys.executable, "-m", "redisgate", "crd"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    try:
        with world.kubelet:
            yield world
            world.operator.stop()
    finally:
        with contextlib.suppress(ValueError):
            world.operator.kill()
        world.cluster.stop()


@pytest.fixture(scope="module")
def gateway(world: World) -> Iterator[Gateway]:
    """Without a database."""
    gateway = Gateway(
        {
            "REDISGATE_KUBERNETES": "on",
            "REDISGATE_KUBECONFIG": str(world.kubeconfig_of("redisgate-gateway")),
            "REDISGATE_KUBERNETES_NAMESPACE": NAMESPACE,
            "REDISGATE_BASE_DOMAIN": "redis.test",
            "REDISGATE_WORKERS": "2",
        }
    )
    yield gateway
    gateway.stop()


def test_apply_one_resource_use_it_by_its_key_delete_it_and_nothing_is_left(world: World, gateway: Gateway) -> None:
    world.apply("cart", persistence={"size": "1Gi"}, memory={"evictionPolicy": "allkeys-lru"})
    wait_for(lambda: condition(world.cluster, "cart").get("status") == "True", 20, "RouteProgrammed")
    wait_for(lambda: world.ready("cart"), 20, "Ready")
    world.kubectl("--namespace", "shop", "wait", "--for", "condition=Ready", "rhi/cart", "--timeout", "10s")
    key = world.secret("cart-api-key")
    assert get(gateway.port, key["token"], "/set/color/blue").result == "OK"
    assert get(gateway.port, key["token"], "/get/color").result == "blue"
    assert get(gateway.port, key["readonly-token"], "/get/color").result == "blue"
    assert "NOPERM" in get(gateway.port, key["readonly-token"], "/set/color/red").error
    host = key["url"].removeprefix("https://")
    assert get(gateway.port, key["token"], "/get/color", host=host).result == "blue"
    # As in a terminal.
    curl = ["curl", "--silent", "--header", f"Authorization: Bearer {key['token']}", f"{gateway.url}/get/color"]
    assert json.loads(subprocess.run(curl, capture_output=True, check=True).stdout) == {"result": "blue"}
    uid = world.resource("cart")["metadata"]["uid"]
    assert len(world.cluster.everything(f"redisgate.io/instance-uid={uid}")) > 5
    world.kubectl("--namespace", "shop", "delete", "rhi/cart", "--timeout", "20s")
    wait_for(lambda: not world.cluster.everything(f"redisgate.io/instance-uid={uid}"), 10, "nothing to be left")
    wait_for(lambda: get(gateway.port, key["token"], "/get/color").status == 401, 1, "401")


def test_suspended_it_keeps_its_data_and_a_rotated_password_needs_no_restart(world: World, gateway: Gateway) -> None:
    world.apply("notes", persistence={"size": "1Gi"})
    wait_for(lambda: world.ready("notes"), 20, "Ready")
    wait_for(lambda: condition(world.cluster, "notes").get("status") == "True", 20, "the route")
    token = world.secret("notes-api-key")["token"]
    assert get(gateway.port, token, "/set/k/v").result == "OK"
    world.apply("notes", persistence={"size": "1Gi"}, suspend=True)
    wait_for(lambda: get(gateway.port, token, "/get/k").status == 401, 10, "its end")
    world.apply("notes", persistence={"size": "1Gi"})
    wait_for(lambda: get(gateway.port, token, "/get/k").status == 200, 20, "its return")
    assert get(gateway.port, token, "/get/k").result == "v"
    port = world.kubelet.port("shop", "notes")
    before = world.resource("notes")["status"]["credentials"]["generation"]
    world.apply("notes", persistence={"size": "1Gi"}, auth={"rotation": {"trigger": "now", "overlap": "0s"}})
    wait_for(lambda: world.resource("notes")["status"]["credentials"]["generation"] > before, 10, "a new password")
    statuses = {get(gateway.port, token, "/get/k").status for _ in range(20)}
    assert statuses == {200}
    assert world.kubelet.port("shop", "notes") == port
    world.kubectl("--namespace", "shop", "delete", "rhi/notes", "--timeout", "20s")


CORE, SHOP, OWN = "/api/v1", "/api/v1/namespaces/shop", f"/api/v1/namespaces/{NAMESPACE}"
RESOURCES = "/apis/redisgate.io/v1/namespaces/shop/redishttpinstances"


@pytest.mark.parametrize(
    ("account", "method", "path"),
    [
        ("gateway", "GET", f"{SHOP}/secrets"),
        ("gateway", "GET", f"{OWN}/secrets/x"),
        ("gateway", "DELETE", f"{OWN}/secrets/x"),
        ("gateway", "DELETE", f"{RESOURCES}/x"),
        ("gateway", "PATCH", f"{RESOURCES}/x"),
        ("gateway", "GET", f"{CORE}/pods"),
        ("control-plane", "GET", f"{SHOP}/secrets"),
        ("control-plane", "DELETE", "/apis/apps/v1/namespaces/shop/statefulsets/x"),
        ("control-plane", "DELETE", f"{SHOP}/resourcequotas/x"),
        ("operator", "DELETE", f"{RESOURCES}/x"),
        ("operator", "POST", RESOURCES),
        ("operator", "DELETE", f"{SHOP}/pods/x"),
        ("operator", "GET", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/redisgate-gateway"),
        *((account, "GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles") for account in ACCOUNTS),
    ],
)
def test_what_a_component_does_not_need_it_may_not(world: World, account: str, method: str, path: str) -> None:
    token = world.cluster.service_account_token(NAMESPACE, f"redisgate-{account}")
    body = "{}" if method in ("POST", "PATCH") else None
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"}
    request = urllib.request.Request(
        world.cluster.url + path, method=method, data=body.encode() if body else None, headers=headers
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    with refused.value as answer:
        assert answer.status == 403
        assert f"system:serviceaccount:{NAMESPACE}:redisgate-{account}" in answer.read().decode()


# Through the API


@pytest.fixture(scope="module")
def database(postgres_server: Any, migrated: str) -> Iterator[Urls]:  # noqa: F811
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


@pytest.fixture(scope="module")
def service(world: World, database: Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A control plane whose instances come from the cluster."""
    service = Service(
        database,
        tmp_path_factory.mktemp("service"),
        REDISGATE_KUBERNETES="on",
        REDISGATE_KUBECONFIG=str(world.kubeconfig_of("redisgate-control-plane")),
        REDISGATE_KUBERNETES_NAMESPACE=NAMESPACE,
        REDISGATE_BASE_DOMAIN="redis.test",
        REDISGATE_PROVISIONER="kubernetes",
        REDISGATE_PURGE_AFTER="1s",
        REDISGATE_WORKERS="1",
    )
    yield service
    service.stop()


def settled(api: Api, instance_id: str, status: str = "running") -> dict[str, Any]:
    """The instance, once its status is that."""
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        seen[:] = [api.call("GET", f"redis-instances/{instance_id}")]
        return bool(seen[0]["status"] == status)

    try:
        wait_for(look, 20, status)
    except AssertionError:
        raise AssertionError(seen) from None
    return seen[0]


def test_an_instance_made_by_the_api_is_a_resource_used_by_both_kinds_of_keys(world: World, service: Service) -> None:
    api = register(service.port)
    created = api.call("POST", "redis-instances", {"name": "Cart", "slug": "cart", "max_memory": 96 * MIB})
    shown = settled(api, created["id"])
    assert shown["provisioner"] == "kubernetes"
    home = f"redisgate-{api.organization_id}"
    [resource] = world.cluster.all("RedisHttpInstance", home)
    labels = resource["metadata"]["labels"]
    assert labels["redisgate.io/organization"] == api.organization_id
    assert labels["redisgate.io/instance-id"] == created["id"]
    assert resource["spec"]["deletionPolicy"] == "Delete"
    quota = world.cluster.find("ResourceQuota", home, "redisgate")
    assert quota is not None
    assert quota["spec"]["hard"]["count/redishttpinstances.redisgate.io"] == "5"
    assert world.cluster.find("LimitRange", home, "redisgate") is not None
    # The organization's key, the instance's own token and the key that the operator made.
    key, _ = api.key()
    name = resource["metadata"]["name"]
    theirs = world.secret(f"{name}-api-key", home)["token"]
    path = f"/redis/{created['id']}"
    assert get(service.port, created["rest_token"], "/set/k/v").result == "OK"
    for credential in (key, created["rest_token"], theirs):
        assert get(service.port, credential, f"{path}/get/k").result == "v"
    assert get(service.port, created["rest_token"], "/get/k", host=shown["domain"]).result == "v"
    assert get(service.port, secrets.token_hex(8), f"{path}/get/k").status == 401
    # A bigger one, by the API: the running server is told.
    api.call("PUT", f"redis-instances/{created['id']}", {"max_memory": 192 * MIB})
    settled(api, created["id"])
    used = get(service.port, key, f"{path}/config/get/maxmemory").result
    assert int(used[1]) in range(192 * MIB, 192 * MIB + 3)
    # A new password: requests go on.
    api.call("POST", f"redis-instances/{created['id']}/rotate-credentials", {"token": False, "readonly_token": False})
    settled(api, created["id"])
    assert get(service.port, key, f"{path}/get/k").result == "v"
    # What kubectl changes shows.
    world.cluster.edit(
        "RedisHttpInstance", home, name, lambda item: item["spec"]["memory"].update(evictionPolicy="volatile-ttl")
    )
    wait_for(
        lambda: api.call("GET", f"redis-instances/{created['id']}")["eviction"] == "volatile-ttl", 10, "the change"
    )
    settled(api, created["id"])
    world.cluster.edit("RedisHttpInstance", home, name, lambda item: item["spec"].update(suspend=True))
    assert settled(api, created["id"], "stopped")["desired_state"] == "stopped"
    assert get(service.port, key, f"{path}/get/k").status == 503
    world.cluster.edit("RedisHttpInstance", home, name, lambda item: item["spec"].update(suspend=False))
    settled(api, created["id"])
    wait_for(lambda: get(service.port, key, f"{path}/get/k").status == 200, 10, "its return")
    # What is not theirs to change is put back.
    world.cluster.edit("RedisHttpInstance", home, name, lambda item: item["spec"].update(deletionPolicy="Retain"))
    wait_for(lambda: world.resource(name, home)["spec"]["deletionPolicy"] == "Delete", 10, "it to be put back")
    # Deleted, and purged a second later: nothing is left, the namespace neither.
    api.call("DELETE", f"redis-instances/{created['id']}")
    wait_for(lambda: get(service.port, key, f"{path}/get/k").status in (401, 404), 5, "its end")
    organization = f"redisgate.io/organization={api.organization_id}"
    wait_for(lambda: not world.cluster.everything(organization), 40, "nothing to be left")
    assert world.cluster.find("Namespace", "", home) is None


def test_the_same_by_the_dashboards_forms(world: World, service: Service) -> None:
    api = register(service.port, "reader")
    home = f"/dashboard/{api.organization_id}"
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}", headers={"Accept": "text/html"}) as browser:

        def post(page: str, target: str, **fields: str) -> httpx.Response:
            token = re.search(r'name="csrf_token" value="([0-9a-f]{64})"', browser.get(page).text)
            assert token is not None, page
            response = browser.post(target, data={"csrf_token": token[1]} | fields)
            assert response.status_code == 303, response.text
            return response

        post("/login", "/login", email=api.email, password=PASSWORD)
        made = post(f"{home}/instances/new", f"{home}/instances/new", name="Basket", max_memory=str(64 * MIB))
        at = made.headers["location"].partition("?")[0]
        instance_id = at.rpartition("/")[2]
        settled(api, instance_id)
        page = browser.get(at).text
        assert "Running" in page
        tokens = api.call("GET", f"redis-instances/{instance_id}/credentials")
        assert tokens["token"] not in page
        assert get(service.port, tokens["token"], "/set/k/v").result == "OK"
        assert re.search(r"<textarea[^>]*>\s*v</textarea>", browser.get(f"{at}/data?key=k").text)
        post(f"{at}/settings", f"{at}/delete", confirm="Basket")
        wait_for(lambda: get(service.port, tokens["token"], "/get/k").status in (401, 404), 5, "its end")
    organization = f"redisgate.io/organization={api.organization_id}"
    wait_for(lambda: not world.cluster.everything(organization), 40, "nothing to be left")


def test_without_a_cluster_creation_fails_clearly_and_nothing_is_written_down(world: World, service: Service) -> None:
    api = register(service.port)
    world.cluster.cut()
    try:
        answer = api.call(
            "POST", "redis-instances", {"name": "Never", "slug": "never", "max_memory": 64 * MIB}, status=503
        )
        assert answer is None
    finally:
        world.cluster.heal()
    assert api.call("GET", "redis-instances")["items"] == []


def test_a_resource_deleted_in_the_cluster_is_told_and_not_made_anew(world: World, service: Service) -> None:
    api = register(service.port)
    created = api.call("POST", "redis-instances", {"name": "Lost", "slug": "lost", "max_memory": 64 * MIB})
    settled(api, created["id"])
    home = f"redisgate-{api.organization_id}"
    [resource] = world.cluster.all("RedisHttpInstance", home)
    world.cluster.delete("RedisHttpInstance", home, resource["metadata"]["name"])
    shown = settled(api, created["id"], "error")
    wait_for(
        lambda: "deleted in the cluster" in api.call("GET", f"redis-instances/{created['id']}")["status_reason"],
        10,
        "the reason",
    )
    assert shown["desired_state"] == "running"
    assert world.cluster.all("RedisHttpInstance", home) == []
    api.call("DELETE", f"redis-instances/{created['id']}")
    wait_for(lambda: world.cluster.find("Namespace", "", home) is None, 40, "the namespace to go")


def test_a_creation_that_the_cluster_refuses_is_rolled_back_whole(world: World, service: Service) -> None:
    api = register(service.port)
    home = f"redisgate-{api.organization_id}"
    world.cluster.fail(403, method="PATCH", path=f"{home}/redishttpinstances", reason="Forbidden")
    try:
        body = {"name": "Refused", "slug": "refused", "max_memory": 64 * MIB}
        created = api.call("POST", "redis-instances", body)
        shown = settled(api, created["id"], "error")
    finally:
        world.cluster.heal()
    assert "the cluster refuses it" in shown["status_reason"]
    wait_for(lambda: world.cluster.find("Namespace", "", home) is None, 10, "the namespace to go")
    assert api.call("GET", "quota")["quota"]["current_instances"] == 0
    # Asked for once more, it comes.
    api.call("PUT", f"redis-instances/{created['id']}/status", {"action": "reconcile"})
    settled(api, created["id"])


def test_an_orphan_is_reported_and_left_alone(world: World, service: Service) -> None:
    labels = {
        "app.kubernetes.io/managed-by": "redisgate-control-plane",
        "redisgate.io/instance-id": "00000000-0000-4000-8000-000000000000",
    }
    world.cluster.create(
        {
            "apiVersion": "redisgate.io/v1",
            "kind": "RedisHttpInstance",
            "metadata": {"name": "orphan", "namespace": "shop", "labels": labels},
            "spec": {"mode": "Standalone", "deletionPolicy": "Delete"},
        }
    )
    wait_for(
        lambda: any(
            event["reason"] == "Orphan" and event["involvedObject"]["name"] == "orphan"
            for event in world.cluster.all("Event", "shop")
        ),
        10,
        "the report",
    )
    assert world.resource("orphan")
    world.cluster.delete("RedisHttpInstance", "shop", "orphan")
