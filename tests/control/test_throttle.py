"""Sign-in slows down for who keeps failing; nobody is kept out for good."""

import asyncio
from collections.abc import AsyncIterator, Callable

import asyncpg
import httpx
import pytest
from starlette.applications import Starlette

from control.http import Context, TooManyRequests
from control.throttle import ACCOUNT, NETWORK, RESET, VISITOR, Rule, Subject, network_of
from tests.control.people import PASSWORD, Person, register, registration

Owner = asyncpg.Connection
From = Callable[[str], httpx.AsyncClient]


@pytest.fixture
async def from_address(app: Starlette, owner: Owner) -> AsyncIterator[From]:
    """Makes clients with addresses of their own; nothing has failed yet."""
    await owner.execute("DELETE FROM throttle")
    clients = []

    def make(address: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, client=(address, 40000))
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://redisgate.test"))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


async def attempt(client: httpx.AsyncClient, email: str, password: str = "wrong wrong") -> httpx.Response:
    return await client.post("/auth/login", json={"email": email, "password": password})


async def pass_time(owner: Owner, seconds: float) -> None:
    """As if so much time had gone by."""
    await owner.execute(
        "UPDATE throttle SET failed_at = failed_at - make_interval(secs => $1),"
        " open_again = open_again - make_interval(secs => $1)",
        seconds,
    )


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


async def test_a_few_failures_cost_nothing_then_the_delay_grows(
    from_address: From, person: Person, owner: Owner
) -> None:
    client = from_address("198.51.100.1")
    for _ in range(VISITOR.free + 1):
        assert (await attempt(client, person.email)).status_code == 401
    delays = []
    for _ in range(4):
        refused = await attempt(client, person.email, PASSWORD)
        assert refused.status_code == 429
        delays.append(int(refused.headers["retry-after"]))
        await pass_time(owner, delays[-1])
        assert (await attempt(client, person.email)).status_code == 401
    assert delays == [1, 2, 4, 8]


async def test_attempts_during_a_delay_do_not_make_it_longer(from_address: From, person: Person) -> None:
    client = from_address("198.51.100.1")
    for _ in range(VISITOR.free + 3):
        await attempt(client, person.email)
    waits = [int((await attempt(client, person.email)).headers["retry-after"]) for _ in range(20)]
    assert max(waits) <= VISITOR.first


async def test_the_delay_ends_and_the_right_password_forgets_the_failures(
    from_address: From, person: Person, owner: Owner
) -> None:
    client = from_address("198.51.100.1")
    for _ in range(VISITOR.free + 1):
        await attempt(client, person.email)
    await pass_time(owner, 1)
    assert (await attempt(client, person.email, PASSWORD)).status_code == 200
    for _ in range(VISITOR.free):
        assert (await attempt(client, person.email)).status_code == 401
    assert (await attempt(client, person.email, PASSWORD)).status_code == 200


async def test_unknown_accounts_are_throttled_like_known_ones(from_address: From, person: Person) -> None:
    answers = []
    for email, address in ((person.email, "198.51.100.1"), ("nobody@example.com", "198.51.100.2")):
        client = from_address(address)
        responses = [await attempt(client, email) for _ in range(VISITOR.free + 3)]
        answers.append([(response.status_code, response.json()["message"]) for response in responses])
    assert answers[0] == answers[1]
    assert answers[0][-1][0] == 429


async def test_the_account_is_the_same_in_any_spelling(from_address: From, person: Person) -> None:
    client = from_address("198.51.100.1")
    for _ in range(VISITOR.free + 1):
        await attempt(client, person.email.upper())
    assert (await attempt(client, person.email)).status_code == 429


async def test_spellings_that_are_one_account_are_throttled_as_one(context: Context) -> None:
    spellings = ("K\u0130elvin@example.com", "k\u0130ELVIN@example.com", "\u212a\u0130elvin@example.com")  # Kelvin sign
    lowered = {await context.database.fetchval("SELECT lower($1::text)", spelling) for spelling in spellings}
    counted = {
        tuple(await context.throttle.sign_in_subjects(context.database, spelling, "198.51.100.1"))
        for spelling in spellings
    }
    assert len(counted) == len(lowered) == 1


async def test_guesses_at_many_accounts_from_one_network_are_throttled(from_address: From, owner: Owner) -> None:
    client = from_address("198.51.100.1")
    for number in range(NETWORK.free + 1):
        assert (await attempt(client, f"nobody{number}@example.com")).status_code == 401
    assert (await attempt(client, "another@example.com")).status_code == 429
    assert (await attempt(from_address("198.51.100.2"), "another@example.com")).status_code == 401


async def test_guesses_from_many_networks_at_one_account_are_throttled(from_address: From, person: Person) -> None:
    for number in range(ACCOUNT.free + 1):
        assert (await attempt(from_address(f"198.51.100.{number}"), person.email)).status_code == 401
    assert (await attempt(from_address("198.51.100.200"), person.email)).status_code == 429


async def test_nobody_is_kept_out_of_their_account_by_others(from_address: From, person: Person, owner: Owner) -> None:
    home = from_address("192.0.2.50")
    assert (await attempt(home, person.email, PASSWORD)).status_code == 200
    for number in range(ACCOUNT.free + 1):
        await attempt(from_address(f"198.51.100.{number}"), person.email)
    assert (await attempt(from_address("192.0.2.51"), person.email, PASSWORD)).status_code == 429
    assert (await attempt(home, person.email, PASSWORD)).status_code == 200


async def test_an_ipv6_network_counts_as_one(from_address: From, person: Person) -> None:
    for number in range(VISITOR.free + 1):
        await attempt(from_address(f"2001:db8:0:1::{number:x}"), person.email)
    assert (await attempt(from_address("2001:db8:0:1:ffff::1"), person.email)).status_code == 429
    assert (await attempt(from_address("2001:db8:0:2::1"), person.email)).status_code == 401


async def test_failures_are_forgotten_after_a_while(from_address: From, person: Person, owner: Owner) -> None:
    client = from_address("198.51.100.1")
    for _ in range(VISITOR.free + 1):
        await attempt(client, person.email)
    await pass_time(owner, VISITOR.forget + 1)
    for _ in range(VISITOR.free):
        assert (await attempt(client, person.email)).status_code == 401
    assert (await attempt(client, person.email, PASSWORD)).status_code == 200


async def test_two_hundred_right_sign_ins_at_once_are_let_in(from_address: From, person: Person) -> None:
    client = from_address("198.51.100.1")
    responses = await asyncio.gather(*(attempt(client, person.email, PASSWORD) for _ in range(200)))
    assert {response.status_code for response in responses} == {200}


async def test_a_burst_of_guesses_gets_few_more_than_one_at_a_time(
    from_address: From, person: Person, context: Context
) -> None:
    client = from_address("198.51.100.1")
    responses = await asyncio.gather(*(attempt(client, person.email) for _ in range(100)))
    tried = sum(response.status_code == 401 for response in responses)
    assert tried <= VISITOR.free + 1 + context.settings.argon2_threads
    assert all(response.status_code in (401, 429) for response in responses)


async def test_registering_taken_addresses_is_throttled(from_address: From, person: Person) -> None:
    client = from_address("198.51.100.1")
    for _ in range(NETWORK.free + 1):
        response = await client.post("/auth/register", json=registration(email=person.email))
        assert response.status_code == 409
    assert (await client.post("/auth/register", json=registration())).status_code == 429


async def test_asking_for_resets_is_throttled_whoever_they_are_for(from_address: From) -> None:
    client = from_address("198.51.100.1")
    for number in range(RESET.free + 1):
        response = await client.post("/auth/password/forgot", json={"email": f"nobody{number}@example.com"})
        assert response.status_code == 202
    assert (await client.post("/auth/password/forgot", json={"email": "x@example.com"})).status_code == 429


async def test_the_current_password_cannot_be_guessed_at_a_session(from_address: From, person: Person) -> None:
    client = from_address("198.51.100.1")
    body = {"current_password": "wrong wrong", "new_password": "new password 1"}
    codes = []
    for _ in range(VISITOR.free + 2):
        codes.append((await client.post("/auth/password", json=body, headers=person.headers)).status_code)
    assert codes == [400] * (VISITOR.free + 1) + [429]


async def test_the_table_holds_neither_addresses_nor_names(from_address: From, person: Person, owner: Owner) -> None:
    await attempt(from_address("198.51.100.77"), person.email)
    stored = str(await owner.fetch("SELECT * FROM throttle"))
    assert person.email not in stored
    assert "198.51.100.77" not in stored


async def test_the_longest_delay_is_the_longest(context: Context, owner: Owner) -> None:
    subject = Subject(b"a subject of the tests", Rule(free=0, first=1, longest=60, forget=1e6))
    for _ in range(80):
        await context.throttle.failed(context.database, [subject])
    with pytest.raises(TooManyRequests) as refused:
        await context.throttle.check(context.database, [subject])
    assert refused.value.headers["Retry-After"] == "60"


async def test_failures_at_once_are_all_counted(context: Context, owner: Owner) -> None:
    subjects = [Subject(name, NETWORK) for name in (b"first", b"second", b"third")]
    await asyncio.gather(
        *(context.throttle.failed(context.database, subjects[:: (-1) ** number]) for number in range(40))
    )
    counts = await owner.fetch("SELECT failures FROM throttle WHERE subject = ANY($1)", [s.digest for s in subjects])
    assert [row["failures"] for row in counts] == [40, 40, 40]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "0.0.0.0/32"),
        ("unix", "0.0.0.0/32"),
    ],
)
def test_addresses_stand_for_networks(address: str, network: str) -> None:
    assert network_of(address) == network
