"""One worker: composes the parts, serves until it is told to stop, drains."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import uvloop

import redisgate
from redisgate import board, metrics
from redisgate.access import AccessTable, Grant, Instance, token_digest
from redisgate.access_log import AccessLog, FullAccessLog
from redisgate.capacity import CapacityWatch
from redisgate.config import Settings
from redisgate.gateway import Gateway
from redisgate.http_protocol import HttpServer
from redisgate.http_response import ResponseHeads
from redisgate.limits import Limit, Meter
from redisgate.resttoken import RestTokens
from redisgate.scripts import ScriptCache
from redisgate.shared import SharedState
from redisgate.streams import Heartbeat

BACKLOG = 4096
"""Connections that wait to be accepted."""
RENEW_USERS_SECONDS = 60.0
"""How often Redis users of their own log in again, so that a changed password ends their tokens."""

PLANE_STOP_SECONDS = 2.0
"""For the control plane to finish when a worker stops; beyond the time to drain."""
KEPT_MEMORY_BYTES = 32 * 1024 * 1024
"""Freed memory that a worker keeps for its next replies, instead of giving it back to the system each time."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

if TYPE_CHECKING:
    from redisgate.tracing import Tracing

log = logging.getLogger(__name__)


def build_access(settings: Settings, tokens: RestTokens, shared: SharedState, index: int) -> AccessTable:
    """The access table that the configuration describes."""
    access = AccessTable(tokens.grant)
    scripts = ScriptCache(shared)
    for config in settings.instances:
        access.add_instance(Instance(config, scripts))
    for token in settings.tokens:
        limiter = None
        if token.rate is not None or token.daily is not None:
            counter = shared.counter(token_digest(token.token), index)
            limiter = Meter([Limit(counter, token.rate, token.daily, workers=shared.workers)])
        user = (token.user, token.password or "") if token.user is not None else None
        grant = Grant(
            access.instances[token.instance],
            token.scope,
            name=token.name,
            expires=token.expires,
            limiter=limiter,
            user=user,
        )
        access.put(token.token.encode(), grant)
    return access


def make_http_server(gateway: Gateway, settings: Settings) -> HttpServer:
    """The HTTP server, with the access log that the settings want."""
    process = secrets.token_hex(6).encode()
    if settings.access_log == "all":
        # All answers leave the short way, so that the log hears of each.
        sample, keys = settings.access_log_sample, settings.log_keys
        http = HttpServer(gateway, settings.limits, ResponseHeads(process, remember=False))
        http.access_log = FullAccessLog(settings.slow_request, sample=sample, keys=keys)
        return http
    http = HttpServer(gateway, settings.limits, ResponseHeads(process))
    if settings.access_log == "errors":
        http.access_log = AccessLog(settings.slow_request, keys=settings.log_keys)
    return http


def trace(http: HttpServer, gateway: Gateway, settings: Settings, index: int) -> "Tracing | None":
    """Have requests traced, where the settings want it."""
    if not settings.trace_endpoint:
        return None
    # Not imported otherwise: the library takes its time and its memory.
    from redisgate.tracing import Tracing

    tracing = Tracing(http.gateway, http.access_log, settings, f"worker {index}", gateway.trusts)
    http.gateway, http.access_log = tracing, tracing
    http.heads = ResponseHeads(secrets.token_hex(6).encode(), remember=False)
    gateway.on_submit = tracing.submitted
    return tracing


async def accept(settings: Settings, sock: socket.socket, http: HttpServer) -> Callable[[], Awaitable[None]]:
    """Begin to accept connections; returns what ends that."""
    if settings.tls_cert_file:
        # Not imported without certificates: OpenSSL takes its time and its memory.
        from redisgate import tls

        certificates = tls.Certificates(tls.pairs(settings))
        certificates.watch()
        listener = tls.TlsListener(sock, certificates, http)
        listener.start()

        async def stop_tls() -> None:
            certificates.stop()
            await listener.stop()

        return stop_tls
    server = await asyncio.get_running_loop().create_server(http.protocol, sock=sock, backlog=BACKLOG)

    async def stop() -> None:
        server.close()

    return stop


async def serve(settings: Settings, sock: socket.socket, index: int, shared: SharedState, ready_fd: int) -> None:
    """Serve on a bound socket until SIGTERM; then answer what is under way, for `drain_timeout` seconds at most."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    tokens = RestTokens(settings.secret_key)
    access = build_access(settings, tokens, shared, index)
    plane = None
    if settings.control.enabled:
        # Not imported without a database: the data plane alone starts faster and takes less memory.
        from control.plane import Plane

        plane = Plane(settings, access, shared, index)
    follower = None
    if settings.cluster.enabled:
        from control.kubernetes.routes import RouteFollower

        follower = RouteFollower(settings, access, shared, index)
        if plane is not None:
            plane.follow(follower)
    gateway = Gateway(settings, access, tokens, plane.http if plane is not None else None)
    http = make_http_server(gateway, settings)
    tracing = trace(http, gateway, settings, index)
    access.streams = http.streams
    http.start()
    heartbeat = Heartbeat(http.streams, settings.limits.heartbeat_interval)
    heartbeat.start()
    capacity = CapacityWatch(access.instances.values())
    capacity.start()

    def renew_users() -> None:
        access.renew_users()
        loop.call_later(RENEW_USERS_SECONDS, renew_users)

    loop.call_later(RENEW_USERS_SECONDS, renew_users)
    # What was imported and built lives as long as the process; looking through it again and again
    # costs every request its share.
    gc.collect()
    gc.freeze()
    if plane is not None:
        plane.context.extra["http"] = http
        await plane.start()
    if follower is not None:
        await follower.start()
    publisher = None
    shown = board.current()
    if shown is not None:
        collectors = [
            metrics.collect_counters(http.counters),
            metrics.collect_http(http),
            metrics.collect_redis(access),
        ]
        publisher = metrics.Publisher(shown, str(index), [*collectors, *([plane.collect] if plane is not None else [])])
        publisher.start()
    stop_accepting = await accept(settings, sock, http)
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    log.info("worker %d serves, %s", index, redisgate.build_form())
    await stop.wait()
    log.info("worker %d drains", index)
    gateway.draining = True
    await stop_accepting()
    left = await http.drain(settings.limits.drain_timeout)
    if left:
        log.warning("worker %d cut off %d connections after %g s", index, left, settings.limits.drain_timeout)
    heartbeat.stop()
    if follower is not None:
        await follower.stop()
    if plane is not None:
        await plane.stop(PLANE_STOP_SECONDS)
    capacity.stop()
    access.abort()
    if publisher is not None:
        publisher.stop()
    if tracing is not None:
        await tracing.stop()
    await asyncio.sleep(0)  # transports close in the next turn of the loop


def keep_memory() -> None:
    """Have the C library keep what is freed, up to `KEPT_MEMORY_BYTES`.

    By default glibc returns every large buffer at once, and the kernel clears its pages anew for the next one: a third
    of the time that a reply of 100 KiB takes.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEPT_MEMORY_BYTES)
        mallopt(_M_MMAP_THRESHOLD, KEPT_MEMORY_BYTES)


def run(settings: Settings, sock: socket.socket, index: int, shared: SharedState, ready_fd: int) -> None:
    """Run one worker in this process until SIGTERM; writes one byte to `ready_fd` when it accepts requests."""
    keep_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, sock, index, shared, ready_fd))


def run_steward(settings: Settings, ready_fd: int) -> None:
    """Run this host's steward in this process until SIGTERM; writes one byte to `ready_fd` when it is at work."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_steward(settings, ready_fd))


async def _steward(settings: Settings, ready_fd: int) -> None:
    from control import plane

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    log.info("the steward is at work")
    await plane.run_steward(settings, stop)
