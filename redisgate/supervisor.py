"""The supervisor: N workers, their sockets, their drain and their replacement.

It binds one SO_REUSEPORT socket per worker, once, and keeps them all open. A
replacement inherits the socket of the worker whose place it takes; so the
connections that wait in the socket's queue live through a crash and a reload.
(Closing one of two listeners resets what waits in it.)

One thread, no event loop: it forks. What happens arrives as bytes on pipes:
signals through the wake-up descriptor, readiness through a pipe per worker.

The worker's code is imported here, before the first fork: a replacement is
there in milliseconds, shares its pages with the others, and is of the same
release as they are, also after somebody upgraded the package underneath.
"""

import contextlib
import ctypes
import dataclasses
import errno
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from redisgate import logs, tracing
from redisgate.access import token_digest
from redisgate.board import HELPERS, Board
from redisgate.config import ConfigError, Settings, ensure_secret_key
from redisgate.shared import INCARNATIONS, SharedState, SharedStateError

BACKLOG = 4096
"""Connections that wait to be accepted, per worker."""
START_TIMEOUT = 60.0
"""Seconds a worker has to accept requests before it counts as dead."""
DRAIN_GRACE = 5.0
"""Seconds beyond the workers' own drain timeout before they are killed."""
SHORT_LIFE = 5.0
"""A worker that dies within so many seconds of its start makes the next one wait."""
FIRST_BACKOFF = 0.1
MAX_BACKOFF = 5.0
"""Seconds between two starts of a worker that keeps dying: doubles from the first to the second."""
FLUSH_INTERVAL = 1.0
"""Seconds of counts that a power failure may cost."""
COUNTS_FILE = "counts"
"""In the state directory."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1)
_STEWARD, _METRICS = "steward", "metrics"
_PR_SET_PDEATHSIG = 1

WorkerMain = Callable[[Settings, socket.socket, int, SharedState, int], None]
StewardMain = Callable[[Settings, int], None]

log = logging.getLogger(__name__)


class StartError(Exception):
    """The gateway cannot start; one line for the operator."""


@dataclasses.dataclass(eq=False, slots=True)
class _Generation:
    """Workers of the same settings."""

    settings: Settings
    proven: bool = False
    """A worker has become ready with these settings; for the first generation: all have."""


@dataclasses.dataclass(eq=False, slots=True)
class _Worker:
    pid: int
    incarnation: int
    generation: _Generation
    started: float
    ready_fd: int
    kill_at: float | None = None
    """Monotonic seconds; None: it may live on."""
    killed_for: str = ""


class _Seat:
    """The place of one worker: its index and socket, and the up to two processes that hold them.

    A helper's seat never has two processes at a time: the steward's, which has no socket, and that of the process that
    answers scrapes.
    """

    __slots__ = ("draining", "failures", "helper", "index", "retry_at", "serving", "sock", "starting")

    def __init__(self, index: int, sock: socket.socket | None, helper: str = "") -> None:
        self.index = index
        self.sock = sock
        self.helper = helper
        self.starting: _Worker | None = None
        self.serving: _Worker | None = None
        self.draining: _Worker | None = None
        self.failures = 0
        self.retry_at = 0.0

    def __str__(self) -> str:
        return {"": f"worker {self.index}", _STEWARD: "the steward", _METRICS: "the metrics process"}[self.helper]

    def workers(self) -> list[_Worker]:
        return [worker for worker in (self.starting, self.serving, self.draining) if worker is not None]

    def free_incarnation(self) -> int | None:
        taken = {worker.incarnation for worker in self.workers()}
        return next((number for number in range(INCARNATIONS) if number not in taken), None)


def run(
    settings: Settings,
    reload: Callable[[], Settings] | None,
    on_ready: Callable[[Settings], None] | None = None,
    *,
    worker_main: WorkerMain | None = None,
    steward_main: StewardMain | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit status: 0 after a complete drain, 1 otherwise.

    `reload` makes the new settings on SIGHUP; what it raises is logged, and the old workers stay. Without it SIGHUP
    (the terminal is gone) is as SIGTERM. `on_ready` is called once, when all workers accept requests, with the port
    that was really bound. `worker_main` stands for `redisgate.worker.run`, `steward_main` for its `run_steward`.

    Must be called in the main thread of a process that has no other.
    """
    logs.configure(settings.log_level, settings.log_format)
    _raise_file_limit()
    if worker_main is None or steward_main is None:
        from redisgate import worker

        worker_main, steward_main = worker_main or worker.run, steward_main or worker.run_steward
    try:
        with contextlib.ExitStack() as stack:
            tracing.check(settings)
            _check_tls(settings)
            sockets = bind(settings.host, settings.port, settings.workers)
            for sock in sockets:
                stack.enter_context(sock)
            metrics_socket = None
            if settings.metrics_port:
                (metrics_socket,) = bind(settings.metrics_host, settings.metrics_port, 1, setting="metrics_port")
                stack.enter_context(metrics_socket)
            settings = ensure_secret_key(settings)
            if settings.control.enabled:
                _prepare_control_plane(settings)
            if settings.cluster.enabled:
                _prepare_cluster(settings)
            shared = _shared_state(settings)
            stack.callback(shared.close)
            return _Supervisor(
                settings, reload, on_ready, worker_main, steward_main, sockets, shared, metrics_socket
            ).run()
    except (StartError, ConfigError) as error:
        _complain(str(error))
        return 1


def _prepare_control_plane(settings: Settings) -> None:
    """Bring the database up to date, and load what the workers need, before they are forked.

    PostgreSQL may be away: then the steward does it once it is there.

    Raises:
        ConfigError: the settings are not fit for production.
        StartError: the database is there, but cannot be brought up to date.
    """
    from control import app, plane
    from control.settings import check

    check(settings)
    app.prepare()
    try:
        plane.migrate_at_start(settings)
    except plane.MigrationError as error:
        raise StartError(str(error)) from error


def _raise_file_limit() -> None:
    """As many open files as whoever started us allows: every connection is one, and shells begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_tls(settings: Settings) -> None:
    """Say what is wrong with the certificates before anything is started. Raises ConfigError."""
    if settings.tls_cert_file or settings.tls_key_file:
        from redisgate import tls

        tls.load_context(tls.pairs(settings))


def _prepare_cluster(settings: Settings) -> None:
    """Import what the workers need to follow a cluster, and see that the settings lead to one; it may be away.

    Raises:
        StartError: they do not, or the packages for it are missing.
    """
    try:
        from control.kubernetes import routes
    except ModuleNotFoundError as error:
        raise StartError(
            f"kubernetes needs packages of its own ({error}): pip install 'redisgate[kubernetes]'"
        ) from error
    try:
        routes.check(settings)
    except routes.NotConfigured as error:
        raise StartError(f"{error}; name a kubeconfig by REDISGATE_KUBECONFIG, or run in a pod") from error


def _complain(message: str) -> None:
    """Say why the gateway does not start: to whoever started it, whatever the log level is."""
    print(f"redisgate: {message}", file=sys.stderr, flush=True)


def bind(host: str, port: int, count: int, *, setting: str = "port") -> list[socket.socket]:
    """`count` sockets that listen on one address; port 0 takes a free one. `setting` is what says which.

    Raises:
        StartError: the address is taken, not ours, or not known.
    """
    where = _url_host(host) + f":{port}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartError(f"cannot listen on {where}: {error.strerror}") from error
    # "localhost" is both; a program that tries one only tries IPv4.
    family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sockets: list[socket.socket] = []
    try:
        # SO_REUSEPORT would let a second gateway of the same user share the port without a word. Whoever binds
        # without it is told; and finds us, because our sockets listen from the start.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _take_both_families(probe, host)
            probe.bind(address)
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _take_both_families(sock, host)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            address = sock.getsockname()
    except OSError as error:
        for sock in sockets:
            sock.close()
        other = f"; choose another with --{setting.replace('_', '-')} or REDISGATE_{setting.upper()}"
        hint = other if error.errno == errno.EADDRINUSE else ""
        raise StartError(f"cannot listen on {where}: {os.strerror(error.errno or 0)}{hint}") from error
    return sockets


def _take_both_families(sock: socket.socket, host: str) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host or "0.0.0.0"


def _limited(settings: Settings) -> list[bytes]:
    return [token_digest(token.token) for token in settings.tokens if token.rate is not None or token.daily is not None]


def _has_daily_limits(settings: Settings) -> bool:
    # A control plane brings limits that nobody knows at the start.
    return settings.control.enabled or any(token.daily is not None for token in settings.tokens)


def _shared_state(settings: Settings) -> SharedState:
    digests = _limited(settings)
    if not _has_daily_limits(settings):
        # A second that nobody counted is forgotten in a second: no file, and no claim on the state directory.
        return SharedState.anonymous(settings.workers, digests)
    try:
        return SharedState.create(settings.state_dir / COUNTS_FILE, settings.workers, digests)
    except SharedStateError as error:
        raise StartError(
            f"{error}; there are daily limits, whose counts must be kept: set REDISGATE_STATE_DIR to a directory"
            " that can be written and is no other gateway's"
        ) from error


class _Supervisor:
    """Starts, watches, replaces and stops the workers."""

    def __init__(
        self,
        settings: Settings,
        reload: Callable[[], Settings] | None,
        on_ready: Callable[[Settings], None] | None,
        worker_main: WorkerMain,
        steward_main: StewardMain,
        sockets: list[socket.socket],
        shared: SharedState,
        metrics_socket: socket.socket | None = None,
    ) -> None:
        self._reload = reload
        self._on_ready = on_ready
        self._worker_main = worker_main
        self._steward_main = steward_main
        self._shared = shared
        self._seats = [_Seat(index, sock) for index, sock in enumerate(sockets)]
        if settings.control.enabled:
            # behind the workers: on a reload they prove the settings
            self._seats.append(_Seat(len(sockets), None, _STEWARD))
        if metrics_socket is not None:
            self._seats.append(_Seat(len(sockets) + HELPERS - 1, metrics_socket, _METRICS))
        # The metrics port reads it, and the administrators' API.
        self._board = Board(len(sockets), read=metrics_socket is not None or settings.control.enabled)
        self._started_at = time.time()
        self._restarts: dict[str, int] = {}
        self._reloads: dict[str, int] = {}
        self._pid = os.getpid()
        self._configured = settings  # as somebody wrote it: port 0 stays 0

        # Settings: those that workers are started with, and the last that are known to work.
        self._generation = _Generation(dataclasses.replace(settings, port=sockets[0].getsockname()[1]))
        self._proven = self._generation
        self._reload_asked = False
        self._reloading = False

        # The end.
        self._stopping = False
        self._status = 0

    def run(self) -> int:
        receive, send = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous_wakeup = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        previous_handlers = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        # Garbage collection in a worker would write to, and so copy, every page it shares with the others.
        gc.collect()
        gc.freeze()
        try:
            for seat in self._seats:
                self._start(seat, self._generation)
            next_flush = time.monotonic() + FLUSH_INTERVAL
            while any(seat.workers() for seat in self._seats) or not self._stopping:
                self._wait(receive, next_flush)
                self._reap()
                self._advance()
                if time.monotonic() >= next_flush:
                    self._flush()
                    next_flush = time.monotonic() + FLUSH_INTERVAL
            return self._status
        finally:
            self._kill_all()
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_wakeup)
            os.close(receive)
            os.close(send)
            gc.unfreeze()

    # Waiting

    def _wait(self, signals: int, next_flush: float) -> None:
        """Until a signal, a worker that is ready, or something that is due; acts on the first two."""
        now = time.monotonic()
        due = [next_flush, *(seat.retry_at for seat in self._seats if seat.retry_at > now)]
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        starting: dict[int, _Seat] = {}
        for seat in self._seats:
            if seat.starting is not None and seat.starting.ready_fd >= 0:
                starting[seat.starting.ready_fd] = seat
                poll.register(seat.starting.ready_fd, select.POLLIN)
                due.append(seat.starting.started + START_TIMEOUT)
            due.extend(worker.kill_at for worker in seat.workers() if worker.kill_at is not None)
        timeout = max(0.0, min(due) - now)
        for fd, _ in poll.poll(timeout * 1000 + 1):
            if fd == signals:
                self._on_signals(os.read(signals, 4096))
            elif fd in starting:
                self._on_ready_pipe(starting[fd], fd)

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGHUP and self._reload is None):
                if not self._stopping:
                    log.info("%s: draining", signal.Signals(number).name)
                    self._stop(0)
                else:
                    log.warning("%s again: stopping at once", signal.Signals(number).name)
                    self._kill_all()
            elif number == signal.SIGHUP:
                self._reload_asked = True
            elif number == signal.SIGUSR1:
                self._board.level = level = "" if self._board.level == "debug" else "debug"
                if level:
                    logs.set_level(level)
                log.warning("SIGUSR1: the log level is %s", level or "as configured")
                logs.set_level(level)

    def _on_ready_pipe(self, seat: _Seat, fd: int) -> None:
        worker = seat.starting
        assert worker is not None
        ready = os.read(fd, 1) != b""
        os.close(fd)
        worker.ready_fd = -1
        if not ready or self._stopping:
            return  # it is dead or dying: SIGCHLD tells the rest
        old = seat.serving
        seat.starting, seat.serving = None, worker
        if old is not None:
            seat.draining = old
            self._drain(old)
        generation = worker.generation
        if generation.proven or (seat.helper and self._proven.proven):
            return
        if self._proven.proven:
            generation.proven = True
            self._proven = generation
        elif all(each.serving is not None for each in self._seats):
            generation.proven = True
            self._announce()

    def _announce(self) -> None:
        settings = self._generation.settings
        workers = "1 worker" if settings.workers == 1 else f"{settings.workers} workers"
        scheme = "https" if settings.tls_cert_file else "http"
        print(f"listening on {scheme}://{_url_host(settings.host)}:{settings.port} ({workers})", flush=True)
        if self._on_ready is not None:
            self._on_ready(settings)

    def _flush(self) -> None:
        try:
            self._shared.flush()
        except OSError as error:
            log.error("cannot write the counters to disk: %s", error.strerror)
        self._publish()

    def _publish(self) -> None:
        """Tell what a supervisor knows; and take a log level that somebody asked for."""
        logs.set_level(self._board.level)
        if not self._board.read:
            return
        from redisgate import metrics

        document = metrics.Document("supervisor", time.time())
        workers = [seat for seat in self._seats if not seat.helper]
        document.gauge("redisgate_workers", sum(seat.serving is not None for seat in workers))
        document.gauge("redisgate_workers_wanted", len(workers))
        document.gauge("redisgate_start_time_seconds", self._started_at)
        for kind in ("worker", _STEWARD, _METRICS):
            document.count("redisgate_worker_restarts_total", self._restarts.get(kind, 0), kind=kind)
        for outcome in ("done", "failed"):
            document.count("redisgate_reloads_total", self._reloads.get(outcome, 0), outcome=outcome)
        encoded = metrics.ENCODER.encode(document)
        self._board.publish(encoded, encoded)

    def _reload_ended(self, outcome: str) -> None:
        self._reloads[outcome] = self._reloads.get(outcome, 0) + 1

    # Starting and replacing

    def _start(self, seat: _Seat, generation: _Generation) -> None:
        incarnation = seat.free_incarnation()
        assert incarnation is not None
        receive, send = os.pipe2(os.O_CLOEXEC)
        # A child that were signalled before it is itself would write to our wake-up pipe.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
            if pid == 0:
                os.close(receive)
                self._become_worker(seat, generation.settings, incarnation, send)
        except OSError as error:
            log.error("cannot start %s: %s", seat, error.strerror)
            os.close(receive)
            if self._proven.proven:
                seat.retry_at = time.monotonic() + MAX_BACKOFF
            else:
                self._stop(1)
            return
        finally:
            os.close(send)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        seat.starting = _Worker(pid, incarnation, generation, time.monotonic(), receive)

    def _become_worker(self, seat: _Seat, settings: Settings, incarnation: int, ready_fd: int) -> NoReturn:
        status = 1
        try:
            _die_with_parent(self._pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # The terminal sends these to the whole group; what follows from them is the supervisor's to say.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            for other in self._seats:
                if other is not seat and other.sock is not None:
                    other.sock.close()
                for worker in other.workers():
                    if worker.ready_fd >= 0:
                        os.close(worker.ready_fd)
            logs.enter_worker(seat.helper or seat.index)
            logs.configure(settings.log_level, settings.log_format)
            self._board.enter(seat.index, incarnation)
            if seat.helper == _METRICS:
                from redisgate import exporter

                assert seat.sock is not None
                exporter.run(settings, seat.sock, self._board, ready_fd)
            elif seat.sock is None:
                self._steward_main(settings, ready_fd)
            else:
                self._shared.enter(incarnation)
                self._worker_main(settings, seat.sock, seat.index, self._shared, ready_fd)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            if logging.getLogger().hasHandlers():
                log.exception("%s failed", seat)
            else:
                traceback.print_exc()
        finally:
            # Not sys.exit: what the supervisor's callers have on the stack is not ours to unwind.
            with contextlib.suppress(Exception):
                logs.flush()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _advance(self) -> None:
        """Do what is due: start, replace, kill."""
        now = time.monotonic()
        for seat in self._seats:
            for worker in seat.workers():
                if worker.kill_at is not None and now >= worker.kill_at:
                    log.warning("%s (process %d) is not done in time: killed", seat, worker.pid)
                    self._kill(worker)
                    if self._stopping:
                        self._status = 1
            starting = seat.starting
            if starting is not None and starting.kill_at is None and now >= starting.started + START_TIMEOUT:
                starting.killed_for = f"it was not ready within {START_TIMEOUT:g} s"
                self._kill(starting)
        if self._stopping:
            return
        for seat in self._seats:
            vacant = seat.starting is None and seat.serving is None and not (seat.helper and seat.draining)
            if vacant and now >= seat.retry_at:
                self._start(seat, self._proven if self._proven.proven else self._generation)
        if self._reload_asked and self._proven.proven:
            self._reload_asked = False
            self._begin_reload()
        if self._reloading:
            self._replace_next(now)

    def _replace_next(self, now: float) -> None:
        """Of a reload: start the next new worker when the last is ready."""
        if any(seat.starting is not None for seat in self._seats):
            return
        outdated = [seat for seat in self._seats if seat.serving and seat.serving.generation is not self._generation]
        if not outdated:
            if all(seat.serving is not None for seat in self._seats):
                self._reloading = False
                self._reload_ended("done")
                log.info("reloaded")
            return
        # The drain of an earlier reload may still hold the second place; it is bounded.
        for seat in outdated:
            if seat.helper and seat.serving is not None:
                # Two stewards at once would both look after the same processes; `_advance` starts the next when this
                # one has gone.
                seat.draining, seat.serving = seat.serving, None
                self._drain(seat.draining)
                return
            if now >= seat.retry_at and seat.free_incarnation() is not None:
                self._start(seat, self._generation)
                return

    # Deaths

    def _reap(self) -> None:
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for seat in self._seats:
                for worker in seat.workers():
                    if worker.pid == pid:
                        self._on_death(seat, worker, os.waitstatus_to_exitcode(wait_status))

    def _on_death(self, seat: _Seat, worker: _Worker, code: int) -> None:
        self._board.gone(seat.index, worker.incarnation)
        how = worker.killed_for or (f"exit status {code}" if code >= 0 else signal.Signals(-code).name)
        if worker.ready_fd >= 0:
            # It may have written its byte and died before we read it.
            os.close(worker.ready_fd)
            worker.ready_fd = -1
        if worker is seat.draining:
            seat.draining = None
            if code != 0 and not self._stopping:
                log.warning("%s (process %d) did not drain: %s", seat, worker.pid, how)
            return
        was_starting = worker is seat.starting
        if was_starting:
            seat.starting = None
        else:
            seat.serving = None
        if self._stopping:
            if code != 0 and not was_starting:
                log.warning("%s (process %d) did not drain: %s", seat, worker.pid, how)
                self._status = 1
            return
        if was_starting and not worker.generation.proven and not seat.helper:
            if not self._proven.proven:
                _complain(f"worker {seat.index} stopped before it was ready: {how}")
                self._stop(1)
                return
            if worker.generation is self._generation:
                self._reload_ended("failed")
                log.error(
                    "reload failed: worker %d stopped before it was ready: %s; kept the old settings", seat.index, how
                )
                self._generation = self._proven
                self._reloading = any(
                    other.serving and other.serving.generation is not self._proven for other in self._seats
                )
            return
        kind = seat.helper or "worker"
        self._restarts[kind] = self._restarts.get(kind, 0) + 1
        now = time.monotonic()
        lived = now - worker.started
        seat.failures = seat.failures + 1 if lived < SHORT_LIFE else 0
        delay = min(FIRST_BACKOFF * 2 ** (seat.failures - 1), MAX_BACKOFF) if seat.failures else 0.0
        seat.retry_at = now + delay
        after = f" after {delay:g} s" if delay else ""
        log.error("%s (process %d) died: %s; replacing it%s", seat, worker.pid, how, after)

    # Reload

    def _begin_reload(self) -> None:
        assert self._reload is not None
        was = self._configured
        try:
            settings = ensure_secret_key(self._reload())
            tracing.check(settings)
            _check_tls(settings)
            if settings.control.enabled != was.control.enabled:
                raise StartError("to add or to remove the control plane needs a restart")
            if settings.control.enabled:
                from control.settings import check

                check(settings)
            if _has_daily_limits(settings) and self._shared.path is None:
                raise StartError("the first token with a daily limit needs a restart")
            self._shared.extend(_limited(settings))
        except Exception as error:
            # Whatever went wrong, the gateway that runs must not be stopped by it.
            self._reload_ended("failed")
            why = " ".join(str(error).split()) or type(error).__name__
            log.error("reload failed: %s; kept the old settings", why)
            return
        lasting = ("host", "port", "workers", "state_dir", "metrics_host", "metrics_port")
        kept = [name for name in lasting if getattr(settings, name) != getattr(was, name)]
        if kept:
            log.warning("a reload does not change %s: restart for that", ", ".join(kept))
        current = self._generation.settings
        logs.configure(settings.log_level, settings.log_format)
        same = {name: getattr(was, name) for name in lasting} | {"port": current.port}
        self._generation = _Generation(dataclasses.replace(settings, **same))
        self._reloading = True
        log.info("reloading")

    # Stopping

    def _drain(self, worker: _Worker) -> None:
        timeout = worker.generation.settings.limits.drain_timeout
        worker.kill_at = time.monotonic() + timeout + DRAIN_GRACE
        _send(worker, signal.SIGTERM)

    def _kill(self, worker: _Worker) -> None:
        worker.kill_at = None
        _send(worker, signal.SIGKILL)

    def _stop(self, status: int) -> None:
        """Drain everything and end with `status`."""
        self._status = status
        self._stopping = True
        for seat in self._seats:
            # New connections are refused from here on; a socket that only listens would let them wait for nobody.
            if seat.sock is not None:
                seat.sock.close()
            for worker in seat.workers():
                if worker is not seat.draining:
                    self._drain(worker)

    def _kill_all(self) -> None:
        for seat in self._seats:
            for worker in seat.workers():
                self._kill(worker)


def _send(worker: _Worker, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, number)


def _ignore(number: int, frame: object) -> None:
    """The wake-up descriptor carries the signal; a handler must be there all the same."""


def _die_with_parent(parent: int) -> None:
    """No worker outlives its supervisor, not even one that was killed: it would hold the port and the counters."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
