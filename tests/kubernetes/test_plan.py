"""What is planned for a resource, read without a cluster and held to the published schemas of Kubernetes."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import redis as redis_py

from control.kubernetes import plan as planning
from control.kubernetes.client import Object
from control.kubernetes.plan import PLANS, Login, Observed, OperatorSettings, Plan, claim_hosts, make_plan
from control.kubernetes.spec import Instance, read_instance
from tests.servers import free_port, redis_binary, wait_for

SETTINGS = OperatorSettings(
    base_domain="db.example",
    monitoring_namespace="monitoring",
    ingress_class="nginx",
    ingress_annotations=frozenset(["cert-manager.io/issuer"]),
    ingress_tls_secrets=frozenset(["wild"]),
)
LOGIN = Login(1, "cache-auth-1", "2026-01-01T00:00:00Z", "password", "admin")
OBSERVED = Observed(
    logins=(LOGIN,),
    token="token-" * 6,
    readonly_token="readonly-" * 4,
    hosts=("cache-aaaaaa.db.example", "cart.db.example"),
)
S3 = {"bucket": "backups", "endpoint": "https://s3.example", "region": "eu", "credentialsSecret": "s3"}
LIMITS = {"requests": {"cpu": "100m", "memory": 67108864}, "limits": {"memory": "128Mi"}}
EVERYTHING: Object = {
    "resources": LIMITS,
    "memory": {"maxmemoryPercent": 60, "evictionPolicy": "allkeys-lru"},
    "config": {"maxclients": "500", "io-threads": "2", "notify-keyspace-events": ""},
    "persistence": {"size": "2Gi", "storageClassName": "fast", "strategy": "AOFAndRDB"},
    "tls": {"secretName": "tls", "clientAuth": "Optional"},
    "gateway": {
        "ingress": {"className": "traefik", "tlsSecretName": "wild", "annotations": {"cert-manager.io/issuer": "le"}},
        "rateLimit": {"requestsPerSecond": 10, "burst": 20},
        "commands": {"deny": ["flushall"]},
    },
    "networkPolicy": {"extraFrom": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]},
    "scheduling": {
        "antiAffinity": "Required",
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "redis", "operator": "Exists"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
        ],
        "priorityClassName": "high",
    },
    "backup": {"schedule": "0 3 * * *", "keep": 3, "s3": S3 | {"prefix": "redis"}},
    "bootstrap": {"fromBackup": "old.rdb", "s3": S3},
    "monitoring": {"exporter": True},
}
SHAPES: dict[str, Object] = {
    "a cache": {},
    "a database": {"persistence": {"size": "1Gi"}},
    "a hibernating one": {"persistence": {"size": "1Gi"}, "replicas": 0},
    "a namespace of its own": {"placement": {"namespaceMode": "Dedicated"}, "persistence": {"size": "1Gi"}},
    "everything": EVERYTHING,
    "everything in a namespace of its own": EVERYTHING | {"placement": {"namespaceMode": "Dedicated"}},
}
# since these are the definitions of others, no schema of Kubernetes knows them
OTHERS = ("Certificate", "PodMonitor")


def instance(**spec: Any) -> Instance:
    metadata = {"name": "cache", "namespace": "shop", "uid": "6f1c", "labels": {"redisgate.io/organization": "acme"}}
    return read_instance({"metadata": metadata, "spec": {"mode": "Standalone"} | spec})


def plan_of(observed: Observed = OBSERVED, settings: OperatorSettings = SETTINGS, **spec: Any) -> Plan:
    return make_plan(instance(**spec), settings, observed)


def one(plan: Plan, kind: str, name: str = "cache") -> Object:
    found = [each for each in plan.objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, [(each["kind"], each["metadata"]["name"]) for each in plan.objects]
    return found[0]


@pytest.mark.parametrize("version", ["1.31", "1.34"])
@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_the_published_schemas_accept_it(spec: Object, version: str) -> None:
    copies = {"s3": {"metadata": {"name": "s3"}, "data": {}}, "tls": {"metadata": {"name": "tls"}, "data": {}}}
    plan = plan_of(replace(OBSERVED, copies=copies, tls_ca="ca", tls_digest="1"), **spec)
    assert plan.refusal is None
    made = instance(**spec)
    more = [
        planning.login_secret(made, 1, "a", "b", ""),
        planning.key_secret(made, "a", "b", "https://x"),
        *([planning.final_backup(made, SETTINGS, OBSERVED)] if "backup" in spec else []),
    ]
    for child in [*plan.objects, *more]:
        if child["kind"] not in OTHERS:
            kubernetes_validate.validate(child, version, strict=True)


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_an_owner_reference_never_crosses_a_namespace(spec: Object) -> None:
    """It would get the object deleted while its owner lives."""
    for child in plan_of(**spec).objects:
        same = child["metadata"].get("namespace") == "shop"
        assert ("ownerReferences" in child["metadata"]) is same, child["kind"]
        assert child["metadata"]["labels"]["redisgate.io/instance-uid"] == "6f1c"
        assert child["metadata"]["labels"]["redisgate.io/organization"] == "acme"


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def test_pods_have_no_more_rights_than_they_need() -> None:
    plan = plan_of(**EVERYTHING)
    pods = [
        one(plan, "StatefulSet")["spec"]["template"]["spec"],
        one(plan, "CronJob", "cache-backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"],
    ]
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_only_the_gateway_the_operator_and_backups_get_in() -> None:
    policy = one(plan_of(), "NetworkPolicy")["spec"]
    rule = policy["ingress"][0]
    assert [each.get("namespaceSelector", {}).get("matchLabels") for each in rule["from"]] == [
        {"kubernetes.io/metadata.name": "redisgate"},
        {"kubernetes.io/metadata.name": "redisgate"},
        None,
    ]
    assert rule["from"][2]["podSelector"]["matchLabels"]["redisgate.io/instance-uid"] == "6f1c"
    assert policy["egress"] == []
    assert "Egress" in policy["policyTypes"], "scripts of a tenant reach nothing"
    assert one(plan_of(networkPolicy={"extraFrom": [{"podSelector": {}}]}), "NetworkPolicy")["spec"]["ingress"][0][
        "from"
    ][3] == {"podSelector": {}}
    assert ("cache") in [name for _, _, name in plan_of(networkPolicy={"mode": "Disabled"}).absent]


def test_an_ingress_leads_to_the_gateway() -> None:
    ingress = one(plan_of(), "Ingress", "route-6f1c")
    assert ingress["metadata"]["namespace"] == "redisgate"
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == list(OBSERVED.hosts)
    for rule in ingress["spec"]["rules"]:
        assert rule["http"]["paths"][0]["backend"]["service"] == {"name": "redisgate-gateway", "port": {"number": 80}}
    assert ingress["spec"]["ingressClassName"] == "nginx"


STRANGE_ANNOTATIONS = [
    "nginx.ingress.kubernetes.io/server-snippet",
    "cert-manager.io/cluster-issuer",
    "cert-manager.io/secret-template",
    "external-dns.alpha.kubernetes.io/hostname",
    "external-dns.alpha.kubernetes.io/target",
]


@pytest.mark.parametrize("key", STRANGE_ANNOTATIONS)
def test_what_a_resource_says_of_its_ingress_reaches_the_gateways_namespace_only_where_it_is_allowed(key: str) -> None:
    for settings in (SETTINGS, OperatorSettings(base_domain="db.example")):
        plan = plan_of(settings=settings, gateway={"ingress": {"annotations": {key: "theirs"}}})
        assert "theirs" not in str(one(plan, "Ingress", "route-6f1c"))
        assert [problem.reason for problem in plan.problems] == ["AnnotationRefused"]
        assert key in plan.problems[0].message
    allowed = replace(SETTINGS, ingress_annotations=frozenset([key]))
    plan = plan_of(settings=allowed, gateway={"ingress": {"annotations": {key: "theirs"}}})
    never = key in planning.NEVER_ANNOTATIONS
    assert ("theirs" in str(one(plan, "Ingress", "route-6f1c"))) is not never
    assert bool(plan.problems) is never


def test_a_resource_names_no_secret_beside_the_gateway_that_is_not_meant_for_it() -> None:
    def tls(name: str, **annotations: str) -> tuple[Any, list[str]]:
        plan = plan_of(gateway={"ingress": {"tlsSecretName": name, "annotations": annotations}})
        spec = one(plan, "Ingress", "route-6f1c")["spec"]
        return [each["secretName"] for each in spec.get("tls", ())], [problem.reason for problem in plan.problems]

    assert tls("wild") == (["wild"], [])
    assert tls("route-of-another") == ([], ["TlsSecretRefused"])
    issued = {"cert-manager.io/issuer": "le"}
    assert tls("route-of-another", **issued) == (["route-6f1c-tls"], []), "cert-manager writes it"
    assert tls("wild", **issued) == (["wild"], [])


def test_body_limits_agree_with_the_gateways_own() -> None:
    settings = replace(SETTINGS, max_request_bytes=5_000)
    plan = plan_of(settings=settings, gateway={"maxRequestBytes": 1_000_000})
    ingress = one(plan, "Ingress", "route-6f1c")
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"] == "5000"
    assert route(plan)["limits"]["maxRequestBytes"] == 5_000


def route(plan: Plan) -> Object:
    data: Object = json.loads(base64.b64decode(one(plan, "Secret", "route-6f1c")["data"]["instance.json"]))
    return data


def test_a_gateway_never_sees_a_key() -> None:
    told = route(plan_of())
    assert OBSERVED.token not in str(told)
    assert [token["scopes"] for token in told["tokens"]] == [["read", "write"], ["read"]]
    assert told["host"] == "cache.shop.svc.cluster.local", "a name, never the address of a pod"


def test_a_key_that_is_too_short_opens_nothing() -> None:
    plan = plan_of(replace(OBSERVED, readonly_token="k" * 31))
    assert [token["scopes"] for token in route(plan)["tokens"]] == [["read", "write"]]
    assert [(problem.condition, problem.reason) for problem in plan.problems] == [("CredentialsReady", "KeyTooShort")]
    assert "readonly-token: an API key has 32 characters" in plan.problems[0].message
    assert plan_of(replace(OBSERVED, readonly_token="k" * 32)).problems == []


def config_of(plan: Plan) -> dict[str, str]:
    text = base64.b64decode(one(plan, "Secret", "cache-config")["data"]["redis.conf"]).decode()
    return dict(line.split(" ", 1) for line in text.splitlines())


def test_memory() -> None:
    assert config_of(plan_of())["maxmemory"] == "0"
    assert config_of(plan_of(resources=LIMITS))["maxmemory"] == str(96 * 2**20)
    config = config_of(plan_of(resources=LIMITS, memory={"maxmemoryPercent": 50, "evictionPolicy": "allkeys-lru"}))
    assert (config["maxmemory"], config["maxmemory-policy"]) == (str(64 * 2**20), "allkeys-lru")


@pytest.mark.parametrize(
    ("strategy", "appendonly", "save"),
    [("AOF", "yes", '""'), ("RDB", "no", "3600 1 300 100 60 10000"), ("AOFAndRDB", "yes", "3600 1 300 100 60 10000")],
)
def test_persistence(strategy: str, appendonly: str, save: str) -> None:
    config = config_of(plan_of(persistence={"size": "1Gi", "strategy": strategy}))
    assert (config["appendonly"], config["save"]) == (appendonly, save)


@pytest.mark.parametrize(
    ("former", "newer", "told"),
    [
        ("RDB", "RDB", {"save": planning.SAVE_POINTS}),
        ("AOF", "AOF", {"appendonly": "yes"}),
        ("RDB", "AOF", {"save": planning.SAVE_POINTS}),
        ("AOF", "RDB", {"save": planning.SAVE_POINTS, "appendonly": "yes"}),
    ],
)
def test_a_running_redis_goes_on_with_the_form_that_its_file_may_still_name(
    former: str, newer: str, told: dict[str, str]
) -> None:
    """A kubelet brings a changed Secret into a running pod a minute later."""
    made = instance(persistence={"size": "1Gi", "strategy": newer})
    config = planning.running_config(made, replace(OBSERVED, strategy=former))
    assert {key: config[key] for key in ("save", "appendonly") if key in config} == told


def test_the_engine_is_the_one_that_was_asked_for() -> None:
    def image(**engine: str) -> str:
        template = one(plan_of(engine=engine), "Deployment")["spec"]["template"]
        return str(template["spec"]["containers"][0]["image"])

    assert image(type="Redis", version="7.2") == "redis:7.2"
    assert image(type="Valkey", version="8.1") == "valkey/valkey:8.1"
    assert image(image="valkey/valkey:8.1-alpine") == "valkey/valkey:8.1-alpine"


@pytest.mark.parametrize("name", ["mirror/redis:custom", "redis", "redis.evil.example/redis:8", "valkey/valkey-x:8"])
def test_an_image_gets_secrets_so_only_those_that_are_allowed_run(name: str) -> None:
    plan = plan_of(engine={"image": name})
    assert plan.objects == []
    assert plan.refusal is not None
    assert (plan.refusal.reason, plan.refusal.message.split(":")[0]) == ("ImageRefused", "spec.engine.image")
    allowed = replace(SETTINGS, engine_images=(name,))
    assert plan_of(settings=allowed, engine={"image": name}).refusal is None


def test_an_operator_may_insist_on_network_policies() -> None:
    disabled = {"networkPolicy": {"mode": "Disabled"}}
    assert plan_of(**disabled).refusal is None
    refusal = plan_of(settings=replace(SETTINGS, open_networks=False), **disabled).refusal
    assert refusal is not None
    assert refusal.reason == "OpenNetworkRefused"


def test_a_pod_gets_the_certificate_and_nothing_else_of_its_secret() -> None:
    def keys(**tls: str) -> list[str]:
        volumes = one(plan_of(tls={"secretName": "tls"} | tls), "Deployment")["spec"]["template"]["spec"]["volumes"]
        secret = next(volume["secret"] for volume in volumes if volume["name"] == "tls")
        return [each["key"] for each in secret["items"]]

    assert keys() == ["tls.crt", "tls.key"]
    assert keys(clientAuth="Optional") == ["tls.crt", "tls.key", "ca.crt"]


def test_a_broken_pod_can_be_corrected() -> None:
    """With OrderedReady the controller waits for it for ever."""
    assert one(plan_of(persistence={"size": "1Gi"}), "StatefulSet")["spec"]["podManagementPolicy"] == "Parallel"


def test_after_its_first_start_an_instance_needs_no_key_to_the_bucket() -> None:
    spec = one(plan_of(**EVERYTHING), "StatefulSet")["spec"]["template"]["spec"]
    assert all(each["valueFrom"]["secretKeyRef"]["optional"] for each in spec["initContainers"][0]["env"])
    backup = one(plan_of(**EVERYTHING), "CronJob", "cache-backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert not any("optional" in str(each) for each in backup["containers"][0]["env"])


def test_the_gateway_gets_no_password_that_it_does_not_use() -> None:
    older = Login(1, "cache-auth-1", "2026-01-01T00:00:00Z", "former", "former-admin")
    newer = Login(2, "cache-auth-2", "2026-01-02T00:00:00Z", "newer", "newer-admin")
    told = route(plan_of(replace(OBSERVED, logins=(newer, older))))
    assert told["password"] == "newer"
    assert "former" not in json.dumps(told)


def test_what_was_switched_off_is_to_be_absent() -> None:
    absent = [(resource.kind, name) for resource, _, name in plan_of().absent]
    assert ("PodMonitor", "cache") in absent
    assert ("Certificate", "cache-tls") in absent
    plan = plan_of(tls={"issuerRef": {"name": "ca"}}, monitoring={"podMonitor": True})
    assert not {"PodMonitor", "Certificate"} & {resource.kind for resource, _, _ in plan.absent}
    assert one(plan, "Secret", "cache-config")["metadata"]["annotations"][planning.MADE_ANNOTATION] == (
        "Certificate,PodMonitor"
    )


def probe(name: str, port: int) -> bool:
    container = one(plan_of(engine={"type": "Redis"}), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    command = [word.replace("-p 6379", f"-p {port}") for word in container[name]["exec"]["command"]]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """With the users of an instance; its port, and the folder of its data."""
    (tmp_path / "users.acl").write_text(planning.users_acl((LOGIN,)))
    folder, port = tmp_path / "data", free_port()
    folder.mkdir()
    command = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "1 1"]
    command += ["--aclfile", str(tmp_path / "users.acl"), "--maxclients", "4"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: probe("readinessProbe", port), 10)
            yield port, folder
        finally:
            process.kill()


def admin(port: int) -> Any:
    return redis_py.Redis(port=port, username=planning.ADMIN_USER, password=LOGIN.admin_password)


def test_a_redis_whose_disk_is_full_is_alive_and_reads(redis: tuple[int, Path]) -> None:
    port, folder = redis
    with admin(port) as client:
        client.set("a", "1")
        shutil.rmtree(folder)
        with contextlib.suppress(redis_py.ResponseError):
            client.bgsave()
        wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", 10)
        with pytest.raises(redis_py.ResponseError, match="MISCONF"):
            client.set("a", "2")
        assert client.get("a") == b"1"
        assert [probe(f"{name}Probe", port) for name in ("startup", "liveness", "readiness")] == [True, True, True]


def test_a_redis_with_too_many_clients_is_alive_and_not_ready(redis: tuple[int, Path]) -> None:
    port, _ = redis
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_for(lambda: not probe("readinessProbe", port), 10)
        assert probe("livenessProbe", port)


def test_who_does_not_answer_is_not_alive(tmp_path: Path) -> None:
    port = free_port()
    assert not probe("livenessProbe", port)
    with socket.create_server(("127.0.0.1", port)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        assert not probe("livenessProbe", port), "it hangs up"


def test_an_older_server_does_not_get_the_volume_of_a_newer_one() -> None:
    observed = replace(OBSERVED, images={"redis": "valkey/valkey:8.1"})

    def image(**spec: Any) -> tuple[str, list[str]]:
        plan = plan_of(observed, **spec)
        workload = next(each for each in plan.objects if each["kind"] in ("StatefulSet", "Deployment"))
        containers = workload["spec"]["template"]["spec"]["containers"]
        return containers[0]["image"], [problem.reason for problem in plan.problems]

    disk = {"persistence": {"size": "1Gi"}}
    assert image(engine={"version": "7.2"}, **disk) == ("valkey/valkey:8.1", ["DowngradeRefused"])
    assert image(engine={"version": "8"}, **disk) == ("valkey/valkey:8", [])
    assert image(engine={"version": "8.10"}, **disk) == ("valkey/valkey:8.10", [])
    assert image(engine={"version": "7.2"}) == ("valkey/valkey:7.2", []), "there is nothing to read"
    assert image(engine={"image": "valkey/valkey:7.2"}, **disk) == ("valkey/valkey:7.2", []), "somebody insists"


def test_only_what_needs_a_restart_restarts() -> None:
    def template(**spec: Any) -> Object:
        return dict(one(plan_of(persistence={"size": "1Gi"}, **spec), "StatefulSet")["spec"]["template"])

    base = template()
    assert template(config={"maxclients": "10"}, memory={"evictionPolicy": "allkeys-lru"}) == base
    assert template(gateway={"commands": {"deny": ["keys"]}}, auth={"rotation": {"trigger": "x"}}) == base
    assert template(suspend=True) == base
    assert template(config={"io-threads": "2"}) != base
    assert template(engine={"version": "8.2"}) != base


def test_a_renewed_certificate_is_used() -> None:
    def template(digest: str) -> Object:
        observed = replace(OBSERVED, tls_digest=digest)
        return dict(one(plan_of(observed, tls={"secretName": "tls"}), "Deployment")["spec"]["template"])

    assert template("1") == template("1")
    assert template("1") != template("2")


def test_cache_data_is_never_split_between_two_pods() -> None:
    assert one(plan_of(), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_a_mode_is_a_plan() -> None:
    assert set(PLANS) == {"Standalone", "Sentinel", "Cluster"}
    for mode in ("Sentinel", "Cluster"):
        plan = plan_of(mode=mode)
        assert plan.objects == []
        assert plan.refusal is not None
        assert plan.refusal.reason == "ModeNotBuilt"


def test_a_quantity_that_is_none_is_named() -> None:
    refusal = plan_of(resources={"limits": {"memory": "much"}}).refusal
    assert refusal is not None
    assert refusal.message.startswith("spec.resources.limits.memory: 'much'")


def test_hosts() -> None:
    wanted = instance(gateway={"hosts": ["a.db.example", "db.example", "x.example", "b.db.example"]})
    own = f"{wanted.label}.db.example"
    older = {"b.db.example": [((2, "2020-01-01T00:00:00Z", "1"), "1")]}
    wanted = replace(wanted, created="2021-01-01T00:00:00Z")
    hosts, refused = claim_hosts(wanted, older, "db.example")
    assert hosts == (own, "a.db.example")
    assert set(refused) == {"db.example", "x.example", "b.db.example"}
    assert claim_hosts(wanted, older, "db.example", "a.db.example")[1]["a.db.example"] == "it is the dashboard's"
    assert claim_hosts(wanted, {}, "") == (
        (),
        dict.fromkeys(wanted.spec.gateway.hosts, "this gateway has no base domain"),
    )


def test_a_host_stays_with_the_instance_that_was_given_it() -> None:
    host = "b.db.example"
    old = replace(instance(gateway={"hosts": [host]}), uid="old", created="2020-01-01T00:00:00Z")
    young = replace(old, uid="young", created="2024-01-01T00:00:00Z")

    def winners(*claimants: Instance) -> list[str]:
        own = {each.uid: f"{each.label}.db.example" for each in claimants}
        claims = {host: [(planning.claim_of(each, host, own[each.uid]), each.uid) for each in claimants]}
        return [each.uid for each in claimants if host in claim_hosts(each, claims, "db.example")[0]]

    assert winners(old, young) == ["old"]
    given = planning.granted_hosts(young, (f"{young.label}.db.example", host), "2025-01-01T00:00:00Z")
    assert given == [{"host": host, "since": "2025-01-01T00:00:00Z"}]
    young = replace(young, status={"hosts": given})
    assert winners(old, young) == ["young"], "it works there"
    assert planning.granted_hosts(young, (host,), "2026-01-01T00:00:00Z") == given, "since then"
    later = replace(old, status={"hosts": [{"host": host, "since": "2025-06-01T00:00:00Z"}]})
    assert winners(later, young) == ["young"]
    owner = replace(old, uid="owner")
    theirs = f"{owner.label}.db.example"
    thief = replace(
        old, spec=instance(gateway={"hosts": [theirs]}).spec, status={"hosts": [{"host": theirs, "since": ""}]}
    )
    claims = {
        theirs: [(planning.claim_of(owner, theirs, theirs), "owner"), (planning.claim_of(thief, theirs, "-"), "old")]
    }
    assert claim_hosts(thief, claims, "db.example")[1] == {theirs: "another instance has it"}
