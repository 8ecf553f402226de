"""Passwords: argon2id, in a few threads that never stand in the way of the event loop.

A hash costs tens of milliseconds and megabytes on purpose. So a worker makes few at a time; the others wait in line,
and when the line is too long the answer is 503, not a slower gateway. The threads run at a lower priority than the
loop's (Linux gives each thread its own), so that commands go first on a busy core.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import os
import sys
import threading
import unicodedata
from collections.abc import AsyncIterator
from typing import Final, Protocol

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.low_level import ARGON2_VERSION

MIN_PASSWORD_LENGTH: Final = 8
MAX_PASSWORD_LENGTH: Final = 1024
"""Characters. A bound on work, not on safety."""
NICENESS: Final = 10


class TooBusy(Exception):
    """Too many passwords wait to be checked. Nothing was checked."""


class Turn(Protocol):
    """A place at the threads: what is done with it is not done by more than `threads` requests at a time."""

    async def verify(self, password: str, password_hash: str | None) -> bool:
        """Whether the password is the one that was hashed; None costs the same and is never right."""
        ...

    async def hash(self, password: str) -> str:
        """A hash to store."""
        ...


class Passwords:
    """Hashes and verifies passwords with the parameters of the settings."""

    def __init__(self, *, time_cost: int, memory_kib: int, parallelism: int, threads: int, max_waiting: int) -> None:
        self._hasher = PasswordHasher(
            time_cost=time_cost, memory_cost=memory_kib, parallelism=parallelism, hash_len=32, salt_len=16, type=Type.ID
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "argon2", _be_nice)
        self._places = asyncio.Semaphore(threads)
        self._max_waiting = max_waiting
        self._waiting = 0
        # What an unknown account's password is compared with: costs as much as any hash, and nothing is known to match.
        salt, digest = _base64(os.urandom(16)), _base64(os.urandom(32))
        parameters = f"m={memory_kib},t={time_cost},p={parallelism}"
        self._nobody = f"$argon2id$v={ARGON2_VERSION}${parameters}${salt}${digest}"

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait for a place at the threads.

        Raises:
            TooBusy: `max_waiting` others wait already.
        """
        if self._waiting >= self._max_waiting:
            raise TooBusy
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield _Turn(self)
        finally:
            self._places.release()

    async def hash(self, password: str) -> str:
        """A hash to store.

        Raises:
            TooBusy: too many wait already.
        """
        async with self.turn() as turn:
            return await turn.hash(password)

    def needs_rehash(self, password_hash: str) -> bool:
        """Whether a hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(password_hash)

    def close(self) -> None:
        """Take no more work; what a thread is at ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run_hash(self, password: str) -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._hasher.hash, _prepared(password))

    async def _run_verify(self, password: str, password_hash: str | None) -> bool:
        loop = asyncio.get_running_loop()
        right = await loop.run_in_executor(
            self._threads, self._verify, _prepared(password), password_hash or self._nobody
        )
        return right and password_hash is not None

    def _verify(self, password: bytes, password_hash: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (VerificationError, InvalidHashError):
            return False


class _Turn:
    def __init__(self, passwords: Passwords) -> None:
        self._passwords = passwords

    async def verify(self, password: str, password_hash: str | None) -> bool:
        return await self._passwords._run_verify(password, password_hash)

    async def hash(self, password: str) -> str:
        return await self._passwords._run_hash(password)


def _prepared(password: str) -> bytes:
    # One password, however the keyboard composed its accents (RFC 8265). Lone surrogates are somebody's bad JSON.
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).rstrip(b"=").decode()


def _be_nice() -> None:
    # Not everywhere a thread's own (POSIX says the process's): only where it is.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
