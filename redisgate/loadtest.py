"""`redisgate loadtest URL`: a polite load on a deployment, with percentiles.

Polite: rate, time and connections are bounded; it begins with one request, and ends by itself when the deployment has
had enough. Requests are sent when they are due, not when the last one was answered, and their latency counts from when
they were due: a deployment that stalls cannot hide it by slowing the test down.
"""

import asyncio
import contextlib
import json
import math
import os
import secrets
import signal
import ssl
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO
from urllib.parse import urlsplit

import httptools

from redisgate.config import ConfigError, count, duration, size
from redisgate.units import bytes_text

MAX_RATE: Final = 5000
"""Requests per second."""
MAX_SECONDS: Final = 600.0
MAX_CONNECTIONS: Final = 256
MAX_VALUE_BYTES: Final = 1024 * 1024
REQUEST_SECONDS: Final = 10.0
"""For one request; then it has failed."""
KEYS: Final = 1000
"""That are written and read; they are removed at the end, and expire if that fails."""
KEY_SECONDS: Final = 60
"""They live on after the test."""
REMOVED_AT_ONCE: Final = 100
"""Keys in one UNLINK."""
ENOUGH_PART: Final = 0.1
"""Of the requests of a second: when more of them fail, the test ends."""
ENOUGH_REQUESTS: Final = 20
"""In a second, before failures among them are judged."""
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)

_READ_BYTES = 64 * 1024


class RequestFailed(Exception):
    """A request was not answered by 200; the text names the reason in a few words, the same for all of its kind."""


@dataclass(frozen=True)
class Plan:
    """What is asked for; times in seconds."""

    url: str
    token: str = field(repr=False)
    rate: int = 100
    seconds: float = 10.0
    connections: int = 8
    mix: str = "mixed"
    value_bytes: int = 64
    ca_file: str | None = None

    @property
    def description(self) -> str:
        what = {"ping": "PING", "read": "GET", "mixed": f"GET, and each fourth a SET of {self.value_bytes} bytes"}
        return (
            f"{self.rate} requests/s for {self.seconds:g} s over {self.connections} connections to {self.url}:"
            f" {what[self.mix]}"
        )


@dataclass
class Result:
    """What came of it; latencies in seconds."""

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    stopped: str = ""
    """Why it ended early; empty: it did not."""
    left_behind: int = 0
    """Keys that could not be removed, and expire."""

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def requests(self) -> int:
        return len(self.latencies) + self.failed

    def summary(self) -> dict[str, Any]:
        """For programs; latencies in milliseconds, of the requests that succeeded."""
        ordered = sorted(self.latencies)
        milliseconds = {f"p{part:g}": round(percentile(ordered, part) * 1000, 3) for part in PERCENTILES}
        return {
            "requests": self.requests,
            "failed": self.failed,
            "failures": dict(self.failures),
            "seconds": round(self.seconds, 3),
            "rate": round(self.requests / self.seconds, 1) if self.seconds else 0.0,
            "latency_ms": milliseconds | {"max": round(ordered[-1] * 1000, 3) if ordered else 0.0},
            "stopped": self.stopped,
            "left_behind": self.left_behind,
        }


def percentile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that `part` percent of the ordered values do not exceed; 0 where there is none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * part / 100) - 1)]


def run_loadtest(options: Mapping[str, Any], environ: Mapping[str, str], cwd: Path) -> int:
    """Run it and print what came of it; 0 if every request succeeded, else 1.

    Raises:
        ConfigError: something about what is asked for is wrong.
    """
    plan = make_plan(options, environ, cwd)
    progress = sys.stderr
    print(plan.description, file=progress, flush=True)
    result = asyncio.run(run(plan, progress))
    summary = result.summary()
    print(json.dumps(summary) if options["json"] else _text(summary))
    return 1 if result.failed or result.stopped or not result.requests else 0


def make_plan(options: Mapping[str, Any], environ: Mapping[str, str], cwd: Path) -> Plan:
    """What is asked for. Raises ConfigError."""
    parts = urlsplit(options["url"])
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError("loadtest: expected an address such as https://redis.example.com")
    if parts.username or parts.password:
        raise ConfigError("loadtest: the token does not belong into the address; set REDISGATE_TOKEN")
    if options["token_file"]:
        try:
            token = (cwd / options["token_file"]).read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read {options['token_file']}: {error.strerror}") from error
    else:
        token = environ.get("REDISGATE_TOKEN") or environ.get("UPSTASH_REDIS_REST_TOKEN") or ""
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError("loadtest: set REDISGATE_TOKEN to a token of the instance, or name a file by --token-file")

    def number(name: str, parse: Callable[[Any], Any]) -> Any:
        try:
            return parse(options[name])
        except ValueError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None

    seconds, value_bytes = number("duration", duration), number("value_size", size)
    if seconds > MAX_SECONDS:
        raise ConfigError(f"--duration: at most {MAX_SECONDS / 60:g} minutes")
    if value_bytes > MAX_VALUE_BYTES:
        raise ConfigError(f"--value-size: at most {bytes_text(MAX_VALUE_BYTES)}")
    return Plan(
        options["url"].rstrip("/"),
        token,
        number("rate", count(1, MAX_RATE)),
        seconds,
        number("connections", count(1, MAX_CONNECTIONS)),
        options["mix"],
        value_bytes,
        options["ca_file"],
    )


async def run(plan: Plan, progress: TextIO | None = None) -> Result:
    """Carry out a plan; a line per second goes to `progress`. SIGINT ends it early. Raises ConfigError."""
    test = _Test(plan, progress)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, test.stop, "it was interrupted")
    try:
        await test.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return test.result


class _Test:
    def __init__(self, plan: Plan, progress: TextIO | None) -> None:
        self.result = Result()
        self._plan = plan
        self._progress = progress
        self._context = _ssl_context(plan)
        self._prefix = f"redisgate:loadtest:{secrets.token_hex(4)}:"
        self._value = secrets.token_hex((plan.value_bytes + 1) // 2)[: plan.value_bytes]
        self._wrote = False
        self._stop = asyncio.Event()
        self._began = 0.0
        self._number = 0  # of the next request
        # Of the second that is under way
        self._recent: list[float] = []
        self._recent_failures = 0

    def stop(self, why: str) -> None:
        """Begin no more requests."""
        self.result.stopped = self.result.stopped or why
        self._stop.set()

    async def run(self) -> None:
        await self._try_one()
        self._began = time.perf_counter()
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._work() for _ in range(self._plan.connections)))
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        self.result.seconds = time.perf_counter() - self._began
        await self._remove_keys()

    async def _try_one(self) -> None:
        """Before there is a load: what is wrong is wrong for every request."""
        client = _Client(self._plan, self._context)
        try:
            await client.request(self._command(0))
        except (OSError, RequestFailed, TimeoutError) as error:
            raise ConfigError(f"loadtest: {self._plan.url}: {_reason(error)}") from error
        finally:
            client.close()

    async def _work(self) -> None:
        """One connection: takes the next request that is due."""
        client = _Client(self._plan, self._context)
        interval = 1 / self._plan.rate
        total = round(self._plan.rate * self._plan.seconds)
        while self._number < total and not self._stop.is_set():
            number = self._number
            self._number += 1
            due = self._began + number * interval
            wait = due - time.perf_counter()
            if wait > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), wait)
                    break
            elif time.perf_counter() > self._began + self._plan.seconds + REQUEST_SECONDS:
                self.stop(f"it could not keep up: {number} of {total} requests were sent in time")
                break
            try:
                await client.request(self._command(number))
            except (OSError, RequestFailed, TimeoutError) as error:
                client.close()
                self.result.failures[_reason(error)] += 1
                self._recent_failures += 1
            else:
                latency = time.perf_counter() - due
                self.result.latencies.append(latency)
                self._recent.append(latency)
        client.close()

    def _command(self, number: int) -> list[str]:
        if self._plan.mix == "ping":
            return ["PING"]
        key = f"{self._prefix}{number // 4 % KEYS}"
        if self._plan.mix == "mixed" and number % 4 == 0:
            self._wrote = True
            return ["SET", key, self._value, "EX", str(int(self._plan.seconds) + KEY_SECONDS)]
        return ["GET", key]

    async def _watch(self) -> None:
        """A line per second; and the end, when the deployment has had enough."""
        second = 0
        while True:
            second += 1
            await asyncio.sleep(max(0.0, self._began + second - time.perf_counter()))
            recent, failures = sorted(self._recent), self._recent_failures
            self._recent, self._recent_failures = [], 0
            if self._progress is not None:
                print(
                    f"{second:4} s  {len(recent) + failures:5} requests  p50 {percentile(recent, 50) * 1000:7.2f} ms"
                    f"  p99 {percentile(recent, 99) * 1000:7.2f} ms  {failures} failed",
                    file=self._progress,
                    flush=True,
                )
            requests = len(recent) + failures
            if requests >= ENOUGH_REQUESTS and failures > requests * ENOUGH_PART:
                self.stop(f"{failures} of {requests} requests failed within a second: it has had enough")

    async def _remove_keys(self) -> None:
        if not self._wrote:
            return
        client = _Client(self._plan, self._context)
        keys = [f"{self._prefix}{number}" for number in range(min(KEYS, self._number // 4 + 1))]
        try:
            for begin in range(0, len(keys), REMOVED_AT_ONCE):
                await client.request(["UNLINK", *keys[begin : begin + REMOVED_AT_ONCE]])
        except (OSError, RequestFailed, TimeoutError):
            self.result.left_behind = len(keys)
        finally:
            client.close()


class _Client:
    """One connection, made when it is needed; a request at a time."""

    def __init__(self, plan: Plan, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(plan.url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._context = context
        self._head = (
            f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {plan.token}\r\n"
            "Content-Type: application/json\r\nUser-Agent: redisgate-loadtest\r\nContent-Length: "
        )
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, command: list[str]) -> None:
        """Send a command and have it answered. Raises OSError, TimeoutError, RequestFailed."""
        async with asyncio.timeout(REQUEST_SECONDS):
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._context)
            reader, writer = self._streams
            body = json.dumps(command)
            writer.write(f"{self._head}{len(body)}\r\n\r\n{body}".encode())
            answer = _Answer()
            parser = httptools.HttpResponseParser(answer)
            while not answer.complete:
                data = await reader.read(_READ_BYTES)
                if not data:
                    raise RequestFailed("the connection was closed")
                try:
                    parser.feed_data(data)
                except httptools.HttpParserError:
                    raise RequestFailed("the answer is not HTTP") from None
            status = parser.get_status_code()
            if not parser.should_keep_alive():
                self.close()
            if status != 200:
                raise RequestFailed(f"status {status}: {answer.error}")

    def close(self) -> None:
        """Close the connection; the next request makes another one."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class _Answer:
    """What httptools tells of an answer."""

    def __init__(self) -> None:
        self.complete = False
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.complete = True

    @property
    def error(self) -> str:
        """Why it was refused, as the service says."""
        try:
            text = json.loads(self._body)["error"]
        except (ValueError, KeyError, TypeError):
            return "no reason given"
        return str(text if isinstance(text, str) else "refused")[:200]


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {REQUEST_SECONDS:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate cannot be verified: {error.verify_message}; --ca-file names whom to trust"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or 'no agreement'}"
    if isinstance(error, OSError):
        return (os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)) or "cannot connect"
    return str(error)


def _ssl_context(plan: Plan) -> ssl.SSLContext | None:
    if not plan.url.startswith("https:"):
        return None
    try:
        return ssl.create_default_context(cafile=plan.ca_file)
    except OSError as error:
        raise ConfigError(f"--ca-file: cannot use {plan.ca_file}: {error.strerror or error}") from error


def _text(summary: Mapping[str, Any]) -> str:
    return "\n".join(_lines(summary))


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"requests  {summary['requests']:,} in {summary['seconds']:.1f} s: {summary['rate']:,.1f} a second"
    yield "latency   " + ", ".join(f"{name} {value:.2f} ms" for name, value in summary["latency_ms"].items())
    yield f"failed    {summary['failed']:,}"
    for reason, number in summary["failures"].items():
        yield f"          {number:,} × {reason}"
    if summary["stopped"]:
        yield f"stopped   {summary['stopped']}"
    if summary["left_behind"]:
        yield f"keys      {summary['left_behind']} could not be removed; they expire within {KEY_SECONDS} s"
