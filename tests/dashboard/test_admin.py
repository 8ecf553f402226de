"""Pages and routes for administrators of the platform, without a browser."""

import httpx
import pytest

from control.http import Context
from control.workers import WorkerReport, purge
from redisgate.access import AccessTable
from tests.control.people import PASSWORD, Person, make_admin, register
from tests.dashboard.conftest import Pages

HOSTILE = "<script>alert(1)</script>\"'&"
PATHS = ("/admin", "/admin/organizations", "/admin/instances", "/admin/users", "/admin/audit")


async def newcomer(client: httpx.AsyncClient) -> Person:
    """Somebody else, while the administrator stays signed in."""
    kept = dict(client.cookies)
    person = await register(client)
    client.cookies.update(kept)
    return person


@pytest.fixture
async def administrator(pages: Pages, client: httpx.AsyncClient, owner: object) -> Person:
    """Signed in at the pages."""
    person = await register(client, "root")
    await make_admin(owner, person)
    await pages.sign_in(person.email, PASSWORD)
    return person


@pytest.mark.parametrize("path", PATHS)
async def test_only_administrators_see_the_platform(pages: Pages, client: httpx.AsyncClient, path: str) -> None:
    person = await register(client)
    await pages.get(path, 303)
    await pages.sign_in(person.email, PASSWORD)
    assert "only administrators of the platform" in (await pages.get(path, 403)).text
    assert 'href="/admin"' not in (await pages.get("/dashboard/account")).text


async def test_the_platform_at_a_glance(pages: Pages, administrator: Person) -> None:
    shown = (await pages.get("/admin")).text
    assert "At a glance" in shown
    assert "No worker has reported yet" in shown
    for path in PATHS:
        await pages.get(path)


async def test_workers_report_how_they_are(
    pages: Pages, administrator: Person, context: Context, client: httpx.AsyncClient, owner: object
) -> None:
    report = WorkerReport(context, AccessTable(), administrator.id, 7)
    report.start()
    try:
        while not await context.database.fetchval("SELECT count(*) FROM workers"):
            pass  # each turn waits for PostgreSQL
        assert "Healthy" in (await pages.get("/admin")).text
        answer = await client.get("/api/admin/workers", headers=administrator.headers)
        worker = answer.json()["data"][0]
        assert worker["number"] == 7
        assert worker["state"]["memory"] > 1 << 20
        await owner.execute("UPDATE workers SET seen_at = now() - interval '1 minute'")  # type: ignore[attr-defined]
        assert "Silent" in (await pages.get("/admin")).text
        await owner.execute("UPDATE workers SET seen_at = now() - interval '2 hours'")  # type: ignore[attr-defined]
        await purge(context)
        assert not await context.database.fetchval("SELECT count(*) FROM workers")
    finally:
        await report.stop()


async def test_a_worker_that_stops_is_no_longer_listed(context: Context, administrator: Person) -> None:
    report = WorkerReport(context, AccessTable(), administrator.id, 0)
    report.start()
    while not await context.database.fetchval("SELECT count(*) FROM workers"):
        pass
    await report.stop()
    assert not await context.database.fetchval("SELECT count(*) FROM workers")


async def test_an_organization_gets_a_plan_and_limits_above_it(
    pages: Pages, client: httpx.AsyncClient, administrator: Person
) -> None:
    other = await newcomer(client)
    await client.patch(f"/api/organizations/{other.organization_id}", json={"name": HOSTILE}, headers=other.headers)
    listed = await pages.get("/admin/organizations?search=%3Cscript")
    assert HOSTILE not in listed.text
    page = f"/admin/organizations/{other.organization_id}"
    assert page in listed.text
    assert other.email in (await pages.get(page)).text
    await pages.post(f"{page}/plan", plan="pro")
    assert "0 of 50" in (await pages.get(page)).text
    await pages.post(f"{page}/quota", max_redis_instances=60, max_memory_gb=100, max_api_keys=100)
    assert "0 of 60" in (await pages.get(page)).text
    wrong = await pages.post(f"{page}/quota", 400, max_redis_instances="many", max_memory_gb=1, max_api_keys=1)
    assert 'id="h-max_redis_instances"' in wrong.text
    await pages.post(f"{page}/plan", 400, plan="gold")
    assert "Plan changed" in (await pages.get("/admin/audit")).text
    assert "Nothing found" in (await pages.get("/admin/organizations?search=no-such-thing")).text


async def test_somebody_is_shut_out_and_let_in_again(
    pages: Pages, client: httpx.AsyncClient, administrator: Person
) -> None:
    other = await newcomer(client)
    page = f"/admin/users/{other.id}"
    assert page in (await pages.get(f"/admin/users?search={other.email.upper()}")).text
    await pages.get(page)
    response = await pages.post(page, disabled="true")
    assert "Shut out" in (await pages.follow(response)).text
    assert (await client.get("/auth/me", headers=other.headers)).status_code == 401
    answer = await client.post("/auth/login", json={"email": other.email, "password": PASSWORD})
    assert answer.status_code in (401, 403)
    await pages.post(page, disabled="false")
    assert (await client.get("/auth/me", headers=other.headers)).status_code == 200
    log = (await pages.get("/admin/audit?action=users.*")).text
    assert "Person shut out" in log
    assert "Person let in again" in log


async def test_administrators_are_made_by_administrators_but_not_unmade_by_themselves(
    pages: Pages, client: httpx.AsyncClient, administrator: Person
) -> None:
    other = await newcomer(client)
    await pages.get(f"/admin/users/{other.id}")
    await pages.post(f"/admin/users/{other.id}", is_admin="true")
    assert (await client.get("/stats", headers=other.headers)).status_code == 200
    await pages.post(f"/admin/users/{other.id}", is_admin="false")
    assert (await client.get("/stats", headers=other.headers)).status_code == 403
    own = await pages.post(f"/admin/users/{administrator.id}", 409, is_admin="false")
    assert "this is yourself" in own.text
    await pages.get(f"/admin/users/{administrator.organization_id}", 404)


async def test_all_instances_are_listed_those_in_error_first(
    pages: Pages, client: httpx.AsyncClient, administrator: Person, owner: object
) -> None:
    other = await newcomer(client)
    for name, status in (("healthy", "running"), (HOSTILE, "error"), ("newest", "running")):
        await owner.execute(  # type: ignore[attr-defined]
            "INSERT INTO instances (organization_id, name, slug, label, provisioner, max_memory, status,"
            " token_digest, token_encrypted, readonly_token_digest, readonly_token_encrypted) VALUES ($1, $2, md5($2),"
            " md5($2), 'local', 1048576, $3, decode(md5($2) || md5($2), 'hex'), 't',"
            " decode(md5($2 || 'r') || md5($2), 'hex'), 't')",
            other.organization_id,
            name,
            status,
        )
    shown = (await pages.get("/admin/instances")).text
    assert HOSTILE not in shown
    assert shown.index("&lt;script&gt;") < shown.index("newest") < shown.index("healthy")
    assert "newest" not in (await pages.get("/admin/instances?status=error")).text
    found = (await pages.get("/admin/instances?search=newes&status=")).text
    assert "newest" in found
    assert "healthy" not in found
    answer = await client.get("/api/admin/instances?status=error", headers=administrator.headers)
    assert answer.json()["data"]["total_count"] == 1


async def test_lists_are_in_the_api(client: httpx.AsyncClient, administrator: Person) -> None:
    for path in ("organizations", "users", "instances"):
        answer = await client.get(f"/api/admin/{path}?search=root", headers=administrator.headers)
        assert answer.status_code == 200, answer.text
    people = (await client.get("/api/admin/users?search=root", headers=administrator.headers)).json()["data"]
    assert administrator.email in [item["email"] for item in people["items"]]
