"""The access feed of one worker: what credentials grant, from PostgreSQL into the access table.

A credential that the table does not know is loaded when a request brings it: first its signature is checked, which
costs no query, then its row is read. The row grants; the claims of a token never do. Requests that bring the same
credential meanwhile wait for the one load.

What is cached is told apart by subjects (`api_keys:<id>`, `instances:<id>`, `organizations:<id>`, …). Every change
that matters is in `access_changes` under its subject, numbered in the order of commits; we read what is behind the
number that we have seen, and forget what depends on it. A NOTIFY only wakes us for that; without it we look once a
second. So nothing is missed that a notification misses, and there is one way to learn of a change.

A load that read its row before a change, and ends after it, would bring back what was forgotten: changes are noted on
the loads under way too, and such a load is done again.

With PostgreSQL away what is cached works until its own expiry; what is not cached is answered with 503.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import asyncpg

from control import api_keys
from control.daily import DailyLeases
from control.database import DatabaseAway, Record, close
from control.encryption import DecryptionError
from control.http import Context
from control.instance_tokens import token_digest
from control.instances import Routes, address_of
from control.tokens import InvalidToken, SessionClaims
from control.usage import UsageCollector
from redisgate.access import UNAUTHORIZED, AccessTable, Grant, Instance, Keyring, Refusal
from redisgate.config import InstanceConfig
from redisgate.exchange import RETRY_AFTER
from redisgate.limits import Limit, Meter
from redisgate.policy import Scope
from redisgate.scripts import ScriptCache
from redisgate.shared import SharedState, SharedStateError, subject_digest
from redisgate.streams import StreamExchange
from resp.errors import Unavailable

CHANNEL: Final = "redisgate_access"
POLL_SECONDS: Final = 1.0
"""Between two looks for changes that no notification told of."""
QUERY_SECONDS: Final = 3.0
"""For PostgreSQL to answer one of our queries; then it counts as away."""
NONCE_SECONDS: Final = 5.0
"""For a notification to come back to who sent it; then LISTEN does not work here."""
PROOF_SECONDS: Final = 30.0
"""Between two such proofs."""
MAX_CREDENTIALS: Final = 100_000
"""That one worker knows; then it forgets those it has known longest."""
MAX_UNKNOWN: Final = 10_000
"""Credentials that grant nothing and are remembered as such."""
UNKNOWN_SECONDS: Final = 60.0
"""How long they are."""
MAX_LOADS: Final = 16
"""Loads that ask PostgreSQL at a time; more wait."""
MAX_CHANGES: Final = 10_000
"""Read at a time; who is further behind forgets all."""

_EVERYTHING = "everything"  # stands for every subject
_AWAY = "the control plane's database cannot be reached, and this token is not known here yet"
_SEVERAL = Refusal(400, b"ERR this token is good for several instances: name one, as in /redis/<instance id>/get/key")
_NONE_YET = Refusal(404, b"ERR there is no instance yet that this token is good for")
_NOT_RUNNING = Refusal(503, b"ERR the instance is not running", RETRY_AFTER)
_NO_ROUTE = Refusal(
    503, b"ERR the instance cannot be reached from here now: the cluster has no route to it", RETRY_AFTER
)
_BROKEN = Refusal(503, b"ERR the instance's credentials cannot be read; its operator finds the reason in the log")

# The steward migrates a database that was away when the workers started.
_NOT_MIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Load:
    """One load under way."""

    task: "asyncio.Task[Refusal | None] | None" = None
    changed: set[str] = field(default_factory=set)


class AccessFeed:
    """See `redisgate.access.Source`."""

    def __init__(
        self,
        context: Context,
        access: AccessTable,
        shared: SharedState,
        index: int,
        *,
        usage: UsageCollector,
        leases: DailyLeases,
    ) -> None:
        """`index` is the worker's."""
        self._context = context
        self._access = access
        self._shared = shared
        self._index = index
        self._usage = usage
        self._leases = leases
        self._scripts = ScriptCache(shared)
        self._subjects: dict[bytes, frozenset[str]] = {}  # by credential, the longest known first
        self._credentials: dict[str, set[bytes]] = {}  # by subject
        self._connected: dict[str, tuple[object, ...]] = {}  # by instance id: what its Instance was made from
        self._limits: dict[UUID, tuple[tuple[int | None, int | None], Limit]] = {}  # by organization or key
        self._unknown: dict[bytes, float] = {}  # until when (monotonic)
        self._loads: dict[tuple[bytes, str | None], _Load] = {}
        self._turns = asyncio.Semaphore(MAX_LOADS)
        self._synced = time.monotonic()  # when we last knew of every change
        self._seen: int | None = None  # the last revision whose change is taken into account
        self._catching_up = asyncio.Lock()
        self._wake = asyncio.Event()
        self._nonce = ""
        self._proof = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.routes: Routes | None = None
        """Where instances in a cluster are."""
        self.listening = False
        """Whether notifications have been shown to arrive."""

    def start(self) -> None:
        """Begin to answer for the access table, and to follow what changes."""
        self._access.source = self
        for work in (self._follow(), self._listen()):
            self._begin(work)

    async def stop(self) -> None:
        """End; what is cached stays."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, limit in self._limits.values():
            limit.flush(time.time())

    def _begin(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # What the gateway asks

    def refusal(self, credential: bytes) -> Refusal | None:
        """Whether a credential is none of ours, or was found to grant nothing a moment ago."""
        until = self._unknown.get(credential)
        if until is not None:
            if until > time.monotonic():
                return UNAUTHORIZED
            del self._unknown[credential]
        return UNAUTHORIZED if self._claims(credential) is None else None

    def _claims(self, credential: bytes) -> object | None:
        """What a credential is, by its signature alone; None: nothing that we issued."""
        if self._context.instance_tokens.verify(credential):
            return credential
        tokens = self._context.tokens
        for verify in (tokens.verify_api_key, tokens.verify_session):
            with contextlib.suppress(InvalidToken):
                return verify(credential)
        return None

    async def load(self, credential: bytes, reference: str | None) -> Refusal | None:
        """Put what a credential grants into the table, or tell why it grants nothing.

        Raises:
            Unavailable: PostgreSQL is away.
        """
        key = (credential, reference)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load()
            load.task = self._begin(self._load(load, credential, reference))
            load.task.add_done_callback(lambda task: self._loads.pop(key, None))
        assert load.task is not None
        # A client that leaves must not end the load that others wait for.
        return await asyncio.shield(load.task)

    async def _load(self, load: _Load, credential: bytes, reference: str | None) -> Refusal | None:
        try:
            async with self._turns, asyncio.timeout(QUERY_SECONDS):
                if self._seen is None:
                    await self._catch_up()
                while True:
                    load.changed.clear()
                    found = await self._find(credential, reference)
                    if found is None:
                        if not load.changed:
                            self._remember_unknown(credential)
                            return UNAUTHORIZED
                    elif _EVERYTHING not in load.changed and found.subjects.isdisjoint(load.changed):
                        return self._keep(credential, reference, found)
        except (DatabaseAway, TimeoutError, *_NOT_MIGRATED) as error:
            raise Unavailable(_AWAY) from error

    async def connect_instance(self, instance_id: UUID) -> Instance | Refusal:
        """An instance for who has shown elsewhere that they may use it, and whom no grant counts or limits.

        Raises:
            Unavailable: PostgreSQL is away.
        """
        subject = f"instances:{instance_id}"
        key = (b"", secrets.token_hex(8))  # no credential: only the changes meanwhile matter
        load = self._loads[key] = _Load()
        try:
            async with self._turns, asyncio.timeout(QUERY_SECONDS):
                if self._seen is None:
                    await self._catch_up()
                while True:
                    load.changed.clear()
                    row = await self._context.database.fetchrow(
                        f"SELECT {_INSTANCE} FROM instances i JOIN organizations o ON o.id = i.organization_id"
                        " WHERE i.id = $1 AND i.deleted_at IS NULL AND o.deleted_at IS NULL",
                        instance_id,
                    )
                    if load.changed.isdisjoint((_EVERYTHING, subject)):
                        break
        except (DatabaseAway, TimeoutError, *_NOT_MIGRATED) as error:
            raise Unavailable("the control plane's database cannot be reached") from error
        finally:
            del self._loads[key]
        if row is None or row["endpoint"] is None or row["desired_state"] != "running":
            return _NOT_RUNNING
        try:
            return self._instance(row) or _NO_ROUTE
        except DecryptionError as error:
            log.error("instance %s: its password cannot be decrypted: %s", row["id"], error)
            return _BROKEN

    # Loading

    async def _find(self, credential: bytes, reference: str | None) -> "_Found | None":
        claims = self._claims(credential)
        if claims is None:
            return None
        if isinstance(claims, bytes):
            return await self._find_instance_token(credential)
        if isinstance(claims, SessionClaims):
            return await self._find_session(claims, reference)
        return await self._find_key(credential, reference)

    async def _find_instance_token(self, credential: bytes) -> "_Found | None":
        row = await self._context.database.fetchrow(
            f"SELECT {_INSTANCE}, {_QUOTA}, i.token_digest = $1 AS may_write FROM instances i {_ORGANIZATION}"
            " WHERE (i.token_digest = $1 OR i.readonly_token_digest = $1)"
            " AND i.deleted_at IS NULL AND i.desired_state <> 'deleted'",
            token_digest(credential),
        )
        if row is None:
            return None
        found = _Found(_subjects(row), name=f"instance token of {row['label']}")
        scope = Scope(readonly=not row["may_write"])
        found.choice = await self._grant(row, scope, found.name, None, None, kind="token" if row["may_write"] else "ro")
        found.own_instance = (str(row["id"]), row["slug"], row["label"])
        return found

    async def _find_key(self, credential: bytes, reference: str | None) -> "_Found | None":
        database = self._context.database
        key = await database.fetchrow(
            f"SELECT k.*, {_QUOTA}, m.role FROM api_keys k JOIN organizations o ON o.id = k.organization_id"
            " JOIN users u ON u.id = k.user_id"
            " JOIN memberships m ON m.organization_id = k.organization_id AND m.user_id = k.user_id"
            " LEFT JOIN quotas q ON q.organization_id = k.organization_id"
            " WHERE k.digest = $1 AND k.revoked_at IS NULL AND k.expires_at > now()"
            " AND (k.valid_until IS NULL OR k.valid_until > now())"
            " AND o.deleted_at IS NULL AND u.disabled_at IS NULL",
            api_keys.digest(credential),
        )
        if key is None:
            return None
        scope = api_keys.data_scope(key["scopes"], key["key_prefixes"], key["role"])
        if scope is None:
            return None
        organization = key["organization_id"]
        subjects = {
            f"api_keys:{key['id']}",
            f"users:{key['user_id']}",
            f"organizations:{organization}",
            f"inventory:{organization}",
        }
        ends = [moment.timestamp() for moment in (key["expires_at"], key["valid_until"]) if moment is not None]
        found = _Found(subjects, name=f"{key['prefix']} ({key['name']})", until=min(ends))
        found.networks = tuple(key["networks"])
        # Two are enough to know that there are several.
        rows = await database.fetch(
            f"SELECT {_INSTANCE}, NULL AS role FROM instances i WHERE i.organization_id = $1 AND i.deleted_at IS NULL"
            " AND i.desired_state <> 'deleted' AND ($2::uuid[] IS NULL OR i.id = ANY ($2::uuid[]))"
            " AND ($3::text IS NULL OR i.id::text = $3 OR i.slug = $3 OR i.label = $3)"
            " ORDER BY i.id::text IS NOT DISTINCT FROM $3 DESC, i.slug IS NOT DISTINCT FROM $3 DESC LIMIT 2",
            organization,
            key["instance_ids"],
            reference,
        )
        if not rows:
            found.choice = UNAUTHORIZED if reference is not None else _NONE_YET
        elif reference is None and len(rows) > 1:
            found.choice = _SEVERAL
        else:
            subjects.add(f"instances:{rows[0]['id']}")
            found.choice = await self._grant(rows[0], scope, found.name, key, found.until, kind="key")
            if key["instance_ids"] is not None and len(key["instance_ids"]) == 1:
                found.own_instance = (str(rows[0]["id"]), rows[0]["slug"], rows[0]["label"])
        return found

    async def _find_session(self, claims: SessionClaims, reference: str | None) -> "_Found | None":
        database = self._context.database
        session = await database.fetchrow(
            "SELECT s.ends_at FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2"
            " AND s.revoked_at IS NULL AND s.ends_at > now() AND u.disabled_at IS NULL",
            claims.session_id,
            claims.user_id,
        )
        if session is None:
            return None
        subjects = {f"sessions:{claims.session_id}", f"users:{claims.user_id}"}
        until = min(float(claims.expires_at), session["ends_at"].timestamp())
        found = _Found(subjects, name=f"session of {claims.user_id}", until=until, header_only=True)
        found.choice = UNAUTHORIZED
        try:
            instance_id = UUID(reference)
        except (ValueError, TypeError):
            return found
        row = await database.fetchrow(
            f"SELECT {_INSTANCE}, {_QUOTA}, m.role FROM instances i {_ORGANIZATION}"
            " JOIN memberships m ON m.organization_id = i.organization_id AND m.user_id = $2"
            " WHERE i.id = $1 AND i.deleted_at IS NULL AND i.desired_state <> 'deleted'",
            instance_id,
            claims.user_id,
        )
        if row is not None:
            subjects |= _subjects(row)
            scope = Scope(readonly=row["role"] == "viewer")
            found.choice = await self._grant(row, scope, found.name, None, until, kind="session")
        return found

    async def _grant(
        self, row: Record, scope: Scope, name: str, key: Record | None, until: float | None, *, kind: str
    ) -> Grant | Refusal:
        """What a scope is on an instance; `row` is the instance's, `key` the API key's, which then has the quota."""
        if row["endpoint"] is None or row["desired_state"] != "running":
            return _NOT_RUNNING
        try:
            instance = self._instance(row)
            if instance is None:
                return _NO_ROUTE
        except DecryptionError as error:
            log.error("instance %s: its password cannot be decrypted: %s", row["id"], error)
            return _BROKEN
        quota = row if key is None else key
        organization = row["organization_id"]
        limits = []
        try:
            if key is not None:
                limit = await self._limit(key["id"], key["requests_per_second"], key["commands_per_day"])
                limits += [limit] if limit is not None else []
            limit = await self._limit(organization, quota["quota_requests_per_second"], quota["quota_commands_per_day"])
            limits += [limit] if limit is not None else []
        except SharedStateError as error:
            log.error("%s is refused: %s", name, error)
            return Refusal(503, b"ERR there is no room to count this token's limits", RETRY_AFTER)
        cell = self._usage.cell(organization, row["id"], kind, None if key is None else key["id"], instance.table)
        meter = Meter(limits, cell=cell, max_bytes=quota["quota_max_request_bytes"])
        return Grant(instance, scope, name=name, expires=until, limiter=meter)

    def _instance(self, row: Record) -> Instance | None:
        """The instance of a row, connected as the row says; None: it has no route now. Raises DecryptionError."""
        instance_id = str(row["id"])
        made_from: tuple[object, ...]
        if row["provisioner"] == "kubernetes":
            # No password of it is kept in PostgreSQL: the operator tells the gateways.
            route = self.routes.address(row["endpoint"]["kubernetes"]) if self.routes is not None else None
            if route is None:
                return None
            made_from = (route, row["slug"], row["label"])
        else:
            route = None
            made_from = (repr(row["endpoint"]), row["redis_user"], row["password_encrypted"], row["slug"], row["label"])
        known = self._access.instances.get(instance_id)
        if known is not None and self._connected.get(instance_id) == made_from:
            return known
        address = address_of(row, self._context.encryption) if route is None else route
        if known is not None:
            self._access.remove_instance(instance_id)
        instance = Instance(
            InstanceConfig(id=instance_id, address=address, slug=row["slug"]), self._scripts, label=row["label"]
        )
        self._access.add_instance(instance)
        self._connected[instance_id] = made_from
        return instance

    async def _limit(self, subject: UUID, rate: int | None, daily: int | None) -> Limit | None:
        """The limits of an organization or a key, which all its grants share in this worker."""
        if rate is None and daily is None:
            return None
        known = self._limits.get(subject)
        if known is not None and known[0] == (rate, daily):
            return known[1]
        if known is not None:
            known[1].flush(time.time())
        counter = self._shared.claim(subject_digest(subject.bytes), self._index)
        lease = await self._leases.open(subject, daily, counter) if daily is not None else None
        limit = Limit(counter, rate, daily, workers=self._shared.workers, lease=lease)
        if lease is not None:
            lease.on_report = limit.flush
        self._limits[subject] = ((rate, daily), limit)
        return limit

    def _keep(self, credential: bytes, reference: str | None, found: "_Found") -> Refusal | None:
        """Put what was found into the table."""
        choice = found.choice
        if found.own_instance is not None and not found.networks and isinstance(choice, Grant):
            self._index_subjects(credential, found.subjects)
            self._access.put(credential, choice)
            return None
        keyring = self._access.find(credential)
        if not isinstance(keyring, Keyring):
            keyring = Keyring(
                name=found.name, until=found.until, networks=found.networks, header_only=found.header_only
            )
            self._access.put(credential, keyring)
        self._index_subjects(credential, found.subjects | self._subjects.get(credential, frozenset()))
        if found.own_instance is not None:
            # Whatever name leads there; all others lead nowhere.
            for name in found.own_instance:
                keyring.learn(name, choice)
            keyring.learn(None, choice)
            if reference is not None and reference not in found.own_instance:
                keyring.learn(reference, UNAUTHORIZED)
        else:
            keyring.learn(reference, choice)
        return None

    def _index_subjects(self, credential: bytes, subjects: Iterable[str]) -> None:
        while len(self._subjects) >= MAX_CREDENTIALS and credential not in self._subjects:
            self._forget(next(iter(self._subjects)))
        self._subjects[credential] = frozenset(subjects)
        for subject in subjects:
            self._credentials.setdefault(subject, set()).add(credential)

    def _remember_unknown(self, credential: bytes) -> None:
        while len(self._unknown) >= MAX_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[credential] = time.monotonic() + UNKNOWN_SECONDS

    # Forgetting

    def _forget(self, credential: bytes) -> list[tuple[Grant, bytes, str | None]]:
        """Forget one credential; the grants it had, with the names that led to them."""
        for subject in self._subjects.pop(credential, frozenset()):
            others = self._credentials.get(subject)
            if others is not None:
                others.discard(credential)
                if not others:
                    del self._credentials[subject]
        grant = self._access.find(credential)
        self._access.remove(credential)
        if isinstance(grant, Keyring):
            return [(choice, credential, name) for name, choice in grant.choices()]
        return [(grant, credential, None)] if grant is not None else []

    def _forget_subjects(self, changed: set[str]) -> None:
        for load in self._loads.values():
            load.changed |= changed
        self._unknown.clear()
        gone: list[tuple[Grant, bytes, str | None]] = []
        for subject in changed:
            for credential in list(self._credentials.get(subject, ())):
                gone += self._forget(credential)
            kind, _, name = subject.partition(":")
            if kind == "instances":
                self._access.remove_instance(name)
                self._connected.pop(name, None)
            elif kind in ("api_keys", "organizations"):
                _, limit = self._limits.pop(UUID(name), (None, None))
                if limit is not None:
                    limit.flush(time.time())
        self._look_after_streams(gone)

    def forget_instance(self, instance_id: str) -> None:
        """Its route has changed."""
        self._forget_subjects({f"instances:{instance_id}"})

    def _forget_all(self) -> None:
        log.warning("what changed about access is not known completely: forgetting what is cached")
        gone: list[tuple[Grant, bytes, str | None]] = []
        for load in self._loads.values():
            load.changed |= {_EVERYTHING}
        for credential in list(self._subjects):
            gone += self._forget(credential)
        for instance_id in list(self._connected):
            self._access.remove_instance(instance_id)
        self._connected.clear()
        self._unknown.clear()
        self._look_after_streams(gone)

    def _look_after_streams(self, gone: list[tuple[Grant, bytes, str | None]]) -> None:
        """A subscription goes on for hours: it ends with the right to it, and only with that."""
        forgotten = {id(grant): (credential, name) for grant, credential, name in gone}
        for stream in list(self._access.streams):
            found = forgotten.get(id(stream.grant)) if stream.grant is not None else None
            if found is not None:
                self._begin(self._renew_stream(stream, *found))

    async def _renew_stream(self, stream: StreamExchange, credential: bytes, reference: str | None) -> None:
        while not stream.gone:
            try:
                refusal = self.refusal(credential) or await self.load(credential, reference)
            except Unavailable:
                await asyncio.sleep(POLL_SECONDS)
                continue
            choice: Grant | Refusal | None = self._access.find(credential)
            if isinstance(choice, Keyring):
                choice = choice.choose(reference)
            if isinstance(choice, Grant) and stream.may_go_on(choice):
                stream.grant = choice
            elif refusal is not None or choice is not None:
                stream.revoke()
            else:
                continue  # forgotten again meanwhile
            return

    # Following

    async def _follow(self) -> None:
        while True:
            try:
                async with asyncio.timeout(QUERY_SECONDS):
                    await self._catch_up()
            except (DatabaseAway, TimeoutError, *_NOT_MIGRATED):
                pass  # said by whoever needs it; here it only means that nothing new is known
            except Exception:
                log.exception("cannot read what changed about access")
            self._tick()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
            self._wake.clear()

    def _tick(self) -> None:
        now = time.time()
        for _, limit in self._limits.values():
            limit.flush(now)
        for stream in list(self._access.streams):
            if stream.grant is not None and stream.grant.expires is not None and now >= stream.grant.expires:
                stream.revoke()

    async def _catch_up(self) -> None:
        """Take every change into account that is committed by now. Raises DatabaseAway."""
        async with self._catching_up:
            rows = await self._context.database.fetch(
                "SELECT r.revision AS newest, c.revision, c.subject FROM access_revision r"
                " LEFT JOIN access_changes c ON c.revision > $1 AND c.revision <= r.revision"
                " ORDER BY c.revision LIMIT $2",
                self._seen if self._seen is not None else 2**62,
                MAX_CHANGES + 1,
            )
            newest = rows[0]["newest"]
            self._synced = time.monotonic()
            if self._seen is None:
                self._seen = newest
            elif newest != self._seen:
                whole = newest - self._seen == len(rows) and rows[0]["revision"] == self._seen + 1
                self._seen = newest
                if whole:
                    self._forget_subjects({row["subject"] for row in rows})
                else:
                    self._forget_all()

    @property
    def age(self) -> float:
        """Seconds since every change was known."""
        return time.monotonic() - self._synced

    async def _listen(self) -> None:
        """Be woken by notifications, on a connection that proves itself."""
        complained = False
        while True:
            connection = None
            try:
                connection = await self._context.database.connect_direct()
                await connection.add_listener(CHANNEL, self._heard)
                ended = asyncio.Event()
                connection.add_termination_listener(lambda _, ended=ended: ended.set())
                self._wake.set()
                while await self._prove():
                    self.listening, complained = True, False
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), PROOF_SECONDS)
                    if ended.is_set():
                        break
                else:
                    if not complained:
                        log.warning(
                            "notifications of PostgreSQL do not arrive, so changes of access take effect after a second"
                            " instead of at once; behind a pooler set REDISGATE_DATABASE_DIRECT_URL"
                        )
                    complained = True
            except (DatabaseAway, TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pass
            finally:
                self.listening = False
                if connection is not None:
                    await close(connection)
            await asyncio.sleep(PROOF_SECONDS if complained else POLL_SECONDS)

    async def _prove(self) -> bool:
        """Whether a notification that the pool sends reaches our listener."""
        self._nonce = "nonce:" + secrets.token_hex(16)
        self._proof.clear()
        async with asyncio.timeout(QUERY_SECONDS):
            await self._context.database.execute("SELECT pg_notify($1, $2)", CHANNEL, self._nonce)
        try:
            await asyncio.wait_for(self._proof.wait(), NONCE_SECONDS)
        except TimeoutError:
            return False
        return True

    def _heard(self, connection: object, pid: int, channel: str, payload: object) -> None:
        if payload == self._nonce:
            self._proof.set()
        elif not str(payload).startswith("nonce:"):
            self._wake.set()


@dataclass(slots=True)
class _Found:
    """What a credential turned out to be."""

    subjects: set[str]
    name: str
    until: float | None = None
    header_only: bool = False
    networks: tuple[Any, ...] = ()
    choice: Grant | Refusal = UNAUTHORIZED
    """On the instance that was asked for."""
    own_instance: tuple[str, str, str] | None = None
    """The names of the only instance it is good for, whatever else there is or will be."""


_INSTANCE: Final = (
    "i.id, i.organization_id, i.slug, i.label, i.desired_state, i.provisioner, i.endpoint, i.redis_user,"
    " i.password_encrypted"
)
_QUOTA: Final = (
    "q.requests_per_second AS quota_requests_per_second, q.commands_per_day AS quota_commands_per_day,"
    " q.max_request_bytes AS quota_max_request_bytes"
)
_ORGANIZATION: Final = (
    "JOIN organizations o ON o.id = i.organization_id AND o.deleted_at IS NULL"
    " LEFT JOIN quotas q ON q.organization_id = i.organization_id"
)


def _subjects(row: Record) -> set[str]:
    return {f"instances:{row['id']}", f"organizations:{row['organization_id']}"}
