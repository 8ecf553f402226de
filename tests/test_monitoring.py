"""Alerts and dashboards: that alerts fire when they should, and that everything they name exists."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from redisgate.metrics import METRICS, series_name
from tests.http import Client
from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = (PROMETHEUS / "alerts.yml").read_text()
ALERTS = re.findall(r"- alert: (\w+)", RULES)

# What Prometheus makes of a metric.
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
KNOWN = {metric.name + suffix: metric for metric in METRICS for suffix in _SUFFIXES[metric.kind]}


def promtool(*arguments: str) -> str:
    program = shutil.which("promtool")
    assert program is not None, "promtool is not installed; Debian, Ubuntu: apt-get install prometheus"
    done = subprocess.run([program, *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_takes_the_configuration_and_the_alerts() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "alerts.yml")


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    for alert in ALERTS:
        quiet = tests.count(f"alertname: {alert}\n        exp_alerts: []")
        fires = tests.count(f"alertname: {alert}\n        exp_alerts:\n")
        assert (fires, quiet) == (1, 1), alert
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_section_in_the_runbooks(alert: str) -> None:
    page = (ROOT / "docs" / "runbooks.md").read_text()
    section = page.partition(f"\n## {alert}\n")[2].partition("\n## ")[0]
    assert "**Users notice**" in section
    rule = RULES.partition(f"- alert: {alert}\n")[2].partition("- alert:")[0]
    assert f"runbook: docs/runbooks.md#{alert.lower()}\n" in rule
    assert re.search(r"severity: (page|ticket)", rule)


def expressions(dashboard: Path) -> list[tuple[str, str]]:
    """Title and query of every panel, and of what a dashboard asks beside them."""
    document = json.loads(dashboard.read_text())
    found = [(panel["title"], target["expr"]) for panel in document["panels"] for target in panel.get("targets", [])]
    found += [(item["name"], item["expr"]) for item in document["annotations"]["list"]]
    found += [(item["name"], item["definition"]) for item in document["templating"]["list"] if "definition" in item]
    return found


def names_in(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics of an expression, each with the labels that its selector uses."""
    found = re.findall(r"\b(redisgate_\w+)(?:\{([^}]*)\})?", expression)
    return [(name, set(re.findall(r"(\w+)\s*[=!]~?", labels))) for name, labels in found]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_metric_and_label_that_a_dashboard_names_exists(dashboard: Path) -> None:
    for title, expression in expressions(dashboard):
        names = names_in(expression)
        assert names, f"{title} asks for nothing of ours: {expression}"
        for name, labels in names:
            assert name in KNOWN, f"{title}: there is no metric {name}"
            assert labels <= {*KNOWN[name].labels, "instance", "job", "le"}, f"{title}: {name} has no {labels}"


def test_every_metric_and_label_that_an_alert_names_exists() -> None:
    for name, labels in names_in("\n".join(line for line in RULES.splitlines() if "runbook" not in line)):
        assert name in KNOWN, name
        assert labels <= {*KNOWN[name].labels, "instance", "job", "le"}, name


def test_every_metric_is_on_a_dashboard_and_in_the_docs() -> None:
    shown = {
        name for dashboard in DASHBOARDS for _, expression in expressions(dashboard) for name, _ in names_in(expression)
    }
    page = (ROOT / "docs" / "observability.md").read_text()
    for metric in METRICS:
        assert {metric.name + suffix for suffix in _SUFFIXES[metric.kind]} & shown, f"no dashboard shows {metric.name}"
        assert f"| `{metric.name}` |" in page, f"{metric.name} is missing: python -m redisgate.metrics"


def test_the_expressions_of_the_dashboards_are_promql(tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = []
    for dashboard in DASHBOARDS:
        for _, expression in expressions(dashboard):
            if expression.startswith("label_values("):
                continue
            plain = expression.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$top", "10")
            rules.append({"record": f"panel:{len(rules)}", "expr": re.sub(r"\$\w+", "x", plain)})
    assert len(rules) > 60
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))  # JSON is YAML
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))


class Prometheus:
    """A real one, that scrapes one gateway every second."""

    def __init__(self, target: int, folder: Path) -> None:
        program = shutil.which("prometheus")
        assert program is not None, "prometheus is not installed; Debian, Ubuntu: apt-get install prometheus"
        config = (PROMETHEUS / "prometheus.yml").read_text()
        config = config.replace("interval: 15s", "interval: 1s").replace("gateway:9400", f"127.0.0.1:{target}")
        config = config.replace("alerts.yml", str(PROMETHEUS / "alerts.yml"))
        assert str(target) in config
        (folder / "prometheus.yml").write_text(config)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.process = subprocess.Popen(
            [
                *[program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"],
                *[f"--web.listen-address={self.url[7:]}", "--enable-feature=exemplar-storage", "--log.level=error"],
            ]
        )

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression)["result"])

    def ready(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(OSError):
            return bool(self.query("count_over_time(redisgate_build_info[1m]) >= 4"))
        return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()


def test_prometheus_reads_it_all_and_answers_what_the_dashboards_ask(redis_server: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    # Traces are begun, and dropped: nobody takes them.
    arguments = ["--workers", "1", "--trace-endpoint", "http://127.0.0.1:9", "--trace-ratio", "0"]
    gateway = Gateway(single_instance(redis_server, REDISGATE_METRICS_PORT=str(port)), arguments)
    prometheus = Prometheus(port, tmp_path)
    try:
        with Client(gateway.port) as client:

            def ready() -> bool:
                client.get("/get/a", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
                client.get("/hget/a")
                return prometheus.ready()

            wait_for(ready, 30, what="four scrapes")
        (up,) = prometheus.query('up{job="redisgate"}')
        assert up["value"][1] == "1"
        asked, shown = 0, 0
        for dashboard in DASHBOARDS:
            for _, expression in expressions(dashboard):
                if not expression.startswith("label_values("):
                    plain = expression.replace("$__rate_interval", "10s").replace("$__range", "1m")
                    plain = plain.replace("$top", "10").replace("$gateway", ".*").replace("$tenant", ".*")
                    asked, shown = asked + 1, shown + bool(prometheus.query(plain))
        # What a control plane, limits and failures would show is not there.
        assert shown >= asked * 0.6, f"{shown} of {asked}"
        exemplars = prometheus.ask(
            "query_exemplars", query="redisgate_command_duration_seconds_bucket", start="0", end="9999999999"
        )
        assert exemplars[0]["exemplars"][0]["labels"]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
        rules = prometheus.ask("rules")["groups"][0]["rules"]
        assert [rule["name"] for rule in rules] == ALERTS
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        assert not [rule["name"] for rule in rules if rule["state"] == "firing"]
    finally:
        prometheus.stop()
        gateway.stop()


def test_panels_have_a_place_of_their_own() -> None:
    for dashboard in DASHBOARDS:
        document = json.loads(dashboard.read_text())
        taken: dict[tuple[int, int], str] = {}
        for panel in document["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert taken.setdefault((x, y), panel["title"]) is panel["title"], (dashboard.stem, panel["title"])
                    assert x < 24
        assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


def test_a_label_that_a_metric_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="has the labels"):
        series_name("redisgate_workers", {"who": "x"})
