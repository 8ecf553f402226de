"""Scripts that were written for newer servers than the one at hand.

A script may begin with a shebang line of flags, such as
`#!lua flags=allow-key-locking`. A server refuses flags it does not know, and
Redis 6 knows no shebang at all. So unknown flags are removed before a script
is sent; its clients know it by the SHA1 of the original all the same. Which
flags a server knows is found out by asking it, once each.

The aliases (original SHA1 to the one the server knows) are shared by all
workers before anybody is answered by them.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from redisgate.shared import instance_digest
from resp.commands import word
from resp.parser import ErrorReply

MAX_PROBED_FLAGS = 64
"""Unknown flags asked about per instance; what comes beyond is sent as it is, for the server to judge."""

_FLAGS = re.compile(rb"(?:^|(?<=[ \t]))flags=([^ \t]*)")
_SHA1 = re.compile(rb"[0-9a-fA-F]{40}")

Call = Callable[..., Awaitable[Any]]
"""Sends one command to the instance: `Pool.call`."""


class AliasStore(Protocol):
    """Aliases that all workers see: `redisgate.shared.SharedState`."""

    @property
    def alias_position(self) -> int: ...
    def publish_alias(self, instance: bytes, original: bytes, rewritten: bytes) -> None: ...
    def aliases_since(self, position: int) -> tuple[int, list[tuple[bytes, bytes, bytes]]]: ...


def sha1(script: bytes) -> bytes:
    """The name Redis gives a script: 40 lower-case hexadecimal digits."""
    return hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()


def split_shebang(script: bytes) -> tuple[bytes, list[bytes], bytes] | None:
    """First line, its flags, and the rest with its line end; None for a script without shebang."""
    if not script.startswith(b"#!"):
        return None
    line, newline, rest = script.partition(b"\n")
    match = _FLAGS.search(line)
    flags = [flag for flag in match[1].split(b",") if flag] if match else []
    return line, flags, newline + rest


class ScriptCache:
    """Aliases of one worker, for all its instances."""

    __slots__ = ("_aliases", "_position", "_store")

    MAX_ALIASES = 4096

    def __init__(self, store: AliasStore) -> None:
        self._store = store
        self._position = 0
        self._aliases: dict[tuple[bytes, bytes], bytes] = {}

    def resolve(self, instance: bytes, digest: bytes) -> bytes:
        """The SHA1 that the server knows the script by, which is nearly always the given one."""
        if self._store.alias_position != self._position:
            self._position, news = self._store.aliases_since(self._position)
            for owner, original, rewritten in news:
                while len(self._aliases) >= self.MAX_ALIASES:
                    del self._aliases[next(iter(self._aliases))]
                self._aliases[owner, original] = rewritten
        if not self._aliases:
            return digest
        return self._aliases.get((instance, digest.lower()), digest)

    def publish(self, instance: bytes, original: bytes, rewritten: bytes) -> None:
        """Let every worker know the script by its original SHA1; returns when they do."""
        if self.resolve(instance, original) != rewritten:
            self._store.publish_alias(instance, original, rewritten)


class InstanceScripts:
    """What one instance's server makes of script flags."""

    __slots__ = ("_cache", "_instance", "_known", "_shebang")

    def __init__(self, cache: ScriptCache, instance: str) -> None:
        self._cache = cache
        self._instance = instance_digest(instance.encode())
        self._known: dict[bytes, bool] = {}
        self._shebang: bool | None = None  # whether the server knows shebangs

    def forget(self) -> None:
        """The server may be another one now."""
        self._known.clear()
        self._shebang = None

    def unsettled(self, argv: Sequence[bytes]) -> bool:
        """Whether `prepare` has to be awaited before `rewrite` may be called."""
        script = self._script_of(argv)
        if script is None:
            return False
        shebang = split_shebang(script)
        if shebang is None:
            return False
        if self._shebang is None or any(flag not in self._known for flag in shebang[1]):
            return True
        return word(argv[0]) == b"SCRIPT" and self._rewritten(script) != script

    async def prepare(self, argv: Sequence[bytes], call: Call) -> bytes | None:
        """Ask the server what it knows. For a SCRIPT LOAD to be rewritten: load it, and return the frame to answer.

        Raises:
            RespError: the server did not answer.
        """
        script = self._script_of(argv)
        shebang = split_shebang(script) if script is not None else None
        if script is None or shebang is None:
            return None
        if self._shebang is None:
            self._shebang = not isinstance(await call(b"SCRIPT", b"LOAD", b"#!lua\nreturn 1"), ErrorReply)
        for flag in shebang[1]:
            if flag in self._known:
                continue
            if not self._shebang or len(self._known) >= MAX_PROBED_FLAGS:
                self._known[flag] = True
                continue
            reply = await call(b"SCRIPT", b"LOAD", b"#!lua flags=" + flag + b"\nreturn 1")
            self._known[flag] = not isinstance(reply, ErrorReply)
        if word(argv[0]) != b"SCRIPT":
            return None
        rewritten = self._rewritten(script)
        if rewritten == script:
            return None
        reply = await call(b"SCRIPT", b"LOAD", rewritten)
        if isinstance(reply, ErrorReply):
            return b"-%b\r\n" % str(reply).encode()
        original = sha1(script)
        self._cache.publish(self._instance, original, reply)
        return b"$40\r\n%b\r\n" % original

    def rewrite(self, argv: list[bytes]) -> list[bytes]:
        """The command as this server understands it."""
        name = word(argv[0])
        if name in (b"EVALSHA", b"EVALSHA_RO"):
            if len(argv) > 1:
                resolved = self._cache.resolve(self._instance, argv[1])
                return argv if resolved is argv[1] else [argv[0], resolved, *argv[2:]]
        elif name == b"SCRIPT":
            if len(argv) > 2 and word(argv[1]) == b"EXISTS":
                return [*argv[:2], *(self._cache.resolve(self._instance, digest) for digest in argv[2:])]
        elif len(argv) > 1 and argv[1].startswith(b"#!"):
            rewritten = self._rewritten(argv[1])
            if rewritten != argv[1]:
                self._cache.publish(self._instance, sha1(argv[1]), sha1(rewritten))
                return [argv[0], rewritten, *argv[2:]]
        return argv

    def _rewritten(self, script: bytes) -> bytes:
        shebang = split_shebang(script)
        if shebang is None:
            return script
        line, flags, rest = shebang
        if self._shebang is False:
            return rest  # an empty first line: error messages keep their line numbers
        unknown = [flag for flag in flags if not self._known.get(flag, True)]
        if not unknown:
            return script
        kept = b",".join(flag for flag in flags if flag not in unknown)
        line = _FLAGS.sub(b"flags=" + kept if kept else b"", line).rstrip(b" \t")
        return line + rest

    @staticmethod
    def _script_of(argv: Sequence[bytes]) -> bytes | None:
        name = word(argv[0])
        if name in (b"EVAL", b"EVAL_RO"):
            return argv[1] if len(argv) > 1 else None
        if name == b"SCRIPT" and len(argv) == 3 and word(argv[1]) == b"LOAD":
            return argv[2]
        return None
