"""What the control plane shows of itself: metrics, traces, the administrators' view, the log level."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.control.conftest import Service, Urls
from tests.control.service import Api, execute, register
from tests.http import Client
from tests.observing import CLIENT, SERVER, Collector, Scraped, Span
from tests.servers import RedisServer, free_port, wait_for

TRACE = "5af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def metrics() -> Scraped:
    return Scraped(free_port())


@pytest.fixture(scope="module")
def service(
    database_urls: Urls, tmp_path_factory: pytest.TempPathFactory, collector: Collector, metrics: Scraped
) -> Iterator[Service]:
    state = tmp_path_factory.mktemp("service")
    environ = {
        "REDISGATE_METRICS_PORT": str(metrics.metrics_port),
        "REDISGATE_TRACE_ENDPOINT": collector.url,
        "REDISGATE_TRACE_RATIO": "0",
        "REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8",
        "REDISGATE_TRUSTED_PROXIES": "127.0.0.0/8",  # who may want a trace
    }
    service = Service(database_urls, state, "--workers", "1", **environ)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def person(service: Service) -> Api:
    return register(service.port, "observer")


@pytest.fixture(scope="module")
def administrator(service: Service, database_urls: Urls) -> Api:
    found = register(service.port, "administrator")
    execute(database_urls.superuser, "UPDATE users SET is_admin = true WHERE email = $1", found.email)
    return found


def test_requests_to_the_control_plane_are_counted_by_route(metrics: Scraped, person: Api) -> None:
    gained = metrics.gains()
    person.call("GET", "/api/organizations")
    person.call("GET", f"/api/organizations/{'0' * 8}-0000-0000-0000-{'0' * 12}", status=404)
    name = "redisgate_control_requests_total"
    by_template = {"path": "/api/organizations/{org_id}", "method": "GET", "status": "404"}
    wait_for(lambda: gained(name, **by_template) == 1, what="the count")
    assert gained(name, path="/api/organizations", status="200") == 1
    assert gained("redisgate_http_requests_total", route="control", status="404") == 1
    assert gained("redisgate_control_request_seconds_total", path="/api/organizations") > 0


def test_pages_are_counted_by_route_as_the_api_is(metrics: Scraped, service: Service) -> None:
    gained = metrics.gains()
    with Client(service.port) as client:
        for _ in range(2):
            assert client.get("/login").status == 200
        assert client.request("DELETE", "/login").status == 405
        assert client.get("/static/0/app.css").status == 200
        assert client.get("/dashboard/x/y/z", Accept="text/html").status == 404
        assert client.get("/api/nothing").status == 404
    name = "redisgate_control_requests_total"
    wait_for(lambda: gained(name, path="none", method="GET", status="404") == 2, what="the counts")
    assert gained(name, path="/login", method="GET", status="200") == 2
    assert gained(name, path="/login", method="DELETE", status="405") == 1
    assert gained(name, path="/static/{version}/{path:path}", status="200") == 1
    assert gained("redisgate_control_request_seconds_total", path="/login") > 0


def test_the_trace_of_a_page_has_its_route(collector: Collector, service: Service) -> None:
    trace = TRACE[::-1]
    with Client(service.port) as client:
        assert client.get("/login", traceparent=f"00-{trace}-b7ad6b7169203331-01").status == 200
    wait_for(lambda: any(span.kind == SERVER for span in collector.of(trace)), what="the span")
    (server,) = [span for span in collector.of(trace) if span.kind == SERVER]
    assert server.name == "GET /login"
    assert server.attributes["http.route"] == "/login"


def test_the_access_table_and_the_commands_of_tenants(
    metrics: Scraped, person: Api, redis_server: RedisServer, service: Service
) -> None:
    instance = person.instance("watched", redis_server.url)
    key, _ = person.key(scopes=["read", "write"])
    gained = metrics.gains()
    with Client(service.port, key) as client:
        for _ in range(5):
            assert client.get(f"/redis/{instance['id']}/get/a").status == 200
    labels = {"instance_id": instance["id"]}
    wait_for(lambda: metrics.value("redisgate_instance_requests_total", **labels) == 5, what="the requests")
    assert gained("redisgate_access_misses_total") == 1
    assert gained("redisgate_access_hits_total") == 4
    with Client(service.port, key) as client:
        for number in range(10):
            assert client.get(f"/redis/no-such-{number}/get/a").status >= 400
    wait_for(lambda: gained("redisgate_access_misses_total") == 11, what="names that nobody knows")
    assert gained("redisgate_access_hits_total") == 4
    assert metrics.value("redisgate_access_credentials") >= 1
    wait_for(lambda: metrics.value("redisgate_access_listening") == 1, what="notifications")
    assert metrics.value("redisgate_access_table_age_seconds") < 5
    names = {
        dict(has)["instance_name"] for name, has in metrics.samples() if name == "redisgate_instance_requests_total"
    }
    assert any(name.startswith("watched") for name in names)


def test_provisioning_is_told_by_the_steward(metrics: Scraped, person: Api) -> None:
    gained = metrics.gains()
    made = person.call("POST", "redis-instances", {"name": "local", "slug": "local", "max_memory": 8 << 20})
    assert made["status"] == "running", made
    step = "redisgate_provisioning_steps_total"
    wait_for(lambda: gained(step, provisioner="local", step="create", outcome="done") == 1, what="the step")
    assert metrics.value("redisgate_provisioning_step_duration_seconds_count", step="create") >= 1
    assert metrics.value("redisgate_steward_leads") == 1
    wait_for(lambda: metrics.value("redisgate_instances", status="running") >= 1, 30, what="the count of instances")


def test_a_step_of_the_steward_is_a_span_with_its_statements(collector: Collector, person: Api) -> None:
    made = person.call("POST", "redis-instances", {"name": "traced", "slug": "traced", "max_memory": 8 << 20})

    def steps() -> list[Span]:
        return [span for span in collector.spans if span.attributes.get("redisgate.instance") == made["id"]]

    wait_for(lambda: any(span.name == "create" for span in steps()), what="the step")
    (create,) = [span for span in steps() if span.name == "create"]
    assert create.attributes["redisgate.provisioner"] == "local"
    assert create.resource["redisgate.process"] == "steward"
    assert not create.failed
    below = [span for span in collector.of(create.trace_id) if span.parent == create.span_id]
    assert {span.attributes["db.system.name"] for span in below} == {"postgresql"}


def test_a_request_to_the_control_plane_has_spans_of_its_statements(
    collector: Collector, person: Api, service: Service
) -> None:
    with Client(service.port, person.token) as client:
        assert client.get("/api/organizations", traceparent=TRACEPARENT, X_Request_Id="seen").status == 200
    wait_for(lambda: any(span.kind == SERVER for span in collector.of(TRACE)), what="the spans")
    (server,) = [span for span in collector.of(TRACE) if span.kind == SERVER]
    statements = [span for span in collector.of(TRACE) if span.kind == CLIENT]
    assert server.name == "GET /api/organizations"
    assert server.attributes["http.route"] == "/api/organizations"
    assert len(statements) >= 2
    assert {span.attributes["db.system.name"] for span in statements} == {"postgresql"}
    assert {span.parent for span in statements} == {server.span_id}
    assert any("FROM sessions" in span.attributes["db.query.text"] for span in statements)
    assert person.email not in repr(statements)


def test_an_administrator_sees_what_the_gateway_does(administrator: Api, person: Api) -> None:
    person.call("GET", "/api/admin/metrics", status=403)

    def now() -> dict[str, Any]:
        found: dict[str, Any] = administrator.call("GET", "/api/admin/metrics")
        return found

    wait_for(lambda: now()["window_seconds"] > 0, what="rates")
    status = now()
    assert [worker["worker"] for worker in status["workers"]] == ["0"]
    assert {process["worker"] for process in status["processes"]} == {"steward", "metrics"}
    assert status["workers"][0]["memory_bytes"] > 1 << 20
    assert "requests_per_second" in status["totals"]


def test_an_administrator_changes_the_log_level_of_all_processes(administrator: Api, service: Service) -> None:
    assert administrator.call("GET", "/api/admin/log-level") == {"level": "configured"}
    administrator.call("PUT", "/api/admin/log-level", {"level": "nonsense"}, status=400)
    told = re.compile(r" debug \[\d+ (worker 0|steward|metrics)\] the log level is debug$", re.MULTILINE)
    assert not told.findall(service.log())
    administrator.call("PUT", "/api/admin/log-level", {"level": "debug"})
    assert administrator.call("GET", "/api/admin/log-level") == {"level": "debug"}
    processes = {"worker 0", "steward", "metrics"}
    wait_for(lambda: set(told.findall(service.log())) == processes, what="every process to say so")
    administrator.call("PUT", "/api/admin/log-level", {"level": "configured"})
    assert administrator.call("GET", "/api/admin/log-level") == {"level": "configured"}
    events = administrator.call("GET", "/api/audit-logs?action=log_level.set")["items"]
    assert len(events) == 2
