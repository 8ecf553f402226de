"""`redisgate doctor`: all that has to be right around a gateway, looked at from where it runs; what is not, and a cure.

It changes nothing. Run it as the user, on the machine and with the settings of the gateway: file rights, limits and
ports are judged for whoever runs it.
"""

import contextlib
import ctypes
import datetime
import http.client
import json
import os
import resource
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import redisgate
from redisgate import tls
from redisgate.check import CERTIFICATE_DAYS, look_at_instances
from redisgate.config import ConfigError, Settings
from redisgate.findings import Finding, Report
from redisgate.units import bytes_text

MIN_FREE_BYTES: Final = 256 * 1024 * 1024
"""On the file system of the state directory."""
MIN_FILES: Final = 1024
"""File descriptors without which a worker serves nobody for long."""
SPARE_FILES: Final = 256
"""File descriptors of one worker beyond its clients' connections: pools, the database, logs."""
URGENT_DAYS: Final = 7
"""Before a certificate ends it must be renewed."""
ANSWER_SECONDS: Final = 3.0
"""For a gateway that runs to answer."""

_TIME_ERROR = 5  # adjtimex(2): the kernel's clock is not synchronized
_KERNEL = Path("/proc/sys")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

Control = Callable[[Settings], list[Finding]]


def run_doctor(
    load: Callable[[Callable[[str], None]], Settings],
    config: Path | None,
    controls: Mapping[str, Control],
    *,
    as_json: bool,
) -> int:
    """Print a report; returns 0 if nothing is wrong, 1 if something is, 2 if the settings cannot be read.

    `load` reads the settings, and hands on what is odd about them; `config` is their file; `controls` look at
    what this package knows nothing of, by its name.
    """
    report = Report()
    report.about("settings")
    status = 0
    try:
        settings = load(report.note)
    except ConfigError as error:
        report.wrong(str(error), "change that setting; docs/configuration.md says what each of them expects")
        status = 2
    else:
        examine(settings, config, controls, report)
        status = int(report.failed)
    print(report.json() if as_json else report.text())
    return status


def examine(settings: Settings, config: Path | None, controls: Mapping[str, Control], report: Report) -> None:
    """Look at everything; what cannot be looked at is a finding, too."""
    _carefully(report, lambda: _look_at_settings(settings, config, report))
    _carefully(report, lambda: _look_at_machine(settings, report))
    _carefully(report, lambda: _look_at_state_dir(settings, report))
    _carefully(report, lambda: _look_at_tls(settings, report))
    _carefully(report, lambda: _look_at_ports(settings, report))
    _carefully(report, lambda: _look_at_metrics(settings, report))
    _carefully(report, lambda: _look_at_collector(settings, report))
    for subject, control in controls.items():
        report.about(subject)
        _carefully(report, lambda control=control: report.add(control(settings)))  # type: ignore[misc]
    report.about("instances")
    _carefully(report, lambda: look_at_instances(settings, report))


def _carefully(report: Report, work: Callable[[], object]) -> None:
    try:
        work()
    except ModuleNotFoundError as error:
        report.wrong(f"{error.name} is not installed", "pip install 'redisgate[kubernetes]'")
    except Exception as error:
        report.wrong(
            f"it could not be looked at: {type(error).__name__}: {error}",
            "mend what is said there; if that is no mistake of yours, tell us",
        )


# Settings


def _look_at_settings(settings: Settings, config: Path | None, report: Report) -> None:
    if not settings.instances and not settings.control.enabled and not settings.cluster.enabled:
        report.wrong(
            "no Redis is configured, so there is nothing to serve",
            "set REDISGATE_REDIS_URL and REDISGATE_TOKEN, or name a file with instances by --config, or a PostgreSQL"
            " by DATABASE_URL",
        )
    else:
        report.ok("they can be read")
    if config is not None:
        _look_at_rights(config, "the file of settings, which holds secrets", report)
    if settings.secret_key_is_default:
        key = settings.state_dir / "secret.key"
        if key.exists():
            _look_at_rights(key, "the secret key", report)
    control = settings.control
    if control.enabled and control.mode == "dev":
        report.note(
            "mode is dev: weak secrets are taken, and links of mails are logged",
            "set REDISGATE_MODE=production where anything is at stake",
        )
    if control.enabled and control.public_url:
        parts = urlsplit(control.public_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            report.wrong(
                f"public_url is {control.public_url!r}, which is no address that a browser could open",
                "set it to what people open, such as https://redis.example.com",
            )
    elif control.enabled and control.mode == "production":
        report.note(
            "public_url is not set: links in mails and instances' addresses begin with this machine's own address",
            "set it to what people open, such as https://redis.example.com",
        )


def _look_at_rights(path: Path, what: str, report: Report) -> None:
    """Whether anybody else on the machine reads a file."""
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o004:
            report.wrong(f"{path}, {what}, can be read by every user of this machine", f"chmod o-rwx {path}")


# The machine


def _look_at_machine(settings: Settings, report: Report) -> None:
    report.about("machine")
    python = ".".join(map(str, sys.version_info[:3]))
    report.ok(f"RedisGate {redisgate.__version__} ({redisgate.build_form()}), Python {python}, {os.uname().sysname}")
    if "pure" in redisgate.build_form():
        report.note(
            "this build is pure Python, which serves fewer requests",
            "install a wheel, or build where there is a C compiler",
        )
    _look_at_files(settings, report)
    _look_at_clock(report)
    waiting = _kernel("net/core/somaxconn")
    if waiting is not None and waiting < 1024:
        report.note(
            f"the kernel lets {waiting} connections wait to be accepted; more are lost in a rush",
            "sysctl net.core.somaxconn=4096",
        )
    if settings.control.enabled and settings.control.provisioner == "local":
        if _kernel("vm/overcommit_memory") == 2:
            report.wrong(
                "the kernel promises no more memory than there is: a local Redis that forks to save its data may fail",
                "sysctl vm.overcommit_memory=1",
            )
        elif _kernel("vm/overcommit_memory") == 0:
            report.note(
                "a local Redis that is larger than half of the free memory may fail to save its data",
                "sysctl vm.overcommit_memory=1",
            )


def _kernel(name: str) -> int | None:
    """A parameter of the kernel; None where there is none."""
    try:
        return int((_KERNEL / name).read_text())
    except (OSError, ValueError):
        return None


def _look_at_files(settings: Settings, report: Report) -> None:
    """`serve` raises the soft limit to the hard one, which is what counts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.limits.max_connections + SPARE_FILES
    cure = "raise it: LimitNOFILE= in the systemd unit, ulimit -n, or --ulimit nofile= of the container"
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        report.ok(f"{'any number of' if hard == resource.RLIM_INFINITY else hard} files per process")
    elif hard < MIN_FILES:
        report.wrong(f"a process may have only {hard} files open, and every connection is one", cure)
    else:
        report.note(
            f"a process may have {hard} files open: a worker takes {hard - SPARE_FILES} clients, not the"
            f" {settings.limits.max_connections} of max_connections",
            cure,
        )


def _look_at_clock(report: Report) -> None:
    now = time.time()
    if now < _release_time():
        report.wrong(
            f"this machine's clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}, which is over: tokens and"
            " certificates that are good look as if they were not",
            "have it set by NTP (chrony, systemd-timesyncd)",
        )
        return
    buffer = ctypes.create_string_buffer(512)  # a struct timex of zeros asks and sets nothing
    with contextlib.suppress(AttributeError, OSError):
        if ctypes.CDLL(None).adjtimex(buffer) == _TIME_ERROR:
            report.note(
                "the kernel does not know of anything that keeps this machine's clock right",
                "have it set by NTP (chrony, systemd-timesyncd), unless the host of this machine does",
            )


def _release_time() -> float:
    """When this release was installed or made: no clock is right that is before it."""
    return Path(__file__).stat().st_mtime


def _look_at_state_dir(settings: Settings, report: Report) -> None:
    directory = settings.state_dir
    report.about(f"state directory {directory}")
    existing = next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))
    if not existing.is_dir():
        report.wrong(f"{existing} is no directory", "set REDISGATE_STATE_DIR to one that can be written")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        report.wrong(
            f"{existing} cannot be written by this user",
            "give it to the user that runs the gateway, or set REDISGATE_STATE_DIR",
        )
        return
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        report.wrong(
            f"only {bytes_text(free)} are free there: counts, and data of local instances, may not be written",
            "make room, or set REDISGATE_STATE_DIR to a larger file system",
        )
    else:
        report.ok(f"can be written, {bytes_text(free)} free")


# TLS of the gateway itself


def _look_at_tls(settings: Settings, report: Report) -> None:
    report.about("TLS")
    if not settings.tls_cert_file and not settings.tls_key_file:
        public = settings.control.public_url.startswith("https://")
        if settings.host not in _LOOPBACK and not public:
            report.note(
                f"the gateway listens on {settings.host} without TLS: tokens can be read on the way",
                "set tls_cert_file and tls_key_file, or let only a proxy that speaks HTTPS reach it",
            )
        if public and settings.control.enabled and not settings.control.trusted_proxies:
            report.note(
                "people come by https, so a proxy is in front, but trusted_proxies names none: every client has the"
                " proxy's address, and their failures to sign in are counted together",
                "set REDISGATE_TRUSTED_PROXIES to the proxy's network",
            )
        return
    try:
        pairs = tls.pairs(settings)
        tls.load_context(pairs)
    except ConfigError as error:
        report.wrong(str(error), "mend that file, or name another one")
        return
    names: list[str] = []
    for pair in pairs:
        names += _look_at_certificate(pair, report)
    wanted = [urlsplit(settings.control.public_url).hostname] if settings.control.public_url else []
    if settings.base_domain:
        wanted += [settings.base_domain, f"any-instance.{settings.base_domain}"]
    for host in wanted:
        if host and not tls.covers(names, host):
            shown = host.replace("any-instance.", "*.")
            report.wrong(
                f"no certificate is good for {shown}: clients that go there will refuse it",
                f"have one made for {shown}, and name it in tls_cert_file and tls_key_file",
            )


def _look_at_certificate(pair: tls.Pair, report: Report) -> list[str]:
    """Its dates, chain and key; returns the names that it is good for."""
    chain = tls.read_certificate(pair.cert)
    first = chain[0]
    names = tls.names_of(first)
    now = datetime.datetime.now(datetime.UTC)
    if not names:
        report.wrong(
            f"{pair.cert} carries no names (subjectAltName), so clients refuse it", "have one made with its names"
        )
    if first.not_valid_before_utc > now:
        report.wrong(
            f"{pair.cert} is not good before {first.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "set this machine's clock, or have another one made",
        )
    for index, certificate in enumerate(chain):
        days = (certificate.not_valid_after_utc - now) / datetime.timedelta(days=1)
        what = f"{pair.cert} for {', '.join(names)}" if index == 0 else f"a certificate in the chain of {pair.cert}"
        if days < 0:
            report.wrong(f"{what} has ended at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", _RENEW)
        elif days < URGENT_DAYS:
            report.wrong(f"{what} ends in {days:.1f} days", _RENEW)
        elif days < CERTIFICATE_DAYS:
            report.note(f"{what} ends in {days:.0f} days", _RENEW)
        elif index == 0:
            report.ok(f"{what}, until {certificate.not_valid_after_utc:%Y-%m-%d}")
    if first.issuer == first.subject:
        report.note(f"{pair.cert} is certified by nobody", "clients must be told to trust it; others refuse it")
    if pair.key.stat().st_mode & 0o004:
        report.wrong(f"{pair.key}, a private key, can be read by every user of this machine", f"chmod o-rwx {pair.key}")
    return names


_RENEW: Final = "renew it; the gateway takes up the new files by itself"


# Ports


def _look_at_ports(settings: Settings, report: Report) -> None:
    report.about(f"port {settings.port}")
    if settings.port == 0:
        report.note("a free one is taken at each start")
    elif not _can_bind(settings.host, settings.port, report):
        return
    else:
        report.ok(f"can be listened on at {settings.host}")


def _look_at_metrics(settings: Settings, report: Report) -> None:
    port = settings.metrics_port
    if not port:
        return
    report.about(f"metrics port {port}")
    if port == settings.port:
        report.wrong("the gateway itself listens on this port", "choose another one for REDISGATE_METRICS_PORT")
        return
    if _can_bind(settings.metrics_host, port, report, ("REDISGATE_METRICS_HOST", "/status")):
        report.ok(f"can be listened on at {settings.metrics_host}")
    if settings.metrics_host not in _LOOPBACK:
        report.note(
            f"whoever reaches {settings.metrics_host} reads the metrics, and in them the names of instances",
            "set REDISGATE_METRICS_HOST to 127.0.0.1, or let only Prometheus through",
        )


def _look_at_collector(settings: Settings, report: Report) -> None:
    if not settings.trace_endpoint:
        return
    report.about("traces")
    parts = urlsplit(settings.trace_endpoint)
    address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection(address, ANSWER_SECONDS).close()
    except OSError as error:
        report.wrong(
            f"no collector can be reached at {settings.trace_endpoint}: {error.strerror or error}",
            "start it, or set REDISGATE_TRACE_ENDPOINT to where it takes OTLP over HTTP; spans are dropped until then",
        )
    else:
        report.ok(f"something listens at {settings.trace_endpoint}")


def _can_bind(host: str, port: int, report: Report, ours: tuple[str, str] = ("REDISGATE_HOST", "/version")) -> bool:
    """Whether the gateway could listen there; says so if not, or if one does already.

    `ours`: the setting of that address, and the path where a gateway says its version.
    """
    from redisgate.supervisor import StartError, bind

    try:
        for sock in bind(host, port, 1):
            sock.close()
    except StartError as error:
        running = _running(host, port, ours[1])
        if running is not None:
            report.ok(f"a RedisGate {running} serves there")
        elif isinstance(error.__cause__, PermissionError):
            report.wrong(
                f"{error}: ports below 1024 are for root",
                "choose a higher port, or allow it: AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit",
            )
        elif isinstance(error.__cause__, OSError) and "in use" in str(error):
            report.wrong(
                str(error).partition(";")[0] + " by something that is no RedisGate",
                f"end what listens there (`ss -ltnp 'sport = :{port}'` names it), or choose another port",
            )
        else:
            report.wrong(str(error), f"set {ours[0]} to an address of this machine; 0.0.0.0 or :: for all")
        return False
    return True


def _running(host: str, port: int, path: str) -> str | None:
    """The version of the gateway that serves there; None: none does."""
    target = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    context = ssl.create_default_context()
    # Only its version is asked for, and its certificate is looked at elsewhere.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connections: Sequence[http.client.HTTPConnection] = (
        http.client.HTTPConnection(target, port, timeout=ANSWER_SECONDS),
        http.client.HTTPSConnection(target, port, timeout=ANSWER_SECONDS, context=context),
    )
    for connection in connections:
        try:
            connection.request("GET", path)
            answer = json.loads(connection.getresponse().read(64 * 1024))
            found = answer.get("data", answer).get("version")
            if isinstance(found, str):
                return found
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass
        finally:
            connection.close()
    return None
