"""What is asked of RedisGate, and whether a run's results give it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Results = Mapping[str, Mapping[str, Mapping[str, float]]]

GET_64 = "GET, 64 connections"
FORMS = "forms of a request, RedisGate, 64 connections"
OWN_HALF = "GET at half of the server's own saturation"
MANY = "single GET, 64 connections"


@dataclass(frozen=True)
class Bar:
    """`measure` of the results is to be at most, or at least, `bound`."""

    question: str
    asked: str
    bound: float
    measure: Callable[[Results], float]
    at_least: bool = False

    def value(self, results: Results) -> float | None:
        """What was measured; None if the run did not ask this."""
        try:
            return self.measure(results)
        except KeyError:
            return None

    def holds(self, value: float) -> bool:
        """Whether it is enough."""
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(question: str, figure: str, above: str, below: str) -> Callable[[Results], float]:
    return lambda results: results[question][above][figure] / results[question][below][figure]


def _figure(question: str, case: str, figure: str, unit: float = 1.0) -> Callable[[Results], float]:
    return lambda results: results[question][case][figure] / unit


def _most_and_fewest(results: Results) -> float:
    cases = results[MANY]
    return cases["100,000 tokens, 1,000 instances"]["cpu"] / cases["1 tokens, 1 instances"]["cpu"]


BARS = (
    Bar("single GET, CPU per request", "≤ 1.5 × the floor", 1.5, _ratio(GET_64, "cpu", "RedisGate", "floor")),
    Bar("", "≤ 0.55 × webdis", 0.55, _ratio(GET_64, "cpu", "RedisGate", "webdis")),
    Bar("single GET, requests/s", "≥ 1.8 × webdis", 1.8, _ratio(GET_64, "rate", "RedisGate", "webdis"), True),
    Bar("", "≥ 1.8 × nginx+Lua", 1.8, _ratio(GET_64, "rate", "RedisGate", "nginx+Lua"), True),
    Bar("", "≥ 12 × FastAPI", 12, _ratio(GET_64, "rate", "RedisGate", "FastAPI"), True),
    Bar("JSON body, requests/s", "≥ 0.95 × path", 0.95, _ratio(FORMS, "rate", "GET, JSON body", "GET, path"), True),
    Bar("a dozen headers, CPU", "≤ 1.05 × two", 1.05, _ratio(FORMS, "cpu", "GET, path, a dozen headers", "GET, path")),
    Bar("one connection, p50", "≤ 1.15 × webdis", 1.15, _ratio("GET, 1 connections", "p50", "RedisGate", "webdis")),
    Bar("half load, p99", "≤ webdis", 1.0, _ratio(OWN_HALF, "p99", "RedisGate", "webdis")),
    Bar(
        "/pipeline of 100, commands per CPU second",
        "≥ 3 × redis-py",
        3,
        _ratio("pipeline of 100 GETs", "commands_per_cpu_second", "RedisGate, /pipeline", "redis-py over TCP"),
        True,
    ),
    Bar(
        "100 KiB as RESP2, requests/s",
        "≥ 10 × webdis's JSON",
        10,
        _ratio("a value of 100 KiB", "rate", "RedisGate, RESP2", "webdis, JSON"),
        True,
    ),
    Bar(
        "",
        "≥ 0.4 × nginx, a file",
        0.4,
        _ratio("a value of 100 KiB", "rate", "RedisGate, RESP2", "nginx, a file of that size"),
        True,
    ),
    Bar(
        "10 MiB as RESP2, memory per reader",
        "< 4 MiB",
        4,
        _figure("memory of a reader of 10 MiB that does not read, RESP2", "RedisGate", "bytes_each", 1 << 20),
    ),
    Bar(
        "idle keep-alive connection",
        "≤ 6 KiB",
        6,
        _figure("resident bytes of 10,000 idle keep-alive connections", "RedisGate", "bytes_each", 1024),
    ),
    Bar("100,000 tokens, 1,000 instances, CPU", "≤ 1.05 × one of each", 1.05, _most_and_fewest),
    Bar(
        "connections of idle instances",
        "0",
        0,
        _figure("connections of 1,000 instances, idle time 2 s", "after the idle time", "redis_connections"),
    ),
    Bar(
        "5,000 subscribers, last delivery",
        "≤ 150 ms",
        150,
        _figure("from PUBLISH to the last delivery", "5,000 subscribers", "milliseconds"),
    ),
    Bar(
        "5,000 subscribers, Redis connections per worker",
        "1",
        1,
        _figure("from PUBLISH to the last delivery", "5,000 subscribers", "redis_connections"),
    ),
    Bar(
        "start to first answer",
        "≤ 500 ms",
        500,
        _figure("from `redisgate serve --workers 1` to its first answer", "RedisGate", "milliseconds"),
    ),
)


def rows(results: Results) -> list[list[str]]:
    """Question, bar, what was measured, and whether it holds, for every bar that the run asked about."""
    lines = []
    question = ""
    for bar in BARS:
        question = bar.question or question
        value = bar.value(results)
        if value is not None:
            lines.append([question, bar.asked, f"{value:,.2f}", "holds" if bar.holds(value) else "MISSED"])
    return lines
