"""Sign-in slows down for who keeps failing, and is never refused for good.

Three things are counted, each with a delay that grows with its failures and a time after which all is forgotten:

- the account as seen from one network: some guesses are a person who tries to remember;
- the network: guesses at many accounts;
- the account from everywhere: guesses from many networks. Networks from which its owner has signed in lately are
  exempt, so that nobody can be kept out of their own account by others who guess at it.

While a delay runs, attempts are refused unchecked, and do not make it longer. An IPv4 address is its own network, an
IPv6 address belongs to its /64. The table holds keyed digests, neither addresses nor names. PostgreSQL's clock
decides, so that all replicas agree.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from control.database import Database
from control.http import Said, TooManyRequests
from control.tokens import derive_key


@dataclass(frozen=True, slots=True)
class Rule:
    """`free` failures cost nothing; then the delay starts at `first` seconds and doubles with each up to `longest`.

    All is forgotten when nothing failed for `forget` seconds.
    """

    free: int
    first: float
    longest: float
    forget: float


VISITOR: Final = Rule(free=5, first=1, longest=300, forget=3600)
NETWORK: Final = Rule(free=50, first=1, longest=300, forget=3600)
ACCOUNT: Final = Rule(free=20, first=1, longest=60, forget=900)
RESET: Final = Rule(free=20, first=1, longest=300, forget=3600)
"""Requests for a reset of passwords from one network, which count like failures."""
KNOWN_NETWORK_DAYS: Final = 90
"""For how long a network counts as the account's own after a sign-in."""
KEEP_SECONDS: Final = 7200
"""After which a counter is deleted; no rule remembers longer."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that is counted."""

    digest: bytes
    rule: Rule


class Throttle:
    """Counts failures in PostgreSQL."""

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        self._key = derive_key(secret_keys[0], "throttle")

    def _subject(self, rule: Rule, *parts: str) -> Subject:
        text = "\0".join(parts).encode("utf-8", "surrogatepass")
        return Subject(hmac.digest(self._key, text, "sha256"), rule)

    async def sign_in_subjects(self, database: Database, email: str, address: str) -> list[Subject]:
        """What an attempt to sign in counts for. Costs the same for an address that nobody has."""
        network = network_of(address)
        # PostgreSQL says which spellings are one account, here as where it is looked up.
        row = await database.fetchrow(
            "SELECT lower($1) AS account, EXISTS (SELECT FROM sessions s JOIN users u ON u.id = s.user_id"
            " WHERE lower(u.email) = lower($1) AND s.address <<= $2::text::inet"
            " AND s.created_at > now() - make_interval(days => $3)) AS known",
            email,
            network,
            KNOWN_NETWORK_DAYS,
        )
        assert row is not None
        subjects = [
            self._subject(VISITOR, "visitor", row["account"], network),
            self._subject(NETWORK, "network", network),
        ]
        if not row["known"]:
            subjects.append(self._subject(ACCOUNT, "account", row["account"]))
        return subjects

    def registration_subjects(self, address: str) -> list[Subject]:
        """What a registration that fails because the account exists counts for: it tells which accounts there are."""
        return [self._subject(NETWORK, "network", network_of(address))]

    def reset_subjects(self, address: str) -> list[Subject]:
        """What a request for a password reset counts for."""
        return [self._subject(RESET, "reset", network_of(address))]

    async def check(self, database: Database, subjects: Sequence[Subject]) -> None:
        """Raises TooManyRequests while a delay runs, with the seconds that are left of it."""
        wait = await database.fetchval(
            "SELECT extract(epoch FROM max(open_again) - now())::float8 FROM throttle WHERE subject = ANY($1)",
            [subject.digest for subject in subjects],
        )
        if wait is not None and wait > 0:
            raise TooManyRequests(Said("throttled", "too many attempts failed; wait a little and try again"), wait)

    async def failed(self, database: Database, subjects: Sequence[Subject]) -> None:
        """Count a failure."""
        # In one order everywhere, so that two attempts at once never wait for each other.
        ordered = sorted(subjects, key=lambda subject: subject.digest)
        await database.execute(
            """
            INSERT INTO throttle AS old (subject, failures, failed_at, open_again)
            SELECT subject, 1, now(), now()
                + CASE WHEN free < 1 THEN first ELSE 0 END * interval '1 second'
            FROM unnest($1::bytea[], $2::int[], $3::float8[]) AS rule (subject, free, first)
            ON CONFLICT (subject) DO UPDATE SET (failures, failed_at, open_again) = (
                SELECT counted.failures, now(), now() + interval '1 second' * CASE
                    WHEN counted.failures <= rule.free THEN 0
                    ELSE least(rule.first * power(2, least(counted.failures - rule.free - 1, 30)), rule.longest) END
                FROM unnest($1::bytea[], $2::int[], $3::float8[], $4::float8[], $5::float8[])
                    AS rule (subject, free, first, longest, forget),
                LATERAL (SELECT CASE WHEN old.failed_at < now() - rule.forget * interval '1 second'
                    THEN 1 ELSE old.failures + 1 END AS failures) AS counted
                WHERE rule.subject = old.subject)
            """,
            [subject.digest for subject in ordered],
            [subject.rule.free for subject in ordered],
            [subject.rule.first for subject in ordered],
            [subject.rule.longest for subject in ordered],
            [subject.rule.forget for subject in ordered],
        )

    async def succeeded(self, database: Database, subjects: Sequence[Subject]) -> None:
        """Forget what was counted for the account. Not for the network: who guesses there may own one account."""
        digests = [subject.digest for subject in subjects if subject.rule in (VISITOR, ACCOUNT)]
        await database.execute("DELETE FROM throttle WHERE subject = ANY($1)", digests)


def network_of(address: str) -> str:
    """The network that an address stands for."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return "0.0.0.0/32"  # no address is known, as on a Unix socket: all such are one
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return str(ip_network((found, 64 if found.version == 6 else 32), strict=False))
