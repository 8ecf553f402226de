"""`redisgate check` looks at the control plane, too."""

from pathlib import Path

from control.commands import check
from redisgate.findings import FAIL, OK, Finding
from tests.control.conftest import Urls, make_settings


def sorted_out(findings: list[Finding]) -> tuple[list[str], list[tuple[str, str]]]:
    """What is well, and what is wrong with its cure."""
    well = [finding.text for finding in findings if finding.level == OK]
    return well, [(finding.text, finding.cure) for finding in findings if finding.level == FAIL]


def test_all_is_well(database_urls: Urls, tmp_path: Path) -> None:
    well, wrong = sorted_out(check(make_settings(database_urls, tmp_path)))
    assert wrong == []
    assert [line.partition(": PostgreSQL 18")[0] for line in well] == ["database_url", "database_migration_url"]


def test_what_is_wrong_is_said_with_its_cure(empty_database: Urls, tmp_path: Path) -> None:
    settings = make_settings(
        empty_database,
        tmp_path,
        database_direct_url="postgresql://somebody:secret@127.0.0.1:1/nowhere",
        redis_server="/nonexistent/redis-server",
    )
    well, wrong = sorted_out(check(settings))
    assert [line.partition(":")[0] for line in well] == ["database_url", "database_migration_url"]
    text = "\n".join(f"{problem} / {cure}" for problem, cure in wrong)
    assert "redis_server: /nonexistent/redis-server cannot be run" in text
    assert "database_direct_url: " in text
    assert "migrations are to be applied, from 0001_accounts on / `redisgate migrate` does" in text
    assert "secret" not in text


def test_production_needs_a_good_secret(database_urls: Urls, tmp_path: Path) -> None:
    _, wrong = sorted_out(check(make_settings(database_urls, tmp_path, mode="production", audit_key="weak")))
    assert any("REDISGATE_AUDIT_KEY is weak" in problem for problem, _ in wrong)
