"""Migrations: in order, once, whole or not at all."""

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from control.database import connect
from control.migrate import MigrationError, applied, create, known, migrate, pending, run
from redisgate.config import ConfigError, ControlSettings
from tests.control.conftest import APPLICATION, Urls


def settings_of(urls: Urls) -> ControlSettings:
    return ControlSettings(database_url=urls.application, database_migration_url=urls.owner)


def write(directory: Path, **files: str) -> Path:
    for name, sql in files.items():
        (directory / f"{name.removeprefix('m')}.sql").write_text(sql)
    return directory


async def tables(urls: Urls) -> set[str]:
    connection = await connect(urls.owner)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {row["tablename"] for row in rows}
    finally:
        await connection.close()


async def test_in_order_and_once(empty_database: Urls, tmp_path: Path) -> None:
    settings = settings_of(empty_database)
    folder = write(tmp_path, m0002_b="ALTER TABLE a ADD COLUMN y int;", m0001_a="CREATE TABLE a (x int);")
    assert [str(each) for each in await migrate(settings, folder)] == ["0001_a", "0002_b"]
    assert await migrate(settings, folder) == []
    write(tmp_path, m0003_c="CREATE TABLE c (x int);")
    assert [str(each) for each in await migrate(settings, folder)] == ["0003_c"]
    assert await tables(empty_database) == {"schema_migrations", "a", "c"}


async def test_one_that_fails_leaves_the_database_as_it_was(empty_database: Urls, tmp_path: Path) -> None:
    settings = settings_of(empty_database)
    folder = write(tmp_path, m0001_a="CREATE TABLE a (x int);", m0002_b="CREATE TABLE b (x int);\nSELECT nonsense;")
    with pytest.raises(MigrationError, match=r"0002_b failed in line 2: .*nonsense.*as it was before"):
        await migrate(settings, folder)
    assert await tables(empty_database) == {"schema_migrations", "a"}
    write(tmp_path, m0002_b="CREATE TABLE b (x int);")
    assert [str(each) for each in await migrate(settings, folder)] == ["0002_b"]


async def test_many_at_once_apply_each_once(empty_database: Urls, tmp_path: Path) -> None:
    settings = settings_of(empty_database)
    folder = write(
        tmp_path,
        m0001_a="CREATE TABLE a (x int); INSERT INTO a VALUES (1); SELECT pg_sleep(0.05);",
        m0002_b="INSERT INTO a VALUES (2);",
    )
    done = await asyncio.gather(*(migrate(settings, folder) for _ in range(8)))
    assert sorted(len(each) for each in done) == [0] * 7 + [2]
    connection = await connect(empty_database.owner)
    assert await connection.fetchval("SELECT array_agg(x ORDER BY x) FROM a") == [1, 2]
    await connection.close()


async def test_what_was_changed_afterwards_is_refused(empty_database: Urls, tmp_path: Path) -> None:
    settings = settings_of(empty_database)
    folder = write(tmp_path, m0001_a="CREATE TABLE a (x int);")
    await migrate(settings, folder)
    write(tmp_path, m0001_a="CREATE TABLE a (x bigint);")
    with pytest.raises(MigrationError, match="0001_a is not what was applied"):
        await migrate(settings, folder)


async def test_a_database_that_a_newer_release_contracted_is_refused(empty_database: Urls, tmp_path: Path) -> None:
    settings = settings_of(empty_database)
    folder = write(tmp_path, m0001_a="CREATE TABLE a (x int);", m0002_b="-- contract\nCREATE TABLE b (x int);")
    await migrate(settings, folder)
    (folder / "0002_b.sql").unlink()
    with pytest.raises(MigrationError, match="0002_b, which this release does not know"):
        await migrate(settings, folder)


async def test_the_application_may_not_do_what_the_owner_may(empty_database: Urls) -> None:
    await migrate(settings_of(empty_database))
    connection = await connect(empty_database.application)
    try:
        assert await connection.fetchval("SELECT current_user") == APPLICATION
        assert await connection.fetchval("SELECT count(*) FROM users") == 0
        for statement in (
            "UPDATE audit_events SET action = 'x'",
            "DELETE FROM audit_events",
            "TRUNCATE audit_events",
            "DELETE FROM schema_migrations",
            "DROP TABLE users",
            "ALTER TABLE audit_events DISABLE TRIGGER ALL",
            "CREATE TABLE mine (x int)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()


async def test_all_migrations_of_the_release_have_been_applied(database_urls: Urls) -> None:
    connection = await connect(database_urls.owner)
    done = await applied(connection)
    await connection.close()
    migrations = known()
    assert [each.number for each in migrations] == list(range(1, len(migrations) + 1))
    assert pending(migrations, done) == []


def test_a_new_one_has_the_next_number(tmp_path: Path) -> None:
    write(tmp_path, m0007_a="")
    path = create("Teams & roles", tmp_path)
    assert path.name == "0008_teams_roles.sql"
    assert [str(each) for each in known(tmp_path)] == ["0007_a", "0008_teams_roles"]


@pytest.mark.parametrize("names", [["1_a"], ["0001_a", "0001_b"], ["0001_A"]], ids=["short", "twice", "capital"])
def test_names_that_do_not_fit_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / f"{name}.sql").write_text("")
    with pytest.raises(MigrationError):
        known(tmp_path)


def test_the_command_tells(empty_database: Urls, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(empty_database)
    assert run(settings, status=True, new=None) == 1
    assert re.search(r"^0001_accounts  pending$", capsys.readouterr().out, re.MULTILINE)
    assert run(settings, status=False, new=None) == 0
    assert "applied 0001_accounts\n" in capsys.readouterr().out
    assert run(settings, status=True, new=None) == 0
    assert re.search(r"^0001_accounts  applied 20\d\d-", capsys.readouterr().out, re.MULTILINE)
    assert run(settings, status=False, new=None) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_database_that_is_away_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ControlSettings(database_url=f"postgresql://u:secret@/db?host={tmp_path}")
    assert run(settings, status=False, new=None) == 1
    shown = capsys.readouterr().err
    assert "PostgreSQL cannot be reached" in shown
    assert "secret" not in shown
    with pytest.raises(ConfigError):
        run(ControlSettings(), status=False, new=None)
