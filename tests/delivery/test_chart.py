"""The Helm chart: rendered by Helm itself, checked against its schema and against the API's published one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "redisgate"
VERSIONS = ("1.30", "1.34")
"""Of Kubernetes: the oldest that the chart takes, and a new one."""

# In a process of its own: Helm is a shared library with a runtime of its own.
_HELM = """
import json, sys
import helm_python as helm
request = json.load(sys.stdin)
try:
    if request["lint"]:
        answer = helm.lint(request["chart"])
    else:
        with helm.Chart.load(request["chart"]) as chart:
            chart.validate_schema(request["values"])
            answer = chart.render(request["values"], name="redisgate", namespace="redisgate")
except helm.HelmError as error:
    answer = {"failed": str(error)}
json.dump(answer, sys.stdout)
"""

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "baseDomain": "redis.example.com",
        "publicUrl": "https://redis.example.com",
        "secret": {"existingSecret": "redisgate-secrets"},
        "controlPlane": {"enabled": True},
        "env": {"REDISGATE_LOG_FORMAT": "json", "REDISGATE_MAX_CONNECTIONS": 1000},
        "image": {"digest": "sha256:" + "0" * 64},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "host": "redis.example.com",
            "tls": {"enabled": True, "secretName": "wildcard"},
        },
        "gateway": {
            "autoscaling": {"targetRequestsInFlight": 200},
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tls": {"secretName": "gateway-tls"},
        },
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        },
        "networkPolicy": {"ingressFrom": [{"podSelector": {"matchLabels": {"app": "ingress"}}}]},
        "operator": {"extraArgs": ["--no-open-networks"], "watchNamespace": "tenants"},
    },
    "gateway only": {
        "provisioner": "external",
        "operator": {"enabled": False},
        "migrations": {"job": False},
        "metrics": {"enabled": False},
        "crds": {"install": False},
        "gateway": {"autoscaling": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
        "networkPolicy": {"enabled": False},
    },
}


def helm(*, lint: bool = False, values: dict[str, Any] | None = None) -> dict[str, Any]:
    request = {"chart": str(CHART), "lint": lint, "values": values or {}}
    done = subprocess.run(
        [sys.executable, "-c", _HELM], input=json.dumps(request), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What the chart makes of the values."""
    rendered = helm(values=values)
    assert "failed" not in rendered, rendered["failed"]
    documents = [
        document
        for name, text in rendered.items()
        if not name.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
    ]
    return [document for document in documents if document]


def find(made: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(one for one in made if one["kind"] == kind and one["metadata"]["name"] == name)


def test_helm_has_nothing_to_say_against_it() -> None:
    found = helm(lint=True)
    assert found["errors"] == []
    # 2 is a warning, 3 an error; the only remark is that the chart has no icon
    assert [message for message in found["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
def test_what_it_makes_is_valid(values: dict[str, Any]) -> None:
    made = objects(values)
    assert {"Deployment", "Service", "ServiceAccount"} <= {one["kind"] for one in made}
    for one in made:
        if one["apiVersion"].split("/")[0] in ("monitoring.coreos.com", "apiextensions.k8s.io", "redisgate.io"):
            continue  # not the API's own
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gateway": {"replicaCount": 3}}, "replicaCount"),
        ({"gateway": {"replicas": 0}}, "replicas"),
        ({"publicUrl": "redis.example.com"}, "publicUrl"),
        ({"provisioner": "docker"}, "provisioner"),
        ({"env": {"log-level": "debug"}}, "log-level"),
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"secret": {"create": False}}, "secret.existingSecret"),
        ({"secret": {"databaseUrl": "postgresql://db/redisgate"}}, "controlPlane.enabled"),
        ({"controlPlane": {"enabled": True}}, "secret.databaseUrl"),
        ({"controlPlane": {"enabled": True}, "secret": {"existingSecret": "one", "optional": True}}, "secret.optional"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    assert said in helm(values=values)["failed"]


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
def test_pods_are_what_the_strictest_clusters_take(values: dict[str, Any]) -> None:
    """The restricted Pod Security Standard, a root file system that nobody writes, and bounds on memory."""
    pods = [one["spec"]["template"]["spec"] for one in objects(values) if one["kind"] in ("Deployment", "Job")]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


def test_every_variable_is_a_setting_that_there_is() -> None:
    known = (ROOT / "docs" / "configuration.md").read_text()
    for values in SETTINGS.values():
        for one in objects(values):
            if one["kind"] not in ("Deployment", "Job"):
                continue
            for container in one["spec"]["template"]["spec"]["containers"]:
                for variable in container.get("env", ()):
                    assert f"`{variable['name']}`" in known, variable


def test_the_gateway_has_time_to_drain() -> None:
    from redisgate.config import Limits

    pod = find(objects({}), "Deployment", "redisgate-gateway")["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + Limits().drain_timeout


def test_the_ingress_has_the_dashboards_name_and_every_instances() -> None:
    made = find(objects(SETTINGS["everything"]), "Ingress", "redisgate")
    hosts = [rule["host"] for rule in made["spec"]["rules"]]
    assert hosts == ["redis.example.com", "*.redis.example.com"]
    assert made["spec"]["tls"] == [{"hosts": hosts, "secretName": "wildcard"}]


def test_ingress_nginx_neither_repeats_nor_keeps_back_what_passes() -> None:
    prefix = "nginx.ingress.kubernetes.io/"
    own = {"ingress": {"enabled": True, "host": "redis.example.com", "annotations": {"cert-manager.io/issuer": "ours"}}}
    annotations = find(objects(own), "Ingress", "redisgate")["metadata"]["annotations"]
    for name in ("proxy-next-upstream", "proxy-buffering", "proxy-request-buffering"):
        assert annotations[prefix + name] == "off"
    assert annotations[prefix + "proxy-body-size"] == "0"
    assert annotations[prefix + "backend-protocol"] == "HTTP"
    assert annotations["cert-manager.io/issuer"] == "ours"
    own["ingress"]["annotations"] = {prefix + "backend-protocol": "GRPC"}
    annotations = find(objects(own), "Ingress", "redisgate")["metadata"]["annotations"]
    assert annotations[prefix + "backend-protocol"] == "GRPC"


def test_a_gateway_that_speaks_tls_is_spoken_to_by_tls() -> None:
    made = objects(SETTINGS["everything"])
    pod = find(made, "Deployment", "redisgate-gateway")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environ = {one["name"]: one.get("value") for one in container["env"]}
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "tls"]
    for variable, file in (("REDISGATE_TLS_CERT_FILE", "tls.crt"), ("REDISGATE_TLS_KEY_FILE", "tls.key")):
        assert environ[variable] == f"{mount['mountPath']}/{file}"
    assert {"name": "tls", "secret": {"secretName": "gateway-tls", "defaultMode": 0o440}} in pod["volumes"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    ingress = find(made, "Ingress", "redisgate")["metadata"]["annotations"]
    assert ingress["nginx.ingress.kubernetes.io/backend-protocol"] == "HTTPS"
    assert find(made, "Service", "redisgate-gateway")["spec"]["ports"][0]["appProtocol"] == "https"


def test_prometheus_finds_the_job_and_the_alerts_that_ask_for_it() -> None:
    """The alerts are those whose firing is tested, by promtool."""
    made = objects(SETTINGS["everything"])
    tested = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    assert find(made, "PrometheusRule", "redisgate")["spec"] == yaml.safe_load(tested), "make manifests"
    jobs = set(re.findall(r'job="(\w+)"', tested))
    assert len(jobs) == 1
    (endpoint,) = find(made, "ServiceMonitor", "redisgate")["spec"]["endpoints"]
    assert {"action": "replace", "targetLabel": "job", "replacement": jobs.pop()} in endpoint["relabelings"]
    assert "PrometheusRule" not in {one["kind"] for one in objects({})}


def test_no_secret_is_in_the_pods() -> None:
    made = objects(
        {
            "controlPlane": {"enabled": True},
            "secret": {"databaseUrl": "postgresql://redisgate:topsecret@db/redisgate"},
        }
    )
    assert "Job" in {one["kind"] for one in made}
    for one in made:
        if one["kind"] != "Secret":
            assert "topsecret" not in json.dumps(one)


RULES = ROOT / "deploy" / "rbac"


@pytest.mark.parametrize("component", ["gateway", "control-plane", "operator"])
def test_the_charts_rights_are_those_that_components_are_tested_with(component: str) -> None:
    made = objects(SETTINGS["everything"])
    for tested in yaml.safe_load_all((RULES / f"{component}.yaml").read_text()):
        if tested["kind"] not in ("Role", "ClusterRole"):
            continue
        name = f"redisgate-{component}" if tested["kind"] == "Role" else f"redisgate-redisgate-{component}"
        assert find(made, tested["kind"], name)["rules"] == tested["rules"]
        binding = find(made, f"{tested['kind']}Binding", name)
        account = "redisgate-operator" if component == "operator" else "redisgate-gateway"
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "redisgate"}]
        assert binding["roleRef"]["name"] == name


def test_the_charts_policies_are_those_that_components_are_tested_with() -> None:
    made, account = objects(SETTINGS["everything"]), "system:serviceaccount:redisgate:redisgate-"
    policy, binding = (
        each
        for each in yaml.safe_load_all((RULES / "control-plane.yaml").read_text())
        if each["kind"].startswith("ValidatingAdmission")
    )
    name = "redisgate-redisgate-control-plane"
    # In the chart the control plane is a part of the gateway.
    expected = json.loads(json.dumps(policy["spec"]).replace(f"{account}control-plane", f"{account}gateway"))
    assert expected != policy["spec"]
    assert find(made, policy["kind"], name)["spec"] == expected
    assert find(made, binding["kind"], name)["spec"] == binding["spec"] | {"policyName": name}


@pytest.mark.parametrize("values", [{}, SETTINGS["gateway only"]], ids=["defaults", "gateway only"])
def test_a_gateway_without_a_control_plane_may_not_do_what_one_may(values: dict[str, Any]) -> None:
    """It listens to the internet; rights that it has no use for would be an attacker's."""
    made = objects(values)
    assert not [one for one in made if one["metadata"]["name"].endswith("-control-plane")]
    mine = [one["roleRef"]["name"] for one in made if one.get("subjects", [{}])[0].get("name") == "redisgate-gateway"]
    granted = [rule for one in made if one["metadata"]["name"] in mine for rule in one.get("rules", ())]
    assert all("create" not in rule["verbs"] or rule["resources"] == ["leases"] for rule in granted)
    environ = find(made, "Deployment", "redisgate-gateway")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert not [variable["name"] for variable in environ if "DATABASE" in variable["name"]]


def test_what_the_operator_lets_in_is_the_gateway() -> None:
    """Network policies and ingresses of instances name the gateway's pods and Service."""
    from control.kubernetes.plan import OperatorSettings

    made = objects({"ingress": {"className": "nginx"}})
    labels = find(made, "Deployment", "redisgate-gateway")["spec"]["template"]["metadata"]["labels"]
    assert OperatorSettings().gateway_labels.items() <= labels.items()
    service = find(made, "Service", OperatorSettings().gateway_service)
    assert service["spec"]["ports"][0]["port"] == OperatorSettings().gateway_port
    arguments = find(made, "Deployment", "redisgate-operator")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--gateway-service={service['metadata']['name']}" in arguments


def test_the_operators_arguments_are_understood() -> None:
    for values in SETTINGS.values():
        for one in objects(values):
            if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("-operator"):
                arguments = one["spec"]["template"]["spec"]["containers"][0]["args"][1:]
                done = subprocess.run(
                    [sys.executable, "-m", "redisgate", *arguments, "--help"],
                    capture_output=True,
                    text=True,
                    timeout=30,
                )
                assert done.returncode == 0, done.stderr
                for argument in arguments[1:]:
                    assert argument.partition("=")[0] in done.stdout, argument


def test_the_definition_of_instances_is_the_packages_and_stays_when_the_release_goes() -> None:
    for source in (ROOT / "control" / "kubernetes" / "crd").glob("*.yaml"):
        assert (CHART / "files" / source.name).read_text() == source.read_text(), "make manifests"
    definition = find(objects({}), "CustomResourceDefinition", "redishttpinstances.redisgate.io")
    assert definition["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


MANIFESTS = ROOT / "deploy" / "manifests.py"


def manifests(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(MANIFESTS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_plain_manifests_are_what_the_chart_makes(tmp_path: Path) -> None:
    done = manifests(tmp_path / "k8s")
    assert done.returncode == 0, done.stderr
    made = {file.name: file.read_text() for file in (tmp_path / "k8s").iterdir()}
    assert made == {file.name: file.read_text() for file in (ROOT / "k8s").iterdir()}, "make manifests"
    assert "randAlphaNum" not in str(made)
    assert "control-plane" not in str(made)
    kinds = [document["kind"] for text in made.values() for document in yaml.safe_load_all(text) if document]
    assert "Secret" not in kinds
    assert kinds.count("Deployment") == 2


def test_plain_manifests_with_an_image_and_a_control_plane_replace_those_of_before(tmp_path: Path) -> None:
    assert manifests(tmp_path / "k8s").returncode == 0
    done = manifests(tmp_path / "k8s", "--image", "127.0.0.1:5000/me/redisgate:0.1.0", "--control-plane")
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "k8s").iterdir()
    made = [one for file in files for one in yaml.safe_load_all(file.read_text()) if one]
    images = [one["spec"]["template"]["spec"]["containers"][0]["image"] for one in made if one["kind"] == "Deployment"]
    assert images == ["127.0.0.1:5000/me/redisgate:0.1.0"] * 2
    assert find(made, "ClusterRoleBinding", "redisgate-redisgate-control-plane")


def test_plain_manifests_take_nothing_away_that_they_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: Secret\n")
    (tmp_path / "00-namespace.yaml").write_text((ROOT / "k8s" / "00-namespace.yaml").read_text())
    done = manifests(tmp_path)
    assert done.returncode == 1
    assert "mine.yaml" in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00-namespace.yaml", "mine.yaml"]
    assert manifests(tmp_path, "--no-such").returncode == 2
