"""The command line: `redisgate serve`, `dev`, `check`, `doctor`, `operator` and what else `redisgate --help` lists."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redisgate

if TYPE_CHECKING:
    from redisgate.config import Settings
    from redisgate.findings import Finding

_NOTHING_CONFIGURED = """\
redisgate: no Redis is configured. Either

  REDISGATE_REDIS_URL=redis://127.0.0.1:6379 REDISGATE_TOKEN=<a long secret> redisgate serve

or a file with instances and tokens: redisgate serve --config FILE
or a PostgreSQL for accounts and instances: DATABASE_URL=postgresql://... REDISGATE_SECRET_KEY=... redisgate serve
or a Kubernetes cluster with RedisHttpInstances: redisgate serve --kubernetes on
To try it without a Redis of your own: redisgate dev"""

# their flags, and what they do: control/kubernetes/commands.py
_KUBERNETES = {
    "operator": "let a Kubernetes cluster have the Redis servers that RedisHttpInstances ask for",
    "crd": "print what a Kubernetes cluster has to know of RedisHttpInstances",
    "backup": "copy a Redis to S3-compatible storage",
    "restore": "put such a copy where a new Redis finds it",
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """All commands, and the flags of all settings for the chosen one: to make them for each takes a while."""
    from redisgate import config

    parser = argparse.ArgumentParser(prog="redisgate", description="Redis over HTTP.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    serve = commands.add_parser(
        "serve",
        help="serve the Redis servers that are configured",
        description="Serve the Redis servers that are configured.",
        epilog="example: REDISGATE_REDIS_URL=redis://127.0.0.1:6379 REDISGATE_TOKEN=secret redisgate serve --port 3000",
    )
    if chosen == "serve":
        config.add_flags(serve)
    dev = commands.add_parser(
        "dev",
        help="the whole service with a PostgreSQL and a Redis of its own, for development",
        description="Start the whole service with a PostgreSQL (unless DATABASE_URL names one) and a Redis of its own,"
        " a demo account, an instance and a key. Ctrl-C stops everything.",
        epilog="example: redisgate dev --port 3000 --data ./data",
    )
    dev.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    dev.add_argument("--port", default="3000", help="port to listen on (3000); 0 picks a free one")
    dev.add_argument("--data", metavar="DIR", default=".redisgate/dev", help="where data and tokens are kept")
    dev.add_argument("--gateway-only", action="store_true", help="a Redis and two tokens, without accounts")
    check = commands.add_parser(
        "check",
        help="connect to every configured Redis and say what is wrong",
        description="Connect to every configured Redis and say what is wrong and how to mend it.",
    )
    if chosen == "check":
        config.add_flags(check)
    doctor = commands.add_parser(
        "doctor",
        help="look at everything around the gateway and say what is wrong",
        description="Look at the settings, the machine, certificates, ports, the database and every instance, and say"
        " what is wrong and how to mend it. Changes nothing. Status 0: nothing is wrong; 1: something is; 2: the"
        " settings cannot be read.",
        epilog="example: redisgate doctor --config redisgate.toml --json",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object, for programs")
    if chosen == "doctor":
        config.add_flags(doctor)
    healthcheck = commands.add_parser(
        "healthcheck",
        help="ask the gateway whether it is ready",
        description="Ask the gateway that has these settings, on this machine, whether it is ready. Status 0: it is;"
        " 1: it is not, or not there; 2: the settings cannot be read.",
        epilog="example: REDISGATE_PORT=3000 redisgate healthcheck",
    )
    if chosen == "healthcheck":
        config.add_flags(healthcheck)
    loadtest = commands.add_parser(
        "loadtest",
        help="put a polite load on a deployment and say how it does",
        description="Send requests at a steady rate to a deployment, and say how long it takes to answer. The token is"
        " read from REDISGATE_TOKEN (or UPSTASH_REDIS_REST_TOKEN). Keys begin with redisgate:loadtest: and are removed"
        " at the end. It stops by itself when one in ten requests fails.",
        epilog="example: REDISGATE_TOKEN=secret redisgate loadtest https://redis.example.com --rate 500 --duration 30s",
    )
    loadtest.add_argument("url", metavar="URL", help="of the gateway, or of one instance")
    loadtest.add_argument("--rate", default="100", help="requests per second (100), at most 5,000")
    loadtest.add_argument("--duration", default="10s", help="how long (10s), at most 10 minutes")
    loadtest.add_argument("--connections", default="8", help="how many (8), at most 256")
    loadtest.add_argument(
        "--mix",
        choices=["mixed", "read", "ping"],
        default="mixed",
        help="mixed: three GET to one SET; read: GET, for tokens that only read",
    )
    loadtest.add_argument("--value-size", default="64", help="bytes of a value (64), at most 1MiB")
    loadtest.add_argument("--token-file", help="file that holds the token")
    loadtest.add_argument("--ca-file", help="certificate authorities to trust instead of the system's")
    loadtest.add_argument("--json", action="store_true", help="one JSON object, for programs")
    top = commands.add_parser(
        "top",
        help="show live what a gateway does",
        description="Show live what a gateway does: workers, rates, latencies, the busiest instances. The gateway"
        " needs a port for its metrics (metrics_port).",
        epilog="example: redisgate top --url http://127.0.0.1:9400",
    )
    top.add_argument(
        "--url", metavar="URL", help="of the metrics port; by default REDISGATE_METRICS_PORT here, or 9400"
    )
    top.add_argument("--interval", default="1", metavar="SECONDS", help="between two pictures (1)")
    top.add_argument("--once", action="store_true", help="print one picture and end")
    migrate = commands.add_parser(
        "migrate",
        help="bring the control plane's database up to date",
        description="Apply the migrations that the control plane's database lacks. `redisgate serve` does so, too,"
        " unless --migrate-on-start is false.",
        epilog="example: DATABASE_URL=postgresql://redisgate@localhost/redisgate redisgate migrate --status",
    )
    migrate.add_argument("action", nargs="?", choices=["new"], help="new: begin a migration with the next number")
    migrate.add_argument("name", nargs="?", help="what the new migration is called")
    migrate.add_argument("--status", action="store_true", help="only say what is applied and what is not")
    migrate.add_argument(
        "--if-configured", action="store_true", help="without a database there is nothing to do, and all is well"
    )
    if chosen == "migrate":
        config.add_flags(migrate)
    admin = commands.add_parser(
        "admin",
        help="make somebody an administrator of the platform",
        description="Make somebody who has registered an administrator of the platform, or no longer one.",
    )
    admin.add_argument("email", help="of the account")
    admin.add_argument("--revoke", action="store_true", help="no longer an administrator")
    if chosen == "admin":
        config.add_flags(admin)
    audit = commands.add_parser(
        "audit",
        help="verify or export the audit log",
        description="verify: find what was changed in, removed from or cut off the audit log; status 1 if anything was."
        " export: all of it as JSON lines.",
        epilog="example: redisgate audit verify /var/log/redisgate.log",
    )
    audit.add_argument("action", choices=["verify", "export"])
    audit.add_argument("logs", nargs="*", metavar="LOG", help="logs of the gateway, whose heads are compared")
    if chosen == "audit":
        config.add_flags(audit)
    for name, text in _KUBERNETES.items():
        cluster = commands.add_parser(name, help=text)
        if chosen == name:
            from control.kubernetes.commands import add_flags

            add_flags(name, cluster)
    commands.add_parser("version", help="print the version")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for wrong usage or settings."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["version"], ["--version"]):
        print(f"redisgate {redisgate.__version__} ({redisgate.build_form()})")
        return 0
    options = vars(build_parser(next(iter(arguments), None)).parse_args(arguments))
    command = options.pop("command")
    if command in _KUBERNETES:
        from control.kubernetes.commands import run as run_in_cluster

        return run_in_cluster(command, options)
    from redisgate.config import ConfigError, load

    environ, cwd = dict(os.environ), Path.cwd()
    try:
        if command == "dev":
            from redisgate.dev import run_dev

            data = Path(options["data"])
            return run_dev(options["host"], options["port"], data, environ, gateway_only=options["gateway_only"])
        if command == "top":
            from redisgate.top import run_top

            return run_top(options, environ)
        if command == "loadtest":
            from redisgate.loadtest import run_loadtest

            return run_loadtest(options, environ, cwd)
        if command == "doctor":
            from redisgate.doctor import run_doctor

            path = options["config"] or environ.get("REDISGATE_CONFIG")
            as_json = options.pop("json")
            return run_doctor(
                lambda warn: load(options, environ, cwd, warn),
                cwd / path if path else None,
                {"control plane": _examine_control, "Kubernetes": _examine_cluster},
                as_json=as_json,
            )
        if command == "healthcheck":
            from redisgate.healthcheck import run_healthcheck

            # What is odd about them is the gateway's to say, once.
            return run_healthcheck(load(options, environ, cwd, lambda _: None))
        settings = load(options, environ, cwd)
        if command == "migrate":
            if (options["action"] == "new") != (options["name"] is not None):
                raise ConfigError("usage: redisgate migrate new NAME")
            from control import migrate

            if options["if_configured"] and not settings.control.enabled:
                print("no database is configured: nothing to migrate")
                return 0
            return migrate.run(settings.control, status=options["status"], new=options["name"])
        if command in ("admin", "audit"):
            return _operate(command, settings, options)
        if not settings.instances and not settings.control.enabled and not settings.cluster.enabled:
            print(_NOTHING_CONFIGURED, file=sys.stderr)
            return 2
        if command == "check":
            from redisgate.check import run_check

            return run_check(settings, _check_control)
        from redisgate.supervisor import run

        return run(settings, lambda: load(options, environ, cwd))
    except ConfigError as error:
        print(f"redisgate: {error}", file=sys.stderr)
        return 2


def _operate(command: str, settings: "Settings", options: dict[str, Any]) -> int:
    from control import commands

    if command == "admin":
        return commands.run_admin(settings, options["email"], revoke=options["revoke"])
    if options["action"] == "export":
        return commands.run_audit_export(settings)
    return commands.run_audit_verify(settings, options["logs"])


def _check_control(settings: "Settings") -> "list[Finding]":
    from control import commands

    return commands.check(settings)


def _examine_control(settings: "Settings") -> "list[Finding]":
    if not settings.control.enabled:
        return []
    from control import doctor

    return doctor.examine(settings)


def _examine_cluster(settings: "Settings") -> "list[Finding]":
    if not settings.cluster.enabled:
        return []
    from control.kubernetes import doctor

    return doctor.examine(settings)
