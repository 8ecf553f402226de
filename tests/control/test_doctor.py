"""`redisgate doctor` on a control plane: deliberately broken set-ups, each named with its cure."""

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from control.database import close, connect
from control.doctor import examine
from control.encryption import Encryption
from control.hosts import host_id
from control.instances import secret_context
from redisgate.config import Settings
from redisgate.findings import FAIL, NOTE, OK, Finding
from tests.control.conftest import APPLICATION, SECRET_KEY, Server, Urls, make_settings
from tests.control.service import execute
from tests.servers import RedisServer, free_port


def said(findings: list[Finding], level: str) -> str:
    return "\n".join(
        f"{finding.subject}: {finding.text} -> {finding.cure}" for finding in findings if finding.level == level
    )


@pytest.fixture
def urls(postgres_server: Server, migrated: str) -> Iterator[Urls]:
    """A migrated database for one test, which may spoil it."""
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


def fine(urls: Urls, tmp_path: Path, **control: object) -> Settings:
    return make_settings(urls, tmp_path, provisioner="external", **control)


def test_nothing_is_wrong_with_what_is_fine(urls: Urls, tmp_path: Path) -> None:
    found = examine(fine(urls, tmp_path))
    assert said(found, FAIL) == ""
    well = said(found, OK)
    assert "database_url: PostgreSQL 18" in well
    assert "database: notifications arrive" in well
    assert "connections are enough" in well
    assert "no host has ever been at work" in said(found, NOTE)


def test_postgres_that_is_away(urls: Urls, tmp_path: Path) -> None:
    settings = make_settings(urls, tmp_path, database_url=f"postgresql://u:hidden@127.0.0.1:{free_port()}/d")
    failed = said(examine(settings), FAIL)
    assert "database_url: " in failed
    assert "start PostgreSQL, or mend the URL" in failed
    assert "hidden" not in failed


def test_a_wrong_password(urls: Urls, tmp_path: Path) -> None:
    settings = fine(urls, tmp_path, database_url=urls.application.replace(":app@", ":wrong@"))
    failed = said(examine(settings), FAIL)
    assert "password authentication failed" in failed
    assert "mend the URL" in failed


def test_no_migrations(empty_database: Urls, tmp_path: Path) -> None:
    failed = said(examine(fine(empty_database, tmp_path)), FAIL)
    assert "migrations are to be applied, from 0001_accounts on -> `redisgate migrate` does" in failed


def test_a_database_of_a_newer_release(urls: Urls, tmp_path: Path) -> None:
    execute(urls.owner, "INSERT INTO schema_migrations (number, name, checksum) VALUES (9999, 'later', '')")
    failed = said(examine(fine(urls, tmp_path)), FAIL)
    assert "migration 9999_later, which this release does not know" in failed
    assert "upgrade" in failed


def test_rights_that_were_taken_away(urls: Urls, tmp_path: Path) -> None:
    execute(urls.owner, f"REVOKE ALL ON users FROM {APPLICATION}")
    failed = said(examine(fine(urls, tmp_path)), FAIL)
    assert "the role of database_url may not read users -> run `redisgate migrate`" in failed


def test_a_role_that_owns_the_audit_log(urls: Urls, tmp_path: Path) -> None:
    settings = fine(urls, tmp_path, database_url=urls.owner, database_migration_url="")
    assert "owns the audit log, and could so change it -> give the tables to a role of their own" in said(
        examine(settings), NOTE
    )


def test_a_database_that_takes_no_writes(postgres_server: Server, urls: Urls, tmp_path: Path) -> None:
    name = urls.owner.partition("?")[0].rpartition("/")[2]
    postgres_server.run(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    failed = said(examine(fine(urls, tmp_path)), FAIL)
    assert "it takes no writes from this role: default_transaction_read_only is on -> ALTER ROLE" in failed


def test_two_urls_that_lead_to_two_databases(urls: Urls, empty_database: Urls, tmp_path: Path) -> None:
    settings = fine(urls, tmp_path, database_direct_url=empty_database.application)
    failed = said(examine(settings), FAIL)
    assert "database_direct_url leads to another database than database_url -> let both name the same" in failed


def test_more_connections_than_there_are(urls: Urls, tmp_path: Path) -> None:
    settings = dataclasses.replace(fine(urls, tmp_path), workers=64)
    failed = said(examine(settings), FAIL)
    assert "this gateway may ask for 844 connections (64 workers with 13 each)" in failed
    assert "lower database_pool_size or workers" in failed


@pytest.mark.parametrize(("seconds", "how"), [(-90, "ahead of"), (90, "behind")])
def test_clocks_that_differ(seconds: float, how: str, urls: Urls, tmp_path: Path) -> None:
    failed = said(examine(fine(urls, tmp_path), lambda: time.time() + seconds), FAIL)
    assert f"its clock is 90 s {how} this machine's" in failed
    assert "NTP" in failed


def test_a_mailer_that_is_not_there(urls: Urls, tmp_path: Path) -> None:
    failed = said(examine(fine(urls, tmp_path, mailer="no_such_module:send")), FAIL)
    assert "no_such_module:send cannot be imported" in failed
    assert "name an async function" in failed


def test_no_redis_server_for_local_instances(urls: Urls, tmp_path: Path) -> None:
    settings = make_settings(urls, tmp_path, provisioner="local", redis_server="/nonexistent/redis-server")
    assert "redis_server: /nonexistent/redis-server cannot be run" in said(examine(settings), FAIL)


def test_a_weak_secret_in_production(urls: Urls, tmp_path: Path) -> None:
    settings = fine(urls, tmp_path, mode="production", encryption_keys=("changeme",))
    found = examine(settings)
    assert "REDISGATE_ENCRYPTION_KEYS is weak" in said(found, FAIL)
    assert "nobody can reset a password" in said(found, NOTE)


# Instances


def instance(urls: Urls, endpoint: Any, password: str | None = None, **columns: Any) -> Any:
    """A row of an instance, as if it had been brought about; its id."""

    async def run() -> Any:
        connection = await connect(urls.owner)
        try:
            organization = await connection.fetchval(
                "INSERT INTO organizations (name, slug) VALUES ('o', 'o-' || gen_random_uuid()) RETURNING id"
            )
            new = uuid4()
            values = {
                "id": new,
                "organization_id": organization,
                "name": "n",
                "slug": "orders",
                "label": f"orders-{str(new)[:6]}",
                "provisioner": "external",
                "max_memory": 0,
                "status": "running",
                "endpoint": endpoint,
                "token_digest": new.bytes * 2,
                "readonly_token_digest": new.bytes[::-1] * 2,
                **{
                    f"{column}_encrypted": Encryption([SECRET_KEY]).encrypt(b"t", secret_context(new, column))
                    for column in ("token", "readonly_token")
                },
                "password_encrypted": None
                if password is None
                else Encryption([SECRET_KEY]).encrypt(password.encode(), secret_context(new, "password")),
                **columns,
            }
            names = ", ".join(values)
            marks = ", ".join(f"${number}" for number in range(1, len(values) + 1))
            await connection.execute(f"INSERT INTO instances ({names}) VALUES ({marks})", *values.values())
            return new
        finally:
            await close(connection)

    with asyncio.Runner() as runner:
        return runner.run(run())


def host(urls: Urls, settings: Settings, *, silent: str = "0 s") -> Any:
    """A row for the host that this is."""
    own = host_id(settings.state_dir)
    execute(
        urls.owner,
        "INSERT INTO hosts (id, name, redis_versions, seen_at) VALUES ($1, 'here', '{}', now() - $2::text::interval)",
        own,
        silent,
    )
    return own


def place(port: int) -> dict[str, Any]:
    return {"host": "127.0.0.1", "port": port, "tls": False, "server_name": None, "db": 0}


def test_instances_that_are_fine(urls: Urls, tmp_path: Path, redis_server: RedisServer) -> None:
    settings = fine(urls, tmp_path)
    own = host(urls, settings)
    instance(urls, place(redis_server.port))
    instance(urls, {"unix": redis_server.path}, provisioner="local", max_memory=1 << 20, host_id=own)
    found = examine(settings)
    assert said(found, FAIL) == ""
    assert said(found, OK).count("reachable, version") == 2
    assert "the secrets of 2 instances can be opened" in said(found, OK)
    assert "here has been heard of" in said(found, OK)


def test_instances_in_trouble(urls: Urls, tmp_path: Path, redis_server: RedisServer) -> None:
    settings = fine(urls, tmp_path)
    own = host(urls, settings)
    gone = instance(urls, place(free_port()))
    instance(urls, {"unix": "/nonexistent/r.sock"}, provisioner="local", max_memory=1 << 20, host_id=own)
    instance(urls, place(redis_server.port), password="wrong")
    instance(urls, place(redis_server.port), status="error", status_reason="the quota is used up")
    failed = said(examine(settings), FAIL)
    assert f"(external, {gone}): cannot use redis://127.0.0.1" in failed
    assert "is Redis running there" in failed
    assert "/nonexistent/r.sock" in failed
    assert "start `redisgate serve` on this host" in failed
    assert "check user and password by PATCH with external_url" in failed
    assert "its status is error: the quota is used up -> mend that, then PUT /api/organizations/" in failed


def test_secrets_under_a_key_that_is_not_set(urls: Urls, tmp_path: Path, redis_server: RedisServer) -> None:
    settings = fine(urls, tmp_path)
    instance(urls, place(redis_server.port), password="pw")
    other = dataclasses.replace(settings, secret_key=b"tests: another key, ee6f0a91b7c34d2f")
    failed = said(examine(other), FAIL)
    assert "the secrets of 1 instances cannot be opened with the keys that are set: orders-" in failed
    assert "put the key they were encrypted under behind the new one: previous_secret_keys" in failed
    both = dataclasses.replace(other.control, previous_secret_keys=(SECRET_KEY.decode(),))
    found = examine(dataclasses.replace(other, control=both))
    assert "cannot be opened" not in said(found, FAIL)
    assert "3 secrets are under an older key" in said(found, NOTE)


def test_a_host_that_is_silent(urls: Urls, tmp_path: Path, redis_server: RedisServer) -> None:
    settings = fine(urls, tmp_path)
    own = host(urls, settings, silent="1 hour")
    instance(urls, {"unix": redis_server.path}, provisioner="local", max_memory=1 << 20, host_id=own)
    failed = said(examine(settings), FAIL)
    assert "hosts: here has not been heard of for 3600 s, and 1 instances are there" in failed
    assert "start `redisgate serve` on that host" in failed
