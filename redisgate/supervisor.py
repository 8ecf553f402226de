"""The supervisor: binds the sockets, keeps N workers alive, drains and reloads.

One SO_REUSEPORT socket per worker is bound once and stays open here, so the
connections that wait in its queue survive a worker's crash, and a replacement
finds them: closing a listener resets them.

The process has no event loop. Signals are blocked and taken one at a time, so
none is lost and nothing runs at an odd moment.
"""

import contextlib
import ctypes
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from redisgate import logs
from redisgate.config import ConfigError, Settings, ensure_secret_key
from redisgate.shared import SharedState, SharedStateError

START_TIMEOUT = 30.0
"""Seconds for a worker to accept requests."""
STABLE_SECONDS = 5.0
"""A worker that lived this long is replaced at once, one that did not after a growing delay."""
MAX_RESTART_DELAY = 10.0
KILL_GRACE = 5.0
"""Seconds beyond the drain timeout before a worker is killed."""
FLUSH_SECONDS = 1.0
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)

WorkerMain = Callable[[Settings, socket.socket, int, SharedState, int], None]


@dataclass
class _Worker:
    """One incarnation of a worker."""

    pid: int
    slot: int
    started: float
    ready: int | None
    """Read end of its readiness pipe, until it is ready."""
    stopping: bool = False


@dataclass
class _Seat:
    """A place that always has a worker: one socket, and two slots in shared memory, used in turn."""

    index: int
    sock: socket.socket
    workers: list[_Worker] = field(default_factory=list)
    failures: int = 0
    restart_at: float | None = None

    def free_slot(self) -> int | None:
        taken = {worker.slot for worker in self.workers}
        return next((slot for slot in (2 * self.index, 2 * self.index + 1) if slot not in taken), None)


def worker_run(settings: Settings, sock: socket.socket, slot: int, shared: SharedState, ready_fd: int) -> None:
    """What a worker process does."""
    from redisgate.worker import run

    run(settings, sock, slot, shared, ready_fd)


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` listening addresses that are one: SO_REUSEPORT. Raises OSError if anybody listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without SO_REUSEPORT first: with it, a second gateway would quietly take half of the connections.
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    sockets = []
    for _ in range(count):
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        port = sock.getsockname()[1]
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def run(
    settings: Settings,
    reload: Callable[[], Settings] | None = None,
    on_ready: Callable[[str], None] | None = None,
    worker_main: WorkerMain = worker_run,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Args:
        reload: gives the settings anew on SIGHUP.
        on_ready: called once with the address (`http://host:port`) when all workers accept requests.
    """
    logs.configure(settings.log_level, settings.log_format)
    # Workers must not die with the terminal's Ctrl-C before they have drained: the supervisor tells them.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return _Supervisor(settings, reload, on_ready, worker_main).run()
    except (ConfigError, SharedStateError) as error:
        print(f"redisgate: {error}", file=sys.stderr)
        return 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        reload: Callable[[], Settings] | None,
        on_ready: Callable[[str], None] | None,
        worker_main: WorkerMain,
    ) -> None:
        self._settings = ensure_secret_key(settings)
        self._reload = reload
        self._on_ready = on_ready
        self._worker_main = worker_main
        self._seats: list[_Seat] = []
        self._announced = False
        self._stopping_since: float | None = None
        self._status = 0
        self._rolling: list[_Seat] = []  # seats whose worker a reload has yet to replace
        self._flushed = 0.0

    def run(self) -> int:
        settings = self._settings
        try:
            sockets = bind(settings.host, settings.port, settings.workers)
        except OSError as error:
            print(
                f"redisgate: cannot listen on {settings.host}:{settings.port}: {error.strerror};"
                " choose another with --port or REDISGATE_PORT",
                file=sys.stderr,
            )
            return 1
        self._shared = self._make_shared(settings)
        self._seats = [_Seat(index, sock) for index, sock in enumerate(sockets)]
        for seat in self._seats:
            self._start(seat)
        while self._stopping_since is None or any(seat.workers for seat in self._seats):
            self._wait()
            self._collect_ready()
            self._keep_alive()
        self._shared.flush()
        return self._status

    def _make_shared(self, settings: Settings) -> SharedState:
        digests = _limited(settings)
        path = settings.state_dir / "counts" if digests else None
        return SharedState.create(path, settings.workers, digests)

    # Workers

    def _start(self, seat: _Seat) -> None:
        slot = seat.free_slot()
        if slot is None:
            return
        seat.restart_at = None
        ready, ready_write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._child(seat, slot, ready, ready_write, supervisor)
        os.close(ready_write)
        os.set_blocking(ready, False)
        seat.workers.append(_Worker(pid, slot, time.monotonic(), ready))

    def _child(self, seat: _Seat, slot: int, ready: int, ready_write: int, supervisor: int) -> None:
        status = 1
        try:
            os.close(ready)
            # No worker outlives its supervisor, not even a killed one.
            with contextlib.suppress(OSError):
                ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != supervisor:
                os._exit(1)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            for other in self._seats:
                if other is not seat:
                    other.sock.close()
            self._worker_main(self._settings, seat.sock, slot, self._shared, ready_write)
            status = 0
        except KeyboardInterrupt:
            status = 0
        except BaseException:
            log.exception("worker %d failed", seat.index)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _wait(self) -> None:
        """Sleep until a signal, a worker that becomes ready, or the next thing to do."""
        pending = any(worker.ready is not None for seat in self._seats for worker in seat.workers)
        timeout = 0.02 if pending else 0.2 if self._stopping_since or self._rolling else FLUSH_SECONDS
        info = signal.sigtimedwait(_SIGNALS, timeout)
        if info is not None:
            if info.si_signo in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif info.si_signo == signal.SIGHUP:
                self._begin_reload()
        self._reap()
        now = time.monotonic()
        if now - self._flushed >= FLUSH_SECONDS:
            self._flushed = now
            self._shared.flush()

    def _reap(self) -> None:
        for seat in self._seats:
            for worker in list(seat.workers):
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
                if pid:
                    self._died(seat, worker, os.waitstatus_to_exitcode(status))

    def _died(self, seat: _Seat, worker: _Worker, status: int) -> None:
        seat.workers.remove(worker)
        if worker.ready is not None:
            os.close(worker.ready)
        if worker.stopping:
            return
        lived = time.monotonic() - worker.started
        if not self._announced and worker.ready is not None:
            print(f"redisgate: worker {seat.index} ended with status {status} before it was ready", file=sys.stderr)
            self._status = 1
            self._stop()
            return
        seat.failures = 0 if lived > STABLE_SECONDS else seat.failures + 1
        delay = 0.0 if seat.failures <= 1 else min(0.1 * 2**seat.failures, MAX_RESTART_DELAY)
        log.error("worker %d ended with status %d; replaced in %g s", seat.index, status, delay)
        seat.restart_at = time.monotonic() + delay

    def _collect_ready(self) -> None:
        with selectors.DefaultSelector() as selector:
            waiting = {}
            for seat in self._seats:
                for worker in seat.workers:
                    if worker.ready is not None:
                        selector.register(worker.ready, selectors.EVENT_READ)
                        waiting[worker.ready] = (seat, worker)
            if not waiting:
                return
            for key, _ in selector.select(0):
                seat, worker = waiting[key.fd]
                if os.read(key.fd, 1):
                    os.close(key.fd)
                    worker.ready = None
                    self._became_ready(seat, worker)
        if not self._announced and all(any(worker.ready is None for worker in seat.workers) for seat in self._seats):
            self._announce()

    def _became_ready(self, seat: _Seat, worker: _Worker) -> None:
        for other in seat.workers:
            if other is not worker and not other.stopping:
                self._end(other)
        if seat in self._rolling:
            self._rolling.remove(seat)
            if not self._rolling:
                log.info("reloaded")

    def _announce(self) -> None:
        self._announced = True
        host, port = self._seats[0].sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        count = len(self._seats)
        log.info("listening on http://%s:%d (%d worker%s)", host, port, count, "" if count == 1 else "s")
        if self._on_ready is not None:
            self._on_ready(f"http://{host}:{port}")

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if self._stopping_since is not None:
            if now - self._stopping_since > self._settings.limits.drain_timeout + KILL_GRACE:
                self._signal_all(signal.SIGKILL)
            return
        for seat in self._seats:
            if seat.restart_at is not None and now >= seat.restart_at:
                self._start(seat)
            for worker in seat.workers:
                if worker.ready is not None and now - worker.started > START_TIMEOUT:
                    log.error("worker %d was not ready within %g s", seat.index, START_TIMEOUT)
                    os.kill(worker.pid, signal.SIGKILL)
        if self._rolling and not any(worker.ready is not None for seat in self._seats for worker in seat.workers):
            seat = self._rolling[0]
            if seat.restart_at is None:
                self._start(seat)

    # Stop and reload

    def _end(self, worker: _Worker) -> None:
        worker.stopping = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for seat in self._seats:
            for worker in seat.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    def _stop(self) -> None:
        if self._stopping_since is not None:
            # Asked twice: somebody is in a hurry.
            self._signal_all(signal.SIGKILL)
            return
        self._stopping_since = time.monotonic()
        self._rolling = []
        for seat in self._seats:
            # Nobody accepts any more: a client is refused, and tries elsewhere, rather than wait in a queue for nothing.
            seat.sock.close()
            for worker in seat.workers:
                self._end(worker)

    def _begin_reload(self) -> None:
        if self._reload is None or self._stopping_since is not None:
            log.warning("reload is not available here")
            return
        try:
            settings = ensure_secret_key(self._reload())
        except ConfigError as error:
            log.error("not reloaded: %s", error)
            return
        old = self._settings
        if (settings.host, settings.port, settings.workers) != (old.host, old.port, old.workers):
            log.warning("host, port and workers change with a restart only")
        if not self._shared.knows(_limited(settings)):
            log.warning("tokens with new limits: their counts begin with a restart; not reloaded")
            return
        self._settings = settings
        self._rolling = list(self._seats)
        log.info("reloading")


def _limited(settings: Settings) -> list[bytes]:
    from redisgate.access import token_digest

    return [token_digest(token.token) for token in settings.tokens if token.rate is not None or token.daily is not None]
