"""`redisgate doctor` on broken set-ups: each is named, with its cure. The database's are in tests/control."""

import contextlib
import datetime
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from redisgate import check, doctor
from redisgate.config import Settings, load
from redisgate.findings import FAIL, NOTE, OK, Finding, Report
from resp.address import Address
from resp.encoder import encode_command
from tests.redisgate.test_tls import TlsGateway, write_pair
from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for

TOKEN = "3c1d5b7a9f8e6d4c2b0a"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Setup:
    """Variables and files that are fine until a test breaks them."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self.folder = folder
        self.controls: dict[str, doctor.Control] = {}  # the control plane's: tests/control
        self.state_dir = folder / "state"
        self.environ = {
            "REDISGATE_REDIS_URL": redis.url,
            "REDISGATE_TOKEN": TOKEN,
            "REDISGATE_STATE_DIR": str(self.state_dir),
            "REDISGATE_PORT": str(free_port()),
        }

    def file(self, text: str) -> Path:
        path = self.folder / "redisgate.toml"
        path.write_text(text)
        path.chmod(0o600)
        self.environ["REDISGATE_CONFIG"] = str(path)
        return path

    def run(self, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        """The report of the doctor, and its exit status as `exit`."""
        path = self.environ.get("REDISGATE_CONFIG")

        status = doctor.run_doctor(
            lambda warn: load({}, self.environ, self.folder, warn),
            Path(path) if path else None,
            self.controls,
            as_json=True,
        )
        return json.loads(capsys.readouterr().out) | {"exit": status}


@pytest.fixture
def setup(tmp_path: Path, redis_server: RedisServer) -> Setup:
    return Setup(tmp_path, redis_server)


def findings(report: dict[str, Any], level: str) -> str:
    return "\n".join(
        f"{finding['subject']}: {finding['text']} -> {finding['cure']}"
        for finding in report["findings"]
        if finding["level"] == level
    )


def test_nothing_is_wrong_with_what_is_fine(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    report = setup.run(capsys)
    assert (report["exit"], report["status"]) == (0, OK), findings(report, FAIL)
    assert report["counts"][FAIL] == 0
    assert "reachable, version" in findings(report, OK)
    assert TOKEN not in json.dumps(report)


# Settings and files: what breaks each, and what the doctor says and advises

Break = Callable[[Setup], None]


def unknown_value(setup: Setup) -> None:
    setup.environ["REDISGATE_WORKERS"] = "many"


def broken_file(setup: Setup) -> None:
    setup.file("port = = 3")


def newer_file(setup: Setup) -> None:
    setup.file("settings_version = 99")


def nothing_to_serve(setup: Setup) -> None:
    del setup.environ["REDISGATE_REDIS_URL"], setup.environ["REDISGATE_TOKEN"]


def open_file(setup: Setup) -> None:
    setup.file("").chmod(0o644)


def open_secret(setup: Setup) -> None:
    setup.state_dir.mkdir()
    (setup.state_dir / "secret.key").write_text("0" * 64)
    (setup.state_dir / "secret.key").chmod(0o644)


def weak_token(setup: Setup) -> None:
    setup.environ["REDISGATE_TOKEN"] = "1234"


def state_is_a_file(setup: Setup) -> None:
    setup.state_dir.write_text("")


def strange_address(setup: Setup) -> None:
    setup.environ["REDISGATE_HOST"] = "203.0.113.77"


def unknown_host(setup: Setup) -> None:
    setup.environ["REDISGATE_HOST"] = "no-such-host.invalid"


def no_redis(setup: Setup) -> None:
    setup.environ["REDISGATE_REDIS_URL"] = f"redis://127.0.0.1:{free_port()}"


def no_such_socket(setup: Setup) -> None:
    setup.environ["REDISGATE_REDIS_URL"] = "unix:///nonexistent/redis.sock"


def wrong_password(setup: Setup) -> None:
    setup.environ["REDISGATE_REDIS_URL"] += "/"
    setup.environ["REDISGATE_REDIS_URL"] = setup.environ["REDISGATE_REDIS_URL"].replace("//", "//nobody:wrong@", 1)


def no_such_database(setup: Setup) -> None:
    setup.environ["REDISGATE_REDIS_URL"] += "/99"


def tls_to_a_plain_redis(setup: Setup) -> None:
    setup.environ["REDISGATE_REDIS_URL"] = setup.environ["REDISGATE_REDIS_URL"].replace("redis:", "rediss:")
    setup.environ["REDISGATE_REDIS_CONNECT_TIMEOUT"] = "200ms"


def slash_in_a_password(setup: Setup) -> None:
    setup.environ["DATABASE_URL"] = "postgresql://u:hun/ter2@127.0.0.1/db"


def unknown_sslmode(setup: Setup) -> None:
    setup.environ["DATABASE_URL"] = "postgresql://u@127.0.0.1/db?sslmode=bogus"


def broken_public_url(setup: Setup) -> None:
    setup.environ["REDISGATE_PUBLIC_URL"] = "http://[x"


def broken_redis_url(setup: Setup) -> None:
    setup.environ["REDISGATE_REDIS_URL"] = "redis://u:hunter2@\u2100/"  # a sign that means a/c


def no_certificate(setup: Setup) -> None:
    setup.environ |= {"REDISGATE_TLS_CERT_FILE": "gone.pem", "REDISGATE_TLS_KEY_FILE": "gone.key"}


@pytest.mark.parametrize(
    ("spoil", "said", "cure"),
    [
        (unknown_value, "REDISGATE_WORKERS: expected a whole number", "change that setting"),
        (broken_file, "is not TOML", "change that setting"),
        (newer_file, "written for a newer release", "upgrade, or use the file of before"),
        (nothing_to_serve, "no Redis is configured", "set REDISGATE_REDIS_URL and REDISGATE_TOKEN"),
        (open_file, "redisgate.toml, the file of settings, which holds secrets, can be read", "chmod o-rwx"),
        (open_secret, "secret.key, the secret key, can be read by every user", "chmod o-rwx"),
        (weak_token, "token default: it is easy to guess", "openssl rand -hex 32"),
        (state_is_a_file, "is no directory", "set REDISGATE_STATE_DIR"),
        (strange_address, "cannot listen on 203.0.113.77", "set REDISGATE_HOST to an address of this machine"),
        (unknown_host, "cannot listen on no-such-host.invalid", "set REDISGATE_HOST"),
        (no_redis, "cannot use redis://127.0.0.1", "is Redis running there"),
        (no_such_socket, "cannot use unix:///nonexistent/redis.sock", "there is no such socket"),
        (wrong_password, "AUTH was refused", "check user and password in the URL"),
        (no_such_database, "SELECT was refused", "choose another number"),
        (tls_to_a_plain_redis, "no answer from rediss://", "that they speak TLS"),
        (no_certificate, "cannot read", "mend that file"),
        (slash_in_a_password, "DATABASE_URL: it cannot be read", "/ ? # @ : % are written as %2F"),
        (unknown_sslmode, "sslmode is one of disable, allow", "change that setting"),
        (broken_public_url, "REDISGATE_PUBLIC_URL: expected a URL", "change that setting"),
        (broken_redis_url, "this is no URL such as redis://", "change that setting"),
    ],
    ids=lambda value: value.__name__.replace("_", "-") if callable(value) else "",
)
def test_a_broken_set_up_is_named_with_its_cure(
    spoil: Break, said: str, cure: str, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(setup)
    report = setup.run(capsys)
    unreadable = (unknown_value, broken_file, newer_file, slash_in_a_password, unknown_sslmode, broken_public_url)
    assert report["exit"] == (2 if spoil in (*unreadable, broken_redis_url) else 1)
    assert "hun" not in json.dumps(report)
    assert report["status"] == FAIL
    (line,) = [line for line in findings(report, FAIL).split("\n") if said in line]
    assert cure in line
    assert report["counts"][FAIL] == 1, findings(report, FAIL)


def test_the_port_of_metrics(setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.1)
    setup.environ["REDISGATE_METRICS_PORT"] = setup.environ["REDISGATE_PORT"]
    report = setup.run(capsys)
    assert "metrics port" in findings(report, FAIL)
    assert "the gateway itself listens on this port -> choose another one" in findings(report, FAIL)
    port = free_port()
    setup.environ |= {"REDISGATE_METRICS_PORT": str(port), "REDISGATE_METRICS_HOST": "0.0.0.0"}
    report = setup.run(capsys)
    assert (report["exit"], f"metrics port {port}: can be listened on" in findings(report, OK)) == (0, True)
    assert "reads the metrics, and in them the names of instances" in findings(report, NOTE)
    with socket.create_server(("0.0.0.0", port)):
        report = setup.run(capsys)
    assert f"metrics port {port}: cannot listen on 0.0.0.0" in findings(report, FAIL)
    assert "by something that is no RedisGate" in findings(report, FAIL)


def test_a_gateway_that_runs_has_its_port_of_metrics(
    setup: Setup, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    gateway = Gateway(single_instance(redis_server), ["--workers", "1", "--metrics-port", port])
    try:
        setup.environ["REDISGATE_METRICS_PORT"] = port
        report = setup.run(capsys)
        assert (report["exit"], f"metrics port {port}: a RedisGate" in findings(report, OK)) == (0, True), report
    finally:
        gateway.stop()


def test_a_collector_of_traces_that_is_not_there(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        setup.environ["REDISGATE_TRACE_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        report = setup.run(capsys)
        assert (report["exit"], "traces: something listens" in findings(report, OK)) == (0, True)
    report = setup.run(capsys)
    assert "traces: no collector can be reached at http://127.0.0.1" in findings(report, FAIL)
    assert "set REDISGATE_TRACE_ENDPOINT" in findings(report, FAIL)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'x'", name="x"), TypeError("no map")], ids=["missing", "bug"]
)
def test_what_cannot_be_looked_at_is_a_finding_and_the_rest_is_looked_at(
    error: Exception, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings) -> list[Finding]:
        raise error

    setup.controls = {"Kubernetes": fail}
    report = setup.run(capsys)
    assert report["exit"] == 1
    wanted = "it could not be looked at: TypeError: no map" if isinstance(error, TypeError) else "x is not installed"
    assert f"Kubernetes: {wanted}" in findings(report, FAIL)
    assert report["counts"][FAIL] == 1
    assert "reachable, version" in findings(report, OK)


def test_a_port_that_something_else_has(
    setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", int(setup.environ["REDISGATE_PORT"]))):
        report = setup.run(capsys)
    assert "in use by something that is no RedisGate -> end what listens there" in findings(report, FAIL)


def test_a_port_where_the_gateway_serves(setup: Setup, gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    setup.environ["REDISGATE_PORT"] = str(gateway.port)
    report = setup.run(capsys)
    assert report["exit"] == 0, findings(report, FAIL)
    assert "a RedisGate 0." in findings(report, OK)


def test_a_variable_that_is_no_setting(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.environ["REDISGATE_PROT"] = "3000"
    report = setup.run(capsys)
    assert report["exit"] == 0
    assert "REDISGATE_PROT is no setting" in findings(report, NOTE)


def test_too_few_files(setup: Setup) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "redisgate", "doctor"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **setup.environ},
        cwd=setup.folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL  a process may have only 256 files open" in done.stdout
    assert "LimitNOFILE=" in done.stdout
    assert done.stdout.endswith("Something has to be mended.\n")


def test_a_full_disk(setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 62)
    assert "are free there: counts" in findings(setup.run(capsys), FAIL)


def test_a_clock_that_stands_in_the_past(
    setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redisgate.doctor.time.time", lambda: 86400.0)
    assert "clock says 1970-01-02, which is over" in findings(setup.run(capsys), FAIL)


# Certificates


def name_certificate(setup: Setup, authority: trustme.CA, *names: str, **wanted: Any) -> None:
    pair = write_pair(authority, setup.folder, "c", *names, **wanted)
    setup.environ |= {"REDISGATE_TLS_CERT_FILE": str(pair.cert), "REDISGATE_TLS_KEY_FILE": str(pair.key)}


def in_days(days: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


@pytest.mark.parametrize(
    ("days", "level", "said"),
    [(-1, FAIL, "has ended at"), (3, FAIL, "ends in 3.0 days"), (15, NOTE, "ends in 15 days"), (90, OK, "until 20")],
    ids=["over", "urgent", "soon", "good"],
)
def test_the_dates_of_a_certificate(
    days: float, level: str, said: str, setup: Setup, authority: trustme.CA, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"not_before": in_days(-2), "not_after": in_days(days)}
    name_certificate(setup, authority, "gate.test", **wanted)
    report = setup.run(capsys)
    assert said in findings(report, level)
    assert (report["exit"] == 1) == (level == FAIL)
    if level != OK:
        assert "renew it; the gateway takes up the new files by itself" in findings(report, level)


def test_a_certificate_that_is_not_good_yet(
    setup: Setup, authority: trustme.CA, capsys: pytest.CaptureFixture[str]
) -> None:
    name_certificate(setup, authority, "gate.test", not_before=in_days(2), not_after=in_days(90))
    assert "is not good before" in findings(setup.run(capsys), FAIL)


def test_a_certificate_for_other_names(setup: Setup, authority: trustme.CA, capsys: pytest.CaptureFixture[str]) -> None:
    setup.environ["REDISGATE_BASE_DOMAIN"] = "instances.test"
    name_certificate(setup, authority, "instances.test")
    failed = findings(setup.run(capsys), FAIL)
    assert "no certificate is good for *.instances.test: clients that go there will refuse it -> have one" in failed
    name_certificate(setup, authority, "instances.test", "*.instances.test")
    assert setup.run(capsys)["exit"] == 0


def test_a_key_that_everybody_reads(setup: Setup, authority: trustme.CA, capsys: pytest.CaptureFixture[str]) -> None:
    name_certificate(setup, authority, "gate.test")
    Path(setup.environ["REDISGATE_TLS_KEY_FILE"]).chmod(0o644)
    assert "a private key, can be read by every user of this machine -> chmod o-rwx" in findings(
        setup.run(capsys), FAIL
    )


def test_a_gateway_that_serves_by_tls_is_known(
    setup: Setup, authority: trustme.CA, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    name_certificate(setup, authority, "gate.test")
    environ = {name: value for name, value in setup.environ.items() if "TLS" in name}
    gateway = TlsGateway(single_instance(redis_server, **environ))
    try:
        setup.environ["REDISGATE_PORT"] = str(gateway.port)
        assert "a RedisGate 0." in findings(setup.run(capsys), OK)
    finally:
        gateway.stop()


# Redis servers in trouble


@contextlib.contextmanager
def redis(*arguments: str) -> Iterator[RedisServer]:
    server = RedisServer(*arguments)
    try:
        yield server
    finally:
        server.stop()


def test_a_redis_that_is_full_and_one_that_cannot_save(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis("--maxmemory-policy", "noeviction", "--dbfilename", "d.rdb") as server:
        setup.environ["REDISGATE_REDIS_URL"] = server.url
        assert server.raw(encode_command([b"SET", b"k", b"x" * 500_000]), 5) == b"+OK\r\n"
        assert server.raw(b"CONFIG SET maxmemory 1mb\r\n", 5) == b"+OK\r\n"
        # A directory of the name that the snapshot should get.
        (server.directory / "d.rdb").mkdir()
        server.raw(b"SAVE\r\n", 1)
        server.raw(b"BGSAVE\r\n", 1)
        wait_for(lambda: b"rdb_last_bgsave_status:err" in server.raw(b"INFO persistence\r\n", 500), 5, "the failure")
        failed = findings(setup.run(capsys), FAIL)
    assert (
        "its last snapshot failed, and by default it refuses writes until one succeeds -> look into its log" in failed
    )
    assert "of 1 MiB are used: beyond that every write is refused -> give it more memory" in failed


def test_a_replica_that_has_lost_its_primary(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    with redis("--replicaof", "127.0.0.1", str(free_port())) as server:
        setup.environ["REDISGATE_REDIS_URL"] = server.url
        report = setup.run(capsys)
    assert "a replica that has lost its primary: what it answers is old -> mend its replication" in findings(
        report, FAIL
    )
    assert "it is a replica: writes will be refused" in findings(report, NOTE)


def test_a_node_of_a_cluster(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    with redis("--cluster-enabled", "yes") as server:
        setup.environ["REDISGATE_REDIS_URL"] = server.url
        assert "it is a node of a Redis Cluster" in findings(setup.run(capsys), FAIL)


def test_a_redis_with_another_clock_and_an_old_version() -> None:
    facts = check.Facts({"redis_version": "5.0.7"}, True, None, 0.2, 60.0, None)
    report = Report()
    check.describe(report, Address(), facts)
    text = report.text()
    assert "its clock is 60 s ahead of this machine's" in text
    assert "NTP" in text
    assert "Redis 5.0.7 gets no fixes any more" in text
    assert "that is far: every command waits for it" in text
