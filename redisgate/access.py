"""The access table: what a credential grants, from memory.

A known credential costs one dictionary lookup, however many there are. The
table knows nothing of where its rows come from: configuration fills it now,
a control plane may fill it later, and commands flow while that is away.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from redisgate.config import InstanceConfig
from redisgate.policy import Policy, Scope
from redisgate.scripts import InstanceScripts, ScriptCache
from resp.address import Address
from resp.commands import bundled_table
from resp.connection import connect
from resp.errors import ConnectFailed, LoginRefused, ReplyLost
from resp.monitor import MonitorHub
from resp.pool import Pool
from resp.subscriptions import SubscriptionHub

LOGIN_TEST_SECONDS = 10.0
"""For the login of a user whose streams are open."""
MAX_USER_POOLS = 64
"""Pools per instance for tokens that act as a Redis user of their own; beyond it the longest unused is closed."""


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

    __slots__ = ("_policies", "_users", "backend", "config", "id", "names", "over_capacity", "scripts", "slug", "table")

    def __init__(self, config: InstanceConfig, scripts: ScriptCache) -> None:
        self.config = config
        self.id = config.id
        self.slug = config.slug
        # A host comes in lower case: there is no case in domain names.
        self.names = frozenset((config.id, config.slug, config.id.lower(), config.slug.lower()))
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

    def abort(self) -> None:
        """Close every connection now."""
        for backend in (self.backend, *self._users.values()):
            backend.abort()


class Limiter(Protocol):
    """Counts and refuses requests of one token."""

    def admit(self, count: int) -> "LimitRefusal | None":
        """Count `count` commands, or say why not; a refusal counts nothing."""
        ...


@dataclass(frozen=True, slots=True)
class LimitRefusal:
    """Why a limit refuses a request, and after how many seconds to try again."""

    line: bytes
    retry_after: int


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

    def names(self, reference: str) -> bool:
        """Whether its instance has this id or slug."""
        return reference in self.instance.names


class AccessTable:
    """Credential bytes to `Grant`."""

    __slots__ = ("_derive", "_grants", "instances", "revision")

    def __init__(self, derive: Callable[[bytes, "AccessTable"], Grant | None] | None = None) -> None:
        """`derive` makes the grant of a credential that carries its own proof, or returns None."""
        self._grants: dict[bytes, Grant] = {}
        self._derive = derive
        self.instances: dict[str, Instance] = {}
        self.revision = 0

    def add_instance(self, instance: Instance) -> None:
        """Make an instance known by its id."""
        self.instances[instance.id] = instance
        self.revision += 1

    def put(self, credential: bytes, grant: Grant) -> None:
        """Let `credential` grant `grant`."""
        self._grants[credential] = grant
        self.revision += 1

    def lookup(self, credential: bytes) -> Grant | None:
        """What the credential grants now; None if nothing (any more)."""
        grant = self._grants.get(credential)
        if grant is None:
            grant = self._derive(credential, self) if self._derive is not None else None
            if grant is None:
                return None
        if grant.expires is not None and time.time() >= grant.expires:
            return None
        return grant

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
