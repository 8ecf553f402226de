"""Every setting: its flag, its variable, its line in the file; in that order of precedence.

The table `SETTINGS` is the only place where a setting is described. The command
line, the reading of variables and files, and the page docs/configuration.md
(`redisgate.reference`) all come from it. Limits are settings of the table `[limits]` in the file.
"""

import argparse
import dataclasses
import datetime
import ipaddress
import os
import re
import secrets
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from redisgate.policy import Scope, validate_names
from resp.address import Address, parse_url
from resp.commands import bundled_table

SETTINGS_VERSION = 1
"""Of the file, as its line `settings_version` says; raised when the meaning of a setting changes or one goes away."""


SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
"""Of a connection to PostgreSQL."""


class ConfigError(Exception):
    """A setting is wrong. One line: where, what, and how to mend it; never a secret."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one worker; sizes in bytes, times in seconds."""

    max_target_bytes: int = 16 * 1024
    max_header_bytes: int = 32 * 1024
    max_body_bytes: int = 10 * 1024 * 1024
    max_pipelined_requests: int = 64
    max_client_buffer_bytes: int = 1024 * 1024
    max_connections: int = 65536
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    idle_timeout: float = 75.0
    write_timeout: float = 30.0
    drain_timeout: float = 30.0
    heartbeat_interval: float = 15.0


@dataclass(frozen=True)
class ControlSettings:
    """What the control plane is told; times in seconds, sizes in bytes. Without `database_url` there is none."""

    database_url: str = field(default="", repr=False)
    database_direct_url: str = field(default="", repr=False)
    database_migration_url: str = field(default="", repr=False)
    database_pool_size: int = 8
    migrate_on_start: bool = True
    mode: str = "production"
    public_url: str = ""
    registration: bool = True
    previous_secret_keys: tuple[str, ...] = field(default=(), repr=False)
    encryption_keys: tuple[str, ...] = field(default=(), repr=False)
    audit_key: str = field(default="", repr=False)
    argon2_time_cost: int = 2
    argon2_memory: int = 32 * 1024 * 1024
    argon2_parallelism: int = 1
    argon2_threads: int = 2
    session_lifetime: float = 12 * 3600.0
    reset_lifetime: float = 3600.0
    invitation_lifetime: float = 7 * 86400.0
    rotation_overlap: float = 86400.0
    purge_after: float = 7 * 86400.0
    mailer: str = "log"
    trusted_proxies: tuple[str, ...] = ()
    provisioner: str = "local"
    redis_server: str = ""
    instances_dir: str = ""
    allow_private_addresses: bool = False
    allowed_networks: tuple[str, ...] = ()
    price_per_100k_commands: float = 0.2
    price_per_gb: float = 0.03
    retain_minutes: float = 2 * 86400.0
    retain_hours: float = 60 * 86400.0
    retain_days: float = 730 * 86400.0

    @property
    def enabled(self) -> bool:
        """Whether there is a control plane at all."""
        return bool(self.database_url)


@dataclass(frozen=True)
class ClusterSettings:
    """What is told of a Kubernetes cluster."""

    kubernetes: str = "off"
    kubeconfig: str = ""
    kubernetes_context: str = ""
    kubernetes_namespace: str = ""
    kubernetes_watch: str = ""
    scale_memory_above: int = 0
    scale_memory_after: float = 600.0

    @property
    def enabled(self) -> bool:
        """Whether the instances of a cluster are served."""
        return self.kubernetes == "on"


@dataclass(frozen=True)
class InstanceConfig:
    """A Redis that tokens can name; times in seconds."""

    id: str
    address: Address
    slug: str = ""
    pool_size: int = 8
    max_waiting: int = 10_000
    connect_timeout: float = 2.0
    command_timeout: float = 10.0
    stall_timeout: float = 10.0
    idle_timeout: float = 60.0
    capacity: int | None = None
    """Bytes of its server's used_memory beyond which what needs more memory is refused."""


@dataclass(frozen=True)
class TokenConfig:
    """What one token may do."""

    token: str = field(repr=False)
    instance: str
    name: str
    scope: Scope = field(default_factory=Scope)
    expires: float | None = None
    """Unix seconds."""
    rate: int | None = None
    """Commands per second."""
    daily: int | None = None
    """Commands per UTC day."""
    user: str | None = None
    """The Redis user it acts as."""
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Settings:
    """All that a gateway is told."""

    host: str = "127.0.0.1"
    port: int = 3000
    workers: int = 1
    base_domain: str = ""
    tls_cert_file: tuple[str, ...] = ()
    tls_key_file: tuple[str, ...] = ()
    state_dir: Path = Path(".")
    secret_key: bytes = field(default=b"", repr=False)
    secret_key_is_default: bool = True
    cors_origins: tuple[str, ...] = ()
    log_level: str = "info"
    log_format: str = "text"
    access_log: str = "errors"
    access_log_sample: float = 1.0
    log_keys: bool = False
    slow_request: float = 1.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    metrics_instances: int = 50
    trace_endpoint: str = ""
    trace_ratio: float = 0.01
    limits: Limits = Limits()
    control: ControlSettings = ControlSettings()
    cluster: ClusterSettings = ClusterSettings()
    instances: tuple[InstanceConfig, ...] = ()
    tokens: tuple[TokenConfig, ...] = ()


# Kinds of values: from text or TOML to what Settings holds. Each raises ValueError with what it expects.

_SIZE = re.compile(r"(\d+)\s*([KMG]?)(?:i?B?)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", re.IGNORECASE)


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


def size(value: Any) -> int:
    """Bytes: 10485760 or "10MiB"."""
    match = _SIZE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if match is None or int(match[1]) == 0:
        raise ValueError('expected a size above zero such as 10485760 or "10MiB"')
    return int(match[1]) << 10 * " KMG".index(match[2].upper() or " ")


def duration(value: Any) -> float:
    """Seconds: 2.5 or "2500ms"."""
    match = _DURATION.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if match is None or float(match[1]) == 0:
        raise ValueError('expected a time above zero such as 30, "500ms" or "2m"')
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[(match[2] or "s").lower()]


def count(minimum: int, maximum: int) -> Callable[[Any], int]:
    """A whole number within bounds."""

    def parse(value: Any) -> int:
        digits = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"\d+", digits) or not minimum <= int(digits) <= maximum:
            raise ValueError(f"expected a whole number from {minimum} to {maximum}")
        return int(digits)

    return parse


def choice(*names: str) -> Callable[[Any], str]:
    """One of some words."""

    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return str(value)

    return parse


def names(value: Any) -> tuple[str, ...]:
    """A list, or text separated by commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("expected a list of texts")
    return tuple(item.strip() for item in items if item.strip())


def boolean(value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise ValueError("expected true or false")


def _parts(value: str) -> SplitResult | None:
    """The parts of a URL; None: it is none. What the library says of it would repeat a part of a password."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return None
    return parts


def database(value: Any) -> str:
    """The URL of a PostgreSQL database; its password is never repeated."""
    if not isinstance(value, str) or not value.startswith(("postgresql://", "postgres://")):
        raise ValueError("expected a URL such as postgresql://user:password@host:5432/database")
    # There may be several hosts, each with a port.
    scheme, _, rest = value.partition("://")
    server = re.split("[/?#]", rest, maxsplit=1)[0]
    end = rest[len(server) :]
    login, at, hosts = server.rpartition("@")
    for host in hosts.split(","):
        parts = _parts(f"{scheme}://{login}{at}{host}{end}")
        if parts is None or (not at and "@" in end):
            raise ValueError(
                "it cannot be read as postgresql://user:password@host:5432/database; in a user or password"
                " / ? # @ : % are written as %2F %3F %23 %40 %3A %25"
            )
        for mode in parse_qs(parts.query).get("sslmode", []):
            if mode not in SSL_MODES:
                raise ValueError(f"sslmode is one of {', '.join(SSL_MODES)}")
    return value


def public_url(value: Any) -> str:
    """The address that people open; `redisgate doctor` says whether it is a good one."""
    if not isinstance(value, str) or _parts(value) is None:
        raise ValueError("expected a URL such as https://redis.example.com")
    return value


def networks(value: Any) -> tuple[str, ...]:
    """Networks in CIDR notation, IPv4 and IPv6."""
    found = names(value)
    for item in found:
        try:
            ipaddress.ip_network(item)
        except ValueError:
            raise ValueError(f"{item!r} is no network such as 10.0.0.0/8 or fd00::/8") from None
    return found


def price(value: Any) -> float:
    """An amount of money, zero or more."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = -1.0
    if isinstance(value, bool) or not 0 <= found < 1e9:
        raise ValueError("expected an amount such as 0.2")
    return found


def ratio(value: Any) -> float:
    """A part of a whole."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = -1.0
    if isinstance(value, bool) or not 0 <= found <= 1:
        raise ValueError("expected a number from 0 to 1 such as 0.01")
    return found


def endpoint(value: Any) -> str:
    """The address of a service over HTTP."""
    if not isinstance(value, str) or (
        value and (re.fullmatch(r"https?://[^/\s]+(/\S*)?", value) is None or _parts(value) is None)
    ):
        raise ValueError("expected a URL such as http://127.0.0.1:4318")
    return value


@dataclass(frozen=True)
class Setting:
    """One setting; `name` is its attribute of `Settings` or, with a table, of that attribute of it."""

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    table: str = ""
    other_variable: str = ""
    """Read where `variable` is not set."""
    secret: bool = False
    """It has no flag: everybody on a machine sees the arguments of its processes."""

    @property
    def path(self) -> str:
        """Its line in the file."""
        return f"{self.table}.{self.name}" if self.table else self.name

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "REDISGATE_" + self.name.upper()


def _limit(name: str, parse: Callable[[Any], Any], help: str) -> Setting:
    return Setting(name, parse, getattr(Limits(), name), help, "limits")


def _control(name: str, parse: Callable[[Any], Any], help: str, other_variable: str = "") -> Setting:
    return Setting(name, parse, getattr(ControlSettings(), name), help, "control", other_variable)


def _cluster(name: str, parse: Callable[[Any], Any], help: str, other_variable: str = "") -> Setting:
    return Setting(name, parse, getattr(ClusterSettings(), name), help, "cluster", other_variable)


SETTINGS: tuple[Setting, ...] = (
    Setting("host", text, "127.0.0.1", "address to listen on; 0.0.0.0 or :: for all"),
    Setting("port", count(0, 65535), 3000, "port to listen on; 0 picks a free one"),
    Setting("workers", count(1, 256), None, "worker processes; by default one per core"),
    Setting("base_domain", text, "", "wildcard domain: <slug>.<base_domain> names an instance"),
    Setting(
        "tls_cert_file",
        names,
        (),
        "certificate (PEM, with its chain); the port then speaks HTTPS. Of several, each is for the names it carries,"
        " and the first also for everybody else. Changed files are taken up at once",
    ),
    Setting("tls_key_file", names, (), "its key (PEM); of several, in the same order"),
    Setting("state_dir", text, None, "directory for daily counts and the generated secret key"),
    Setting(
        "secret_key",
        text,
        None,
        "key that signs and encrypts what this gateway hands out; by default generated and kept in state_dir",
    ),
    Setting("cors_origins", names, (), "origins that browsers may call from, or *"),
    Setting("log_level", choice("debug", "info", "warning", "error"), "info", "what is logged"),
    Setting("log_format", choice("text", "json"), "text", "how it is logged"),
    Setting(
        "access_log", choice("off", "errors", "all"), "errors", "requests that are logged; errors: and slow ones too"
    ),
    Setting(
        "access_log_sample", ratio, 1.0, "part of the requests that access_log=all logs; failed ones are all logged"
    ),
    Setting("log_keys", boolean, False, "whether the log may show the first argument of a command in a path: its key"),
    Setting("slow_request", duration, 1.0, "a request that waits longer for Redis is logged"),
    Setting("metrics_host", text, "127.0.0.1", "address that metrics are served at"),
    Setting("metrics_port", count(0, 65535), 0, "port of /metrics, for Prometheus; 0: none"),
    Setting("metrics_instances", count(0, 1000), 50, "instances that metrics name, the busiest; the rest together"),
    Setting(
        "trace_endpoint",
        endpoint,
        "",
        "OpenTelemetry collector (OTLP over HTTP), as http://127.0.0.1:4318; none: no traces",
    ),
    Setting("trace_ratio", ratio, 0.01, "part of the requests that are traced, unless a client that may decides"),
    _limit("max_target_bytes", size, "longest request target, else 414"),
    _limit("max_header_bytes", size, "largest header block, else 431"),
    _limit("max_body_bytes", size, "largest request body, else 413"),
    _limit(
        "max_pipelined_requests", count(1, 10_000), "requests under way on one client connection; then reading pauses"
    ),
    _limit("max_client_buffer_bytes", size, "bytes a stream's client may leave unread before it is cut off"),
    _limit("max_connections", count(1, 1_000_000), "client connections of one worker; more are closed at once"),
    _limit("header_timeout", duration, "for the header block to arrive, else 408"),
    _limit("body_timeout", duration, "for the body to arrive (and 1 s more for each 16 KiB), else 408"),
    _limit("idle_timeout", duration, "before an idle client connection is closed"),
    _limit("write_timeout", duration, "for a client to take its answers, else its connection is closed"),
    _limit("drain_timeout", duration, "for requests under way to finish when stopping"),
    _limit("heartbeat_interval", duration, "between comment lines on a quiet stream"),
    _control("database_url", database, "PostgreSQL of the control plane; without it there is none", "DATABASE_URL"),
    _control(
        "database_direct_url",
        database,
        "the same database past a connection pooler, for LISTEN and locks; by default database_url",
        "DATABASE_DIRECT_URL",
    ),
    _control(
        "database_migration_url",
        database,
        "the same database as the role that owns the tables; by default database_direct_url. With a role of its own,"
        " the application cannot change the audit log, whoever takes it over",
    ),
    _control("database_pool_size", count(1, 1000), "database connections of one worker"),
    _control("migrate_on_start", boolean, "apply migrations when starting; false: `redisgate migrate` does"),
    _control("mode", choice("dev", "production"), "production refuses weak and generated secrets"),
    _control("public_url", public_url, "address that links in mails and instances' addresses begin with"),
    _control("registration", boolean, "whether anybody may register"),
    _control("previous_secret_keys", names, "older values of secret_key whose tokens are still taken"),
    _control(
        "encryption_keys",
        names,
        "what secrets in the database are encrypted under, newest first; by default secret_key",
    ),
    _control("audit_key", text, "key of the audit log's chain; by default derived from secret_key"),
    _control("argon2_time_cost", count(1, 100), "passes of argon2id over its memory"),
    _control("argon2_memory", size, "memory of one argon2id hash"),
    _control("argon2_parallelism", count(1, 64), "lanes of argon2id"),
    _control("argon2_threads", count(1, 64), "passwords that one worker hashes at once; more wait"),
    _control("session_lifetime", duration, "of a session token"),
    _control("reset_lifetime", duration, "of a password reset token"),
    _control("invitation_lifetime", duration, "of an invitation"),
    _control("rotation_overlap", duration, "an API key that was rotated goes on working; an instance's token does not"),
    _control("purge_after", duration, "a deleted instance can be restored; then its data is gone"),
    _control("mailer", text, "log, or module:function that sends a mail"),
    _control("trusted_proxies", networks, "networks whose X-Forwarded-For and X-Forwarded-Proto are believed"),
    _control(
        "provisioner",
        choice("local", "external", "kubernetes"),
        "where an instance without a URL of its own comes from",
    ),
    _control("redis_server", text, "program of local instances; by default redis-server or valkey-server on PATH"),
    _control("instances_dir", text, "data of local instances; by default instances in state_dir"),
    _control("allow_private_addresses", boolean, "whether external instances may be at private addresses"),
    _control("allowed_networks", networks, "networks that external instances may be at all the same"),
    _control("price_per_100k_commands", price, "what usage is priced by"),
    _control("price_per_gb", price, "what traffic is priced by"),
    _control("retain_minutes", duration, "usage by the minute is kept"),
    _control("retain_hours", duration, "usage by the hour is kept"),
    _control("retain_days", duration, "usage by the day is kept"),
    _cluster("kubernetes", choice("off", "on"), "on: serve the RedisHttpInstances of a cluster, without a restart"),
    _cluster(
        "kubeconfig",
        text,
        "file that says how to reach the cluster; by default the pod's service account, else ~/.kube/config",
        "KUBECONFIG",
    ),
    _cluster("kubernetes_context", text, "context of that file; by default its current one"),
    _cluster(
        "kubernetes_namespace",
        text,
        "where the gateway runs and the operator leaves it the routes; by default the pod's, else redisgate",
    ),
    _cluster("kubernetes_watch", text, "the only namespace whose RedisHttpInstances count; by default all do"),
    _cluster(
        "scale_memory_above",
        count(0, 99),
        "percent of its memory that an instance of the control plane may use before it grows by half; 0: none grows",
    ),
    _cluster("scale_memory_after", duration, "it has to use so much without a break before it grows"),
)

_POOL = InstanceConfig("", Address())
INSTANCE_KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "id": (text, "name in /redis/<id>/…; required"),
    "slug": (text, "another name, and its label under base_domain; by default the id"),
    "url": (text, "redis://, rediss:// or unix:// URL; or url_env"),
    "url_env": (text, "variable that holds the URL"),
    "tls_ca_file": (text, "certificate authorities to trust"),
    "tls_cert_file": (text, "client certificate"),
    "tls_key_file": (text, "its key"),
    "tls_server_name": (text, "name the server's certificate must have"),
    "tls_verify": (boolean, "false: do not verify the server (only for tests)"),
    "pool_size": (count(2, 1000), f"connections per worker (default {_POOL.pool_size})"),
    "max_waiting": (count(1, 10_000_000), f"requests waiting per worker, then 503 (default {_POOL.max_waiting})"),
    "connect_timeout": (duration, f"seconds (default {_POOL.connect_timeout:g})"),
    "command_timeout": (duration, f"seconds, then 504 (default {_POOL.command_timeout:g})"),
    "stall_timeout": (
        duration,
        f"seconds of silence after a 504 before the connection is closed (default {_POOL.stall_timeout:g})",
    ),
    "capacity": (size, "of the server's used_memory; beyond it commands that need more are refused (scripts are not)"),
    "idle_timeout": (duration, f"seconds before unused connections are closed (default {_POOL.idle_timeout:g})"),
}
TOKEN_KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "token": (text, "the secret; or token_env or token_file"),
    "token_env": (text, "variable that holds it"),
    "token_file": (text, "file that holds it"),
    "instance": (text, "id of its instance; required unless there is only one"),
    "name": (text, "what logs and counts call it; required"),
    "readonly": (boolean, "only commands that read"),
    "allow": (names, 'commands and "@categories" it may run; nothing: all'),
    "deny": (names, "commands and categories it may not run; wins over allow"),
    "prefixes": (names, "key prefixes; only commands all of whose keys have one"),
    "expires": (lambda value: value, "date and time, or unix seconds"),
    "rate": (count(1, 10_000_000), "commands per second"),
    "daily": (count(1, 10**12), "commands per UTC day"),
    "user": (text, "Redis user it acts as"),
    "password": (text, "that user's password; or password_env"),
    "password_env": (text, "variable that holds it"),
}


# One instance needs no tables: `redis_url` and these make an instance called "default".
SINGLE: tuple[Setting, ...] = (
    Setting("redis_url", text, None, "redis://, rediss:// or unix:// URL"),
    *[
        Setting(f"redis_{key}", parse, None, help)
        for key, (parse, help) in INSTANCE_KEYS.items()
        if key not in ("id", "slug", "url", "url_env")
    ],
    Setting("token", text, None, "its token for everything", secret=True),
    Setting("token_file", text, None, "file that holds that token"),
    Setting("readonly_token", text, None, "its token for reading", secret=True),
    Setting("readonly_token_file", text, None, "file that holds that one"),
    Setting("srh_tokens", text, None, "tokens.json of serverless-redis-http"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of all settings, for `redisgate serve`."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings, instances and tokens")
    for setting in (*SETTINGS, *SINGLE):
        if setting.secret:
            continue
        parser.add_argument(setting.flag, metavar=setting.name.upper(), dest=setting.name, help=setting.help)


def _warn(text: str) -> None:
    print(f"redisgate: warning: {text}", file=sys.stderr)


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], cwd: Path, warn: Callable[[str], None] = _warn
) -> Settings:
    """The settings from flags (a parsed command line's `vars()`), variables and file; `warn` hears of what is odd.

    Raises:
        ConfigError: one of them is wrong.
    """
    from redisgate import srh

    path = flags.get("config") or environ.get("REDISGATE_CONFIG")
    document = _read_file(cwd / path) if path else {}
    where = str(path)
    version = document.pop("settings_version", SETTINGS_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"{path}: settings_version: expected a whole number such as {SETTINGS_VERSION}")
    if version > SETTINGS_VERSION:
        raise ConfigError(
            f"{path} is written for a newer release: its settings_version is {version}, and this release knows up to"
            f" {SETTINGS_VERSION}; upgrade, or use the file of before"
        )
    tables = {name: document.pop(name, {}) for name in ("limits", "control", "cluster")}
    instance_tables = _tables(document, "instances", where)
    token_tables = _tables(document, "tokens", where)
    tables[""] = document
    values: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        known = {setting.name for setting in (*SETTINGS, *SINGLE) if setting.table == name}
        _check_keys(table, known, where, f"{name}." * bool(name))
        values[name] = {}
    for setting in SETTINGS:
        values[setting.table][setting.name] = _value(setting, flags, environ, tables[setting.table], where)
    general = values[""]
    single = {
        setting.name: value
        for setting in SINGLE
        if (value := _value(setting, flags, environ, document, where)) is not None
    }
    srh_tokens = single.pop("srh_tokens", None)
    instances, tokens = _single(single, environ, cwd, others=bool(token_tables))
    instances += [_instance(table, index, where, environ) for index, table in enumerate(instance_tables)]
    instance_ids = {instance.id for instance in instances}
    tokens += [_token(table, index, where, environ, instance_ids, cwd) for index, table in enumerate(token_tables)]
    if not instances or srh_tokens is not None or srh.is_set(environ):
        found = srh.load(environ, cwd, srh_tokens)
        if found is not None:
            instances += found.instances
            tokens += found.tokens
            if flags.get("port") is None and "REDISGATE_PORT" not in environ and "port" not in document:
                general["port"] = found.port
            if flags.get("host") is None and "REDISGATE_HOST" not in environ and "host" not in document:
                general["host"] = found.host
    _check_unique(instances, tokens)
    if instances and not tokens:
        warn("there is no token, so every command will be answered 401")
    known_variables = {setting.variable for setting in (*SETTINGS, *SINGLE)} | {"REDISGATE_CONFIG"}
    known_variables |= {setting.other_variable for setting in SETTINGS}
    known_variables |= {
        table[key] for table in [*instance_tables, *token_tables] for key in table if key.endswith("_env")
    }
    for name in environ:
        if name.startswith("REDISGATE_") and name not in known_variables:
            warn(f"the variable {name} is no setting; see docs/configuration.md")
    state_dir = Path(general.pop("state_dir") or default_state_dir(environ))
    secret = general.pop("secret_key")
    if secret is not None and len(secret) < 16:
        raise ConfigError("REDISGATE_SECRET_KEY is shorter than 16 characters; `openssl rand -hex 32` makes a good one")
    for name in ("tls_cert_file", "tls_key_file"):
        general[name] = tuple(str(cwd / path) for path in general[name])
    general["workers"] = general["workers"] or len(os.sched_getaffinity(0))
    return Settings(
        **general,
        state_dir=cwd / state_dir,
        secret_key=secret.encode() if secret is not None else b"",
        secret_key_is_default=secret is None,
        limits=Limits(**values["limits"]),
        control=ControlSettings(**values["control"]),
        cluster=ClusterSettings(**values["cluster"]),
        instances=tuple(instances),
        tokens=tuple(tokens),
    )


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """`/var/lib/redisgate` for root, else the user's state directory (XDG)."""
    if os.geteuid() == 0:
        return Path("/var/lib/redisgate")
    base = environ.get("XDG_STATE_HOME")
    return Path(base or Path(environ.get("HOME", "/tmp")) / ".local" / "state") / "redisgate"


def ensure_secret_key(settings: Settings) -> Settings:
    """Settings with a secret key: the given one, or one generated once and kept in the state directory.

    Raises:
        ConfigError: it can be neither read nor written.
    """
    if settings.secret_key:
        return settings
    path = settings.state_dir / "secret.key"
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_text().strip()
        else:
            key = secrets.token_hex(32)
            with os.fdopen(descriptor, "w") as file:
                file.write(key + "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot keep a secret key in {path}: {error.strerror}; set REDISGATE_SECRET_KEY or a writable"
            " REDISGATE_STATE_DIR"
        ) from error
    if len(key) < 16:
        raise ConfigError(f"{path} does not hold a secret key; remove it to have a new one made")
    return dataclasses.replace(settings, secret_key=key.encode())


def _value(
    setting: Setting, flags: Mapping[str, Any], environ: Mapping[str, str], table: Mapping[str, Any], file: str
) -> Any:
    for source, raw in (
        (setting.flag, flags.get(setting.name)),
        (setting.variable, environ.get(setting.variable)),
        (setting.other_variable, environ.get(setting.other_variable) if setting.other_variable else None),
        (f"{file}: {setting.path}", table.get(setting.name)),
    ):
        if raw is not None:
            return _parse(setting.parse, raw, source)
    return setting.default


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _parse(parse: Callable[[Any], Any], value: Any, source: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_keys(table: Any, known: set[str], where: str, prefix: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} is not a table")
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {prefix}{key}; known are {', '.join(sorted(known))}")


def _tables(document: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    tables = document.pop(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{where}: {name} is no list of tables; each of them begins with a line [[{name}]]")
    return tables


def _table(table: Any, keys: Mapping[str, tuple[Callable[[Any], Any], str]], where: str) -> dict[str, Any]:
    _check_keys(table, set(keys), where, "")
    return {key: _parse(keys[key][0], value, f"{where}: {key}") for key, value in table.items()}


def _secret(values: dict[str, Any], key: str, where: str, environ: Mapping[str, str], cwd: Path | None) -> str | None:
    value: str | None = values.pop(key, None)
    variable: str | None = values.pop(f"{key}_env", None)
    path: str | None = values.pop(f"{key}_file", None)
    if variable is not None:
        value = environ.get(variable)
        if value is None:
            raise ConfigError(f"{where}: {key}_env names the variable {variable}, which is not set")
    if path is not None and cwd is not None:
        try:
            value = (cwd / path).read_text().strip()
        except OSError as error:
            raise ConfigError(f"{where}: cannot read {path}: {error.strerror}") from error
    return value


def _instance(table: Any, index: int, file: str, environ: Mapping[str, str]) -> InstanceConfig:
    where = f"{file}: instances[{index}]"
    values = _table(table, INSTANCE_KEYS, where)
    if not values.get("id"):
        raise ConfigError(f"{where} has no id")
    for key in ("id", "slug"):
        if key in values and _NAME.fullmatch(values[key]) is None:
            raise ConfigError(
                f"{where}: {key}: expected 1 to 63 letters, digits, dots, hyphens, underscores; not .-_ first"
            )
    url = _secret(values, "url", where, environ, None)
    if not url:
        raise ConfigError(f"{where} has no url")
    return _with_address(url, values, f"{where}: ")


def _with_address(url: str, values: dict[str, Any], where: str) -> InstanceConfig:
    """An instance from its URL and the other values of its table."""
    address = _address(url, where.removesuffix(": "))
    tls = {
        key: values.pop(f"tls_{key}")
        for key in ("ca_file", "cert_file", "key_file", "server_name", "verify")
        if f"tls_{key}" in values
    }
    if tls and not address.tls:
        raise ConfigError(f"{where}tls_ settings need a rediss:// URL")
    return InstanceConfig(address=dataclasses.replace(address, **tls), **{"slug": values["id"], **values})


def _address(url: str, where: str) -> Address:
    try:
        return parse_url(url)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _token(
    table: Any, index: int, file: str, environ: Mapping[str, str], instance_ids: Set[str], cwd: Path
) -> TokenConfig:
    where = f"{file}: tokens[{index}]"
    values = _table(table, TOKEN_KEYS, where)
    name = values.pop("name", None)
    if not name:
        raise ConfigError(f"{where} has no name")
    where = f"{where} ({name})"
    token = _secret(values, "token", where, environ, cwd)
    if not token:
        raise ConfigError(f"{where} has no token")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where}: a token is printable ASCII without spaces")
    password = _secret(values, "password", where, environ, None)
    if len(instance_ids) == 1:
        values.setdefault("instance", next(iter(instance_ids)))
    if values.get("instance") not in instance_ids:
        raise ConfigError(f"{where}: there is no instance {values.get('instance')!r}")
    user = values.pop("user", None)
    if password is not None and user is None:
        raise ConfigError(f"{where} has a password but no user")
    scope = Scope(
        readonly=values.pop("readonly", False),
        allow=frozenset(item.lower() for item in values.pop("allow", ())),
        deny=frozenset(item.lower() for item in values.pop("deny", ())),
        prefixes=tuple(prefix.encode() for prefix in values.pop("prefixes", ())),
        own_user=user is not None,
    )
    problems = validate_names(scope, bundled_table())
    if problems:
        raise ConfigError(f"{where}: {problems[0]}")
    expires = values.pop("expires", None)
    if isinstance(expires, datetime.datetime):
        if expires.tzinfo is None:
            raise ConfigError(f"{where}: expires needs a time zone, as in 2030-01-01T00:00:00Z")
        expires = expires.timestamp()
    elif expires is not None and (isinstance(expires, bool) or not isinstance(expires, int | float)):
        raise ConfigError(f"{where}: expires is a date and time such as 2030-01-01T00:00:00Z, or unix seconds")
    return TokenConfig(token=token, name=name, scope=scope, expires=expires, user=user, password=password, **values)


def _single(
    values: dict[str, Any], environ: Mapping[str, str], cwd: Path, *, others: bool
) -> tuple[list[InstanceConfig], list[TokenConfig]]:
    """The instance that needs no tables, and its tokens; `others`: the file has tokens too."""
    if not values:
        return [], []
    given = [
        (name, _secret(values, key, f"REDISGATE_{key.upper()}_FILE", environ, cwd), readonly)
        for name, key, readonly in (("default", "token", False), ("readonly", "readonly_token", True))
    ]
    url = values.pop("redis_url", None)
    if url is None:
        if any(token for _, token, _ in given):
            raise ConfigError("REDISGATE_TOKEN is set, but not REDISGATE_REDIS_URL")
        if values:
            name = next(iter(values))
            raise ConfigError(f"{name} is set, but not redis_url; an instance of the file has settings of its own")
        return [], []
    if not others and not any(token for _, token, _ in given):
        raise ConfigError(
            "REDISGATE_REDIS_URL is set, but not REDISGATE_TOKEN; `openssl rand -hex 32` makes a good one"
        )
    settings = {key.removeprefix("redis_"): value for key, value in values.items()}
    instance = _with_address(url, {"id": "default", **settings}, "REDISGATE_REDIS_URL: ")
    tokens = []
    for name, token, readonly in given:
        if token:
            if not token.isascii() or not token.isprintable() or " " in token:
                raise ConfigError(f"the {name} token: a token is printable ASCII without spaces")
            tokens.append(TokenConfig(token=token, instance="default", name=name, scope=Scope(readonly=readonly)))
    return [instance], tokens


def _check_unique(instances: Sequence[InstanceConfig], tokens: Sequence[TokenConfig]) -> None:
    names: set[str] = set()
    for instance in instances:
        for name in {instance.id.lower(), instance.slug.lower()}:
            if name in names:
                raise ConfigError(f"two instances are called {name!r}")
            names.add(name)
    seen: dict[str, str] = {}
    token_names: set[str] = set()
    for token in tokens:
        if token.token in seen:
            raise ConfigError(f"the tokens {seen[token.token]!r} and {token.name!r} are the same")
        if token.name in token_names:
            raise ConfigError(f"two tokens are called {token.name!r}")
        seen[token.token] = token.name
        token_names.add(token.name)
