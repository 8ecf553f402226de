"""What is shipped beside the package: images, compose, units, proxies, workflows."""

import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for

ROOT = Path(__file__).parents[2]


def run(*command: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=110, **options)


def tool(name: str, package: str | None = None) -> str:
    """A program of the environment that the tests run in, or of the system: of a package of Debian, or skipped."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None and package is not None:
        pytest.fail(f"{name} is not installed; Debian, Ubuntu: apt-get install {package}")
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def test_hadolint_has_nothing_to_say_against_the_dockerfile() -> None:
    done = run(tool("hadolint"), "--config", ROOT / ".hadolint.yaml", ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_actionlint_has_nothing_to_say_against_the_workflows() -> None:
    done = run(tool("actionlint"), *sorted((ROOT / ".github" / "workflows").glob("*.yml")), cwd=ROOT)
    assert done.returncode == 0, done.stdout


def _instructions(stage: str) -> list[tuple[str, str]]:
    """Of one stage of the Dockerfile: names and arguments."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
    found: list[tuple[str, str]] = []
    here = False
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            here = rest.endswith(f" AS {stage}")
        elif here:
            found.append((name, rest))
    return found


@pytest.mark.timeout(180)
def test_the_steps_of_the_image_make_a_gateway_that_runs(tmp_path: Path) -> None:
    """Docker is not at hand: the steps of the build stage are run in an empty folder, and only what they leave is used.

    The form is pure Python, which `make test` compares with the compiled one elsewhere.
    """
    source, environ = tmp_path / "src", dict(os.environ) | {"HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    source.mkdir()
    moved = {"/opt/": f"{tmp_path}/opt/", "/wheels": f"{tmp_path}/wheels"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, rest in _instructions("build"):
        if name == "COPY":
            *parts, target = rest.split()
            for part in parts:
                assert f"!{part}" in ignored, f".dockerignore keeps {part} from the image"
                if part.endswith("/"):
                    shutil.copytree(ROOT / part, source / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / part, source / target)
        elif name == "RUN":
            command = rest
            for old, new in moved.items():
                command = command.replace(old, new)
            command = re.sub(r"(^|\s)python -m venv", rf"\1{sys.executable} -m venv", command)
            done = run("sh", "-euc", command, cwd=source, env=environ | {"REDISGATE_BUILD": "pure"})
            assert done.returncode == 0, (rest, done.stdout[-2000:], done.stderr[-2000:])
        else:
            assert name in ("ENV", "WORKDIR"), name
    shutil.rmtree(source)
    installed = tmp_path / "opt" / "redisgate"
    done = run(installed / "bin" / "redisgate", "version", cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert not (installed / "bin" / "pip").exists(), "an image needs no installer"
    size = sum(file.stat().st_size for file in installed.rglob("*") if file.is_file() and not file.is_symlink())
    assert size < 200_000_000, f"{size} bytes before compression"


def test_the_images_run_as_nobody_in_particular_and_say_whether_they_are_well() -> None:
    steps = _instructions("gateway")
    assert ("USER", "10001:10001") in steps
    assert [rest for name, rest in steps if name == "CMD"] == ['["redisgate", "serve"]']
    check = next(rest for name, rest in steps if name == "HEALTHCHECK")
    assert check.endswith('CMD ["redisgate", "healthcheck"]')
    assert [rest for name, rest in _instructions("service") if name == "USER"][-1] == "10001:10001"


def test_the_trial_is_published_under_no_name_that_serves_in_production() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    builds = [step["with"] for step in workflow["jobs"]["publish"]["steps"] if "build-push" in step.get("uses", "")]
    tags = {
        build["target"]: [line.rpartition(":")[2] for line in build["tags"].split("\n") if line] for build in builds
    }
    assert set(tags) == {"gateway", "service"}
    assert all(tag.endswith("trial") for tag in tags["service"])
    # the chart asks for its appVersion, which has no v
    assert tags["gateway"] == ["${{ steps.version.outputs.number }}", "latest"]


def test_locked_requirements_have_hashes_and_no_addresses() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "--hash=sha256:" in text, path
        assert "://" not in re.sub(r"(?m)^\s*#.*$", "", text), path
        assert "--index" not in text, path


def test_compose_has_everything_that_it_speaks_of() -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services, volumes = document["services"], document["volumes"]
    assert {"postgres", "redis", "gateway", "prometheus", "grafana"} == set(services)
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} listens for everybody"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in volumes or (ROOT / source).exists(), f"{name}: {source}"
        assert set(service.get("depends_on", ())) <= set(services)
    known = (ROOT / "docs" / "configuration.md").read_text()
    lines = [line for line in (ROOT / "env.development").read_text().splitlines() if line and not line.startswith("#")]
    for variable in [*(line.partition("=")[0] for line in lines), *services["gateway"]["environment"]]:
        assert f"`{variable}`" in known, variable


SYSTEMD = ROOT / "deploy" / "systemd"


def _directives(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / name).read_text().splitlines():
        if not line.startswith(("#", "[")) and "=" in line:
            directive, _, value = line.partition("=")
            found.setdefault(directive, []).append(value)
    return found


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    program = tmp_path / "redisgate"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = [tmp_path / path.name for path in SYSTEMD.glob("*.service")]
    assert len(units) == 2
    for unit in units:
        text = (SYSTEMD / unit.name).read_text()
        unit.write_text(text.replace("/opt/redisgate/bin/redisgate", str(program)))
    done = run(tool("systemd-analyze"), "verify", "--man=no", *units)
    assert "redisgate" not in done.stderr, done.stderr


def test_a_stop_of_the_unit_ends_the_gateway_and_leaves_its_instances_alone() -> None:
    """With any other KillMode systemd kills what is left in the control group: the instances.

    That the workers end with their supervisor is tests/redisgate/test_supervisor.py's.
    """
    from redisgate.config import Limits
    from redisgate.supervisor import DRAIN_GRACE

    unit = _directives("redisgate.service")
    assert unit["KillMode"] == ["process"]
    assert int(unit["TimeoutStopSec"][0]) > Limits().drain_timeout + DRAIN_GRACE


def test_the_owner_of_the_database_is_known_to_the_migrations_alone() -> None:
    gateway, migrations = _directives("redisgate.service"), _directives("redisgate-migrate.service")
    assert gateway["EnvironmentFile"] == ["/etc/redisgate/env"]
    assert "REDISGATE_MIGRATE_ON_START=false" in gateway["Environment"][0]
    assert migrations["EnvironmentFile"] == ["/etc/redisgate/env", "/etc/redisgate/migrate.env"]
    assert migrations["DynamicUser"] == ["yes"], "the gateway's user reads the environment of its own processes"
    for order in ("Wants", "After"):
        assert "redisgate-migrate.service" in gateway[order][0].split()
    page = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
    files = dict(re.findall(r"`/etc/redisgate/([\w.]+)`[^\n]*:\n\n```\w+\n(.*?)```", page, re.DOTALL))
    assert set(files) == {"redisgate.toml", "env", "migrate.env"}
    assert "MIGRATION_URL" in files["migrate.env"]
    assert "MIGRATION_URL" not in files["env"] + files["redisgate.toml"]


def test_the_settings_of_the_documentation_are_taken(tmp_path: Path) -> None:
    """The file of the unit, with the secrets beside it, as `redisgate serve` reads them."""
    from redisgate.config import load

    page = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
    text = re.search(r"`/etc/redisgate/redisgate\.toml`[^\n]*:\n\n```toml\n(.*?)```", page, re.DOTALL)
    assert text is not None
    (tmp_path / "redisgate.toml").write_text(text[1])
    warned: list[str] = []
    environ = {"REDISGATE_STATE_DIR": str(tmp_path), "REDISGATE_SECRET_KEY": "0123456789abcdef" * 4}
    settings = load({"config": str(tmp_path / "redisgate.toml")}, environ, tmp_path, warned.append)
    assert warned == []
    assert settings.metrics_port == 9400
    assert settings.control.public_url == "https://redis.example.com"


def test_commands_by_hand_have_what_the_service_has(tmp_path: Path) -> None:
    """systemd-run needs a running systemd: its options are compared with its help, and the command is looked at."""
    known = run(tool("systemd-run"), "--help").stdout
    (tmp_path / "systemd-run").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "systemd-run").chmod(0o755)
    done = run(SYSTEMD / "redisgate", "admin", "a b@example.com", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    *options, program, command, argument = done.stdout.splitlines()
    assert (program, command, argument) == ("/opt/redisgate/bin/redisgate", "admin", "a b@example.com")
    for option in options:
        assert option.partition("=")[0] in known, option
    unit = _directives("redisgate.service")
    assert f"--uid={unit['User'][0]}" in options
    assert f"--property=EnvironmentFile={unit['EnvironmentFile'][0]}" in options
    for variable in unit["Environment"][0].split():
        assert f"--setenv={variable}" in options
    assert f"--setenv=REDISGATE_CONFIG={unit['ExecStart'][0].split()[-1]}" in options


def test_windows_finds_its_own_line_endings() -> None:
    text = (ROOT / "start-clean.bat").read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n")
    labels = set(re.findall(rb"(?m)^:(\w+)", text))
    assert set(re.findall(rb"goto (\w+)", text)) == labels


def test_the_service_works_over_servers_that_others_run(tmp_path: Path, redis_server: RedisServer) -> None:
    """What continuous integration does over several releases of PostgreSQL, Redis and Valkey."""
    from control.embedded import EmbeddedPostgres

    postgres = EmbeddedPostgres(tmp_path / "postgres", durable=False)
    postgres.start()
    try:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("REDISGATE_")} | {
            "REDISGATE": f"{sys.executable} -m redisgate",
            "PORT": str(free_port()),
            "DATABASE_URL": postgres.url(),
            "REDIS_URL": f"redis://127.0.0.1:{redis_server.port}",
            "REDISGATE_MODE": "dev",
            "REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8",
        }
        done = run(ROOT / "tests" / "delivery" / "services.sh", env=environ)
    finally:
        postgres.stop()
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "the service works over redis_version:" in done.stdout


def test_caddy_keeps_no_connection_that_its_transport_would_send_a_command_again_on() -> None:
    """Caddy is not at hand; Go's transport repeats a GET without a body only where a kept connection was used."""
    text = re.sub(r"(?m)^\s*#.*$", "", (ROOT / "deploy" / "proxies" / "Caddyfile").read_text())
    assert re.search(r"transport http \{\s+keepalive off\s+\}", text)
    assert "lb_retries 0" in text


def test_nginx_passes_on_commands_and_streams(tmp_path: Path, redis_server: RedisServer) -> None:
    nginx = tool("nginx", "nginx-light")
    port = free_port()
    authority = trustme.CA()
    certificate = authority.issue_cert("redis.example.com", "localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "privkey.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "fullchain.pem")
    gateway = Gateway(single_instance(redis_server, REDISGATE_TRUSTED_PROXIES="127.0.0.1/32"))
    try:
        site = (ROOT / "deploy" / "proxies" / "nginx.conf").read_text()
        for old, new in (
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("127.0.0.1:3000", f"127.0.0.1:{gateway.port}"),
            ("/etc/ssl/redisgate", str(tmp_path)),
        ):
            assert old in site
            site = site.replace(old, new)
        (tmp_path / "nginx.conf").write_text(
            f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; daemon off; worker_processes 1;\n"
            f"events {{}}\nhttp {{ access_log off; client_body_temp_path {tmp_path}/body;"
            f" proxy_temp_path {tmp_path}/proxy; fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u;"
            f" scgi_temp_path {tmp_path}/s;\n{site}\n}}\n"
        )
        process = subprocess.Popen([nginx, "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")])
        try:
            trusted = ssl.create_default_context()
            authority.configure_trust(trusted)

            def ask(path: str) -> Any:
                request = urllib.request.Request(
                    f"https://localhost:{port}{path}", headers={"Authorization": f"Bearer {gateway.token}"}
                )
                return urllib.request.urlopen(request, timeout=10, context=trusted)

            def answers() -> bool:
                try:
                    return bool(ask("/ping").status == 200)
                except OSError:
                    return False

            wait_for(answers, what="nginx")
            with ask("/set/nginx/passes"), ask("/get/nginx") as response:
                assert response.read() == b'{"result":"passes"}'
            with ask("/subscribe/nginx") as stream:
                began = time.monotonic()
                assert stream.readline().startswith(b"data: subscribe,nginx,1")
                assert time.monotonic() - began < 5, "the first event waits for a buffer to fill"
        finally:
            process.terminate()
            process.wait(10)
    finally:
        gateway.stop()
