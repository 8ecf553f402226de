"""The access table: what a credential grants, from memory.

A known credential costs one dictionary lookup, however many there are. The
table knows nothing of where its rows come from: configuration fills it, or a
`Source` does when a credential is met for the first time, and commands flow
while that is away.

What the header block of a request alone decides is a `Grant`. What also
depends on the request (several instances, networks, where the credential
stood) is a `Keyring`, from which `AccessTable.resolve` takes a grant.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, Protocol

from redisgate.config import InstanceConfig
from redisgate.counters import WORKER
from redisgate.exchange import UNAUTHORIZED_LINE
from redisgate.policy import Policy, Scope
from redisgate.scripts import InstanceScripts, ScriptCache
from resp.address import Address
from resp.commands import bundled_table
from resp.connection import connect
from resp.errors import ConnectFailed, LoginRefused, ReplyLost
from resp.monitor import MonitorHub
from resp.pool import Pool
from resp.subscriptions import SubscriptionHub

if TYPE_CHECKING:
    from redisgate.metering import UsageCell
    from redisgate.streams import StreamExchange

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

LOGIN_TEST_SECONDS = 10.0
"""For the login of a user whose streams are open."""
MAX_USER_POOLS = 64
"""Pools per instance for tokens that act as a Redis user of their own; beyond it the longest unused is closed."""
MAX_REFERENCE_LENGTH = 128
"""Characters of a name of an instance; longer ones name none."""
MAX_REFERENCES = 1024
"""Names of instances, right or wrong, that a credential for several remembers; then it forgets the oldest."""
GUARDED = 0.0
"""`expires` of a `Keyring`: long ago, so that no request passes by the header block alone."""


class Backend:
    """One instance as one Redis user: its connections, streams and scripts."""

    __slots__ = ("_address", "_login_test", "monitor", "pool", "subscriptions")

    def __init__(self, address: Address, config: InstanceConfig) -> None:
        self._address = address
        self._login_test: asyncio.Task[None] | None = None
        self.pool = Pool(
            address,
            size=config.pool_size,
            max_waiting=config.max_waiting,
            connect_timeout=config.connect_timeout,
            command_timeout=config.command_timeout,
            stall_timeout=config.stall_timeout,
            idle_timeout=config.idle_timeout,
        )
        self.subscriptions = SubscriptionHub(address, connect_timeout=config.connect_timeout)
        self.monitor = MonitorHub(address, connect_timeout=config.connect_timeout)

    def renew(self) -> None:
        """Let commands log in anew; streams go on unless the login is refused."""
        self.pool.renew()
        if self.streaming and self._login_test is None:
            self._login_test = asyncio.get_running_loop().create_task(self._test_login())

    async def _test_login(self) -> None:
        try:
            connection = await connect(self._address, timeout=LOGIN_TEST_SECONDS)
        except LoginRefused:
            self._close_streams()
        except ConnectFailed:
            pass  # says nothing about the login; streams notice for themselves when Redis is gone
        else:
            connection.close(ReplyLost("done"))
        finally:
            self._login_test = None

    @property
    def streaming(self) -> bool:
        """Whether a stream has a connection, or waits for one."""
        return self.subscriptions.active or self.monitor.active

    def _close_streams(self) -> None:
        self.subscriptions.close()
        self.monitor.close()

    def close(self) -> None:
        """Admit nothing new; connections close after their last reply."""
        self.pool.close()
        self._close_streams()
        if self._login_test is not None:
            self._login_test.cancel()

    def abort(self) -> None:
        """Close every connection now."""
        self.close()
        self.pool.abort()


class Instance:
    """A Redis that tokens can name."""

    __slots__ = (
        "_policies",
        "_users",
        "backend",
        "config",
        "counters",
        "id",
        "label",
        "names",
        "over_capacity",
        "scripts",
        "slug",
        "table",
    )

    def __init__(self, config: InstanceConfig, scripts: ScriptCache, *, label: str | None = None) -> None:
        """`label` names it under the base domain; by default the slug does."""
        self.config = config
        self.id = config.id
        self.slug = config.slug
        self.label = config.slug if label is None else label
        self.counters = WORKER.instance(config.id, self.label or config.id)
        # A host comes in lower case: there is no case in domain names.
        names = (config.id, config.slug, self.label)
        self.names = frozenset((*names, *(name.lower() for name in names)))
        self.over_capacity = False
        """Its server uses more memory than `config.capacity`, as last seen by `redisgate.capacity`."""
        self.table = bundled_table()
        self.scripts = InstanceScripts(scripts, config.id)
        self.backend = Backend(config.address, config)
        self._policies: dict[Scope, Policy] = {}
        self._users: OrderedDict[tuple[str, str], Backend] = OrderedDict()

    def policy(self, scope: Scope) -> Policy:
        """Equal scopes share one policy, so that its memory does not grow with the number of tokens."""
        policy = self._policies.get(scope)
        if policy is None:
            policy = self._policies[scope] = Policy(self.table, scope)
        return policy

    def user_backend(self, user: str, password: str) -> Backend:
        """The connections of a Redis user of its own."""
        backend = self._users.get((user, password))
        if backend is None:
            while len(self._users) >= MAX_USER_POOLS:
                self._users.popitem(last=False)[1].close()
            address = self.config.address.with_login(user, password)
            backend = self._users[user, password] = Backend(address, self.config)
        else:
            self._users.move_to_end((user, password))
        return backend

    def needs_memory(self, argv: Sequence[bytes]) -> bool:
        """Whether a command may make the data grow; of one that the table does not know: False."""
        command = self.table.find(argv)
        return command is not None and "denyoom" in command.flags

    def backends(self) -> list[Backend]:
        """Its connections, by Redis user."""
        return [self.backend, *self._users.values()]

    @property
    def last_used(self) -> float:
        """When a command was sent to it last, to a tenth of a second; monotonic."""
        return max(backend.pool.last_used for backend in (self.backend, *self._users.values()))

    def renew_users(self) -> None:
        """Make users of their own log in again, so that a changed password or a deleted user takes effect."""
        for login, backend in list(self._users.items()):
            if backend.streaming or backend.pool.connection_count:
                backend.renew()
            else:
                del self._users[login]
                backend.close()

    def close(self) -> None:
        """Admit nothing new; connections close after their last reply."""
        self.renew_users()
        self.backend.close()

    def abort(self) -> None:
        """Close every connection now."""
        for backend in (self.backend, *self._users.values()):
            backend.abort()


class Limiter(Protocol):
    """Counts and refuses requests of one token."""

    cell: "UsageCell | None"
    """Where its usage is counted."""
    limited: bool
    """Whether its answers say where it stands: `headers`."""

    def admit(self, argv: Sequence[bytes]) -> "LimitRefusal | None":
        """Count one command, or say why not; a refusal counts nothing."""
        ...

    def admit_all(self, commands: Sequence[Sequence[bytes]]) -> "LimitRefusal | None":
        """Count all of the commands, or say why none of them."""
        ...

    def headers(self) -> bytes:
        """Header lines that tell the client how much is left."""
        ...


@dataclass(frozen=True, slots=True)
class LimitRefusal:
    """Why a limit refuses a request, and after how many seconds to try again; 0: never.

    With `wait` it is not decided yet: await that, and ask again.
    """

    line: bytes
    retry_after: int
    status: int = 429
    kind: str = "rate"
    """Which limit: rate, daily, size; for the metrics."""
    wait: Callable[[], Coroutine[Any, Any, None]] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """How to answer instead of running a command."""

    status: int
    line: bytes
    headers: bytes = b""


UNAUTHORIZED = Refusal(401, UNAUTHORIZED_LINE)
WRONG_NETWORK = Refusal(403, b"NOPERM this token may not be used from this address")


class Grant:
    """What one credential may do."""

    __slots__ = ("expires", "full", "instance", "limiter", "name", "policy", "user")

    def __init__(
        self,
        instance: Instance,
        scope: Scope,
        *,
        name: str,
        expires: float | None = None,
        limiter: Limiter | None = None,
        user: tuple[str, str] | None = None,
    ) -> None:
        """`expires` in unix seconds; `user` is the Redis user and password it acts as."""
        self.instance = instance
        self.policy = instance.policy(scope)
        self.name = name
        self.expires = expires
        self.limiter = limiter
        self.user = user
        self.full = scope == Scope() and expires is None and limiter is None and user is None
        """Whether nothing is kept from it."""

    @property
    def backend(self) -> Backend:
        """The connections to send its commands on."""
        if self.user is None:
            return self.instance.backend
        return self.instance.user_backend(*self.user)

    @property
    def instance_id(self) -> str | None:
        """Of its instance; None where that is not yet chosen."""
        return self.instance.id

    def names(self, reference: str) -> bool:
        """Whether its instance has this id, slug or label."""
        return reference in self.instance.names


class Keyring(Grant):
    """Grants that a request chooses from by what it says beside its credential.

    It stands in the table in the place of a grant, and is out of date from the beginning: whoever finds one there asks
    `AccessTable.resolve`.
    """

    __slots__ = ("_choices", "header_only", "networks", "until")

    def __init__(
        self, *, name: str, until: float | None = None, networks: Iterable[IpNetwork] = (), header_only: bool = False
    ) -> None:
        """`until`: unix seconds; `networks`: the client must be in one, if there are any."""
        self.name = name
        self.expires = GUARDED
        self.until = until
        self.networks = tuple(networks)
        self.header_only = header_only
        self._choices: dict[str | None, Grant | Refusal] = {}

    @property
    def instance_id(self) -> str | None:
        return None

    def names(self, reference: str) -> bool:
        return False

    def learn(self, reference: str | None, choice: Grant | Refusal) -> None:
        """What this name of an instance leads to; None: no name."""
        while len(self._choices) >= MAX_REFERENCES:
            del self._choices[next(iter(self._choices))]
        self._choices[reference] = choice

    def choose(self, reference: str | None) -> Grant | Refusal | None:
        """What was learned of this name."""
        return self._choices.get(reference)

    def choices(self) -> list[tuple[str | None, Grant]]:
        """All that can be chosen, with the names that lead there."""
        return [(name, choice) for name, choice in self._choices.items() if isinstance(choice, Grant)]


class Source(Protocol):
    """Where credentials come from that the table does not know."""

    def refusal(self, credential: bytes) -> Refusal | None:
        """Whether it is known without asking anybody that a credential grants nothing."""
        ...

    async def load(self, credential: bytes, reference: str | None) -> Refusal | None:
        """Put into the table what a credential grants on the instance of this name, or tell that it grants nothing.

        Raises:
            resp.errors.Unavailable: it cannot be told now.
        """
        ...


class AccessTable:
    """Credential bytes to `Grant`."""

    __slots__ = ("_derive", "_digests", "_grants", "instances", "revision", "source", "streams")

    def __init__(self, derive: Callable[[bytes, "AccessTable"], Grant | None] | None = None) -> None:
        """`derive` makes the grant of a credential that carries its own proof, or returns None."""
        self._grants: dict[bytes, Grant] = {}
        self._digests: dict[bytes, Grant] = {}
        self._derive = derive
        self.instances: dict[str, Instance] = {}
        self.revision = 0
        self.source: Source | None = None
        self.streams: set[StreamExchange] = set()
        """Answers that go on for as long as the right to them does."""

    def add_instance(self, instance: Instance) -> None:
        """Make an instance known by its id."""
        self.instances[instance.id] = instance
        self.revision += 1

    def remove_instance(self, instance_id: str) -> None:
        """Forget an instance; what is under way on it may finish. Its grants are the caller's to remove."""
        instance = self.instances.pop(instance_id, None)
        if instance is not None:
            instance.close()
            WORKER.retire(instance_id)
            self.revision += 1

    def put(self, credential: bytes, grant: Grant) -> None:
        """Let `credential` grant `grant`."""
        self._grants[credential] = grant
        self.revision += 1

    def remove(self, credential: bytes) -> None:
        """Let `credential` grant nothing more."""
        if self._grants.pop(credential, None) is not None:
            self.revision += 1

    @property
    def size(self) -> int:
        """How many credentials are known."""
        return len(self._grants)

    def put_digest(self, digest: bytes, grant: Grant) -> None:
        """Let the credential with this SHA-256 grant `grant`: for those that we are never told."""
        self._digests[digest] = grant
        self.revision += 1

    def find_digest(self, digest: bytes) -> Grant | None:
        """What the credential with this SHA-256 grants, whether or not it has expired."""
        return self._digests.get(digest)

    def remove_digest(self, digest: bytes) -> None:
        """Let the credential with this SHA-256 grant nothing more."""
        if self._digests.pop(digest, None) is not None:
            self.revision += 1

    def find(self, credential: bytes) -> Grant | None:
        """What stands in the table, whether or not it has expired."""
        return self._grants.get(credential)

    def lookup(self, credential: bytes) -> Grant | None:
        """What the credential grants now; None if nothing (any more)."""
        grant = self._grants.get(credential)
        if grant is None:
            if self._digests:
                grant = self._digests.get(hashlib.sha256(credential).digest())
            if grant is None and self._derive is not None:
                grant = self._derive(credential, self)
            if grant is None:
                return None
        if grant.expires is not None and grant.expires != GUARDED and time.time() >= grant.expires:
            return None
        return grant

    def resolve(
        self, credential: bytes, reference: str | None, *, in_header: bool, address: Callable[[], IpAddress | None]
    ) -> Grant | Refusal | None:
        """What a credential grants on the instance that a request names; None: the source has to be asked.

        `in_header`: it stands where a `header_only` credential has to. `address` tells the client's address, and is
        called only where it matters.
        """
        if reference is not None and (len(reference) > MAX_REFERENCE_LENGTH or "\0" in reference):
            return UNAUTHORIZED  # no instance has such a name: nothing to look up, nothing to remember
        grant = self._grants.get(credential)
        if grant is None:
            derived = self.lookup(credential)
            if derived is not None:
                return derived if reference is None or derived.names(reference) else UNAUTHORIZED
            return UNAUTHORIZED if self.source is None else self.source.refusal(credential)
        if not isinstance(grant, Keyring):
            if grant.expires is not None and time.time() >= grant.expires:
                return UNAUTHORIZED
            return grant if reference is None or grant.names(reference) else UNAUTHORIZED
        if grant.until is not None and time.time() >= grant.until:
            return UNAUTHORIZED
        if grant.header_only and not in_header:
            return UNAUTHORIZED
        if grant.networks:
            client = address()
            if client is None or not any(client in network for network in grant.networks):
                return WRONG_NETWORK
        return grant.choose(reference)

    def renew_users(self) -> None:
        """Have every instance's own users log in again."""
        for instance in self.instances.values():
            instance.renew_users()

    def abort(self) -> None:
        """Close the connections to every instance now."""
        for instance in self.instances.values():
            instance.abort()


def token_digest(token: str) -> bytes:
    """What names a token in shared memory and files: 32 bytes."""
    return hashlib.blake2b(token.encode(), digest_size=32, person=b"token").digest()
