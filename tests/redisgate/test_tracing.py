"""Traces, as a collector gets them: a receiver that speaks OTLP over HTTP, and the spans that reach it."""

import itertools
import time
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from redisgate import tracing
from redisgate.config import ConfigError, Settings
from tests.http import Client
from tests.observing import CLIENT, OPENMETRICS, SERVER, Collector, Scraped
from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
METRICS_PORT = free_port()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def traced(redis_server: RedisServer, collector: Collector) -> Iterator[Gateway]:
    """Traces what the client's traceparent says, and nothing else; has metrics."""
    arguments = ["--workers", "1", "--trace-endpoint", collector.url, "--trace-ratio", "0"]
    arguments += ["--metrics-port", str(METRICS_PORT)]
    gateway = Gateway(single_instance(redis_server), arguments)
    yield gateway
    gateway.stop()


def _fresh(number: int) -> tuple[str, str]:
    trace_id = f"{number:032x}"
    return trace_id, f"00-{trace_id}-{PARENT}-01"


def test_a_command_is_a_span_of_the_server_with_one_of_redis_below(traced: Gateway, collector: Collector) -> None:
    with Client(traced.port) as client:
        answer = client.get("/set/secret-key/secret-value?_token=token", traceparent=SAMPLED, X_Request_Id="mine")
        assert answer.result == "OK"
        assert answer.headers["traceparent"] == SAMPLED
    wait_for(lambda: len(collector.of(TRACE)) == 2, what="the spans")
    server, redis = sorted(collector.of(TRACE), key=lambda span: span.kind)
    assert (server.name, server.kind, server.parent) == ("GET SET", SERVER, PARENT)
    assert (redis.name, redis.kind, redis.parent) == ("SET", CLIENT, server.span_id)
    assert 0 < redis.nanos <= server.nanos
    assert not server.failed
    expected = {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "url.path": "/set/…?…",
        "redisgate.instance": "default",
        "redisgate.request_id": "mine",
    }
    assert {name: server.attributes[name] for name in expected} == expected
    assert redis.attributes["db.system.name"] == "redis"
    assert redis.attributes["db.operation.name"] == "SET"
    assert redis.attributes["db.namespace"] == "0"
    assert server.resource["service.name"] == "redisgate"
    assert "secret" not in repr(collector.of(TRACE))
    assert "token" not in repr(collector.of(TRACE))


def test_pipelines_transactions_and_failures(traced: Gateway, collector: Collector) -> None:
    with Client(traced.port) as client:
        pipeline, header = _fresh(2)
        client.post("/pipeline", [["GET", "a"], ["GET", "b"]], traceparent=header)
        transaction, header = _fresh(3)
        client.post("/multi-exec", [["SET", "a", "1"]], traceparent=header)
        wrong, header = _fresh(4)
        assert client.get("/hget/a/b", traceparent=header).status == 400
        refused, header = _fresh(5)
        assert client.get("/monitor/x", traceparent=header).status == 400
    wait_for(lambda: collector.of(refused), what="the last span")
    names = {trace: sorted(span.name for span in collector.of(trace)) for trace in (pipeline, transaction, refused)}
    assert names[pipeline] == ["PIPELINE", "POST PIPELINE"]
    assert names[transaction] == ["MULTI", "POST MULTI"]
    assert len(names[refused]) == 1
    (batch,) = [span for span in collector.of(pipeline) if span.kind == CLIENT]
    assert batch.attributes["db.operation.batch.size"] == 2
    server, redis = sorted(collector.of(wrong), key=lambda span: span.kind)
    assert redis.failed
    assert redis.attributes["error.type"] == "400"
    assert not server.failed  # it was the client's mistake


def test_requests_that_a_client_pipelines_keep_their_own_traces(traced: Gateway, collector: Collector) -> None:
    with Client(traced.port) as client:
        for number in range(10, 20):
            client.send("GET", "/ping", headers={"traceparent": _fresh(number)[1]})
        assert [client.read().status for _ in range(10)] == [200] * 10
    wait_for(lambda: all(len(collector.of(_fresh(n)[0])) == 2 for n in range(10, 20)), what="the spans of all")


def test_what_the_client_does_not_want_traced_is_not(traced: Gateway, collector: Collector) -> None:
    trace_id, header = _fresh(30)
    with Client(traced.port) as client:
        assert "traceparent" not in client.get("/ping").headers
        client.get("/ping", traceparent=header[:-2] + "00")
        last, header = _fresh(31)
        client.get("/ping", traceparent=header)
    wait_for(lambda: collector.of(last), what="a later span")
    assert not collector.of(trace_id)


def test_nobody_without_a_credential_has_requests_traced(traced: Gateway, collector: Collector) -> None:
    refused = [_fresh(number) for number in range(40, 43)]
    with Client(traced.port, token="wrong") as client:
        assert client.get("/ping", traceparent=refused[0][1]).status == 401
        assert client.get("/health", traceparent=refused[1][1]).status == 200
    with Client(traced.port, token=None) as client:
        assert client.get("/ping?_token=wrong", traceparent=refused[2][1]).status == 401
        last, header = _fresh(43)
        assert client.get("/ping?_token=token", traceparent=header).status == 200
    wait_for(lambda: collector.of(last), what="the span of who may")
    assert [collector.of(trace_id) for trace_id, _ in refused] == [[]] * 3


def test_a_trusted_proxy_has_requests_traced(redis_server: RedisServer, collector: Collector) -> None:
    arguments = ["--workers", "1", "--trace-endpoint", collector.url, "--trace-ratio", "0"]
    gateway = Gateway(single_instance(redis_server, REDISGATE_TRUSTED_PROXIES="127.0.0.0/8"), arguments)
    try:
        trace_id, header = _fresh(50)
        with Client(gateway.port, token="wrong") as client:
            assert client.get("/ping", traceparent=header).status == 401
        wait_for(lambda: collector.of(trace_id), what="the span")
    finally:
        gateway.stop()


def test_clients_have_so_many_requests_traced_in_a_second_and_no_more(traced: Gateway, collector: Collector) -> None:
    rounds = 3 * tracing.MAX_WANTED_TRACES
    began = time.monotonic()
    with Client(traced.port) as client:
        for number in range(1000, 1000 + rounds):
            client.send("GET", "/ping", headers={"traceparent": _fresh(number)[1]})
        assert [client.read().status for _ in range(rounds)] == [200] * rounds
        seconds = int(time.monotonic() - began) + 2  # that the requests may have touched
        _wait_for_the_next_second(client, collector)
    found = sum(bool(collector.of(_fresh(number)[0])) for number in range(1000, 1000 + rounds))
    assert 0 < found <= seconds * tracing.MAX_WANTED_TRACES
    if seconds == 2:
        assert found < rounds


def _wait_for_the_next_second(client: Client, collector: Collector) -> None:
    """Until a request is traced again: all spans before it have left by then."""
    numbers = itertools.count(10_000)

    def traced_again() -> bool:
        trace_id, header = _fresh(next(numbers))
        client.get("/ping", traceparent=header)
        return any(collector.of(_fresh(number)[0]) for number in range(10_000, int(trace_id, 16)))

    wait_for(traced_again, what="a span of the next second")


def test_an_exemplar_names_a_trace_that_there_is(traced: Gateway, collector: Collector) -> None:
    shown = Scraped(METRICS_PORT)
    with Client(traced.port) as client:
        trace_id, header = _fresh(60)

        def named() -> bool:
            client.get("/get/exemplar", traceparent=header)
            return trace_id in shown.get("/metrics", OPENMETRICS)[0]

        wait_for(named, what="the exemplar")
    families = {family.name: family for family in text_string_to_metric_families(shown.get("/metrics", OPENMETRICS)[0])}
    samples = families["redisgate_command_duration_seconds"].samples
    assert {"trace_id": trace_id} in [sample.exemplar.labels for sample in samples if sample.exemplar is not None]
    wait_for(lambda: collector.of(trace_id), what="its spans")


def test_a_trace_that_begins_here_is_told_to_the_client(redis_server: RedisServer, collector: Collector) -> None:
    arguments = ["--workers", "1", "--trace-endpoint", collector.url, "--trace-ratio", "1"]
    gateway = Gateway(single_instance(redis_server), arguments)
    try:
        with Client(gateway.port) as client:
            header = client.get("/get/a").headers["traceparent"]
        _, trace_id, span_id, flags = header.split("-")
        assert flags == "01"
    finally:
        gateway.stop()  # and what waits is exported before it ends
    server = next(span for span in collector.of(trace_id) if span.kind == SERVER)
    assert (server.span_id, server.parent) == (span_id, "")


def test_a_collector_that_is_away_costs_no_answer(redis_server: RedisServer) -> None:
    arguments = ["--workers", "1", "--trace-endpoint", "http://127.0.0.1:9", "--trace-ratio", "1"]
    gateway = Gateway(single_instance(redis_server), arguments)
    try:
        with Client(gateway.port, timeout=5) as client:
            assert all(client.get("/ping").status == 200 for _ in range(100))
    finally:
        gateway.kill()


def test_without_the_library_the_gateway_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.check(Settings(trace_endpoint="http://127.0.0.1:4318"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tracing.check(Settings())
    with pytest.raises(ConfigError, match=r"pip install redisgate\[tracing\]"):
        tracing.check(Settings(trace_endpoint="http://127.0.0.1:4318"))
