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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from redisgate.shared import instance_digest
from resp.commands import word
from resp.parser import ErrorReply

MAX_REMEMBERED_FLAGS = 64
"""Flags remembered per instance; a new one then takes the place of the oldest, which is asked about again."""
MAX_FLAG_BYTES = 64
"""No flag of a server is longer; longer ones are unknown without asking or remembering."""

_FLAGS = re.compile(rb"(?:^|(?<=[ \t]))flags=([^ \t]*)")
# What a server says of a flag, an engine (Valkey: without its Lua module) or, Redis 6, of any shebang it does not know.
# Any other error says nothing of that: the user may not ask, or a script keeps the server busy.
_UNKNOWN = re.compile(
    r"ERR (Unexpected (flag|engine) in script shebang|Could not find scripting engine|Error compiling)"
)

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


class _NotAnswered(Exception):
    """The server's error line to a question about flags, which leaves the question open."""


class InstanceScripts:
    """What one instance's server makes of script flags."""

    __slots__ = ("_cache", "_instance", "_known", "_shebang")

    def __init__(self, cache: ScriptCache, instance: str) -> None:
        self._cache = cache
        self._instance = instance_digest(instance.encode())
        self._known: dict[bytes, bool] = {}
        self._shebang: bool | None = None  # whether the server knows shebangs

    def unsettled(self, argv: Sequence[bytes]) -> bool:
        """Whether `prepare` has to be awaited before `rewrite` may be called."""
        script = self._script_of(argv)
        if script is None:
            return False
        shebang = split_shebang(script)
        if shebang is None:
            return False
        if self._shebang is None or any(self._knows(flag) is None for flag in shebang[1]):
            return True
        return word(argv[0]) == b"SCRIPT" and self._rewritten(shebang, self._known) != script

    async def prepare(self, argv: list[bytes], ask: Call, call: Call) -> list[bytes] | bytes:
        """Ask the server what it knows, and rewrite the command; a SCRIPT LOAD to be rewritten is run here.

        What one user may not ask would be unknown to all the others; so `ask` is of the instance's own user, `call`
        of the one whose command it is. Returns the command to send, or the frame to answer.

        Raises:
            RespError: the server did not answer.
        """
        script = self._script_of(argv)
        shebang = split_shebang(script) if script is not None else None
        if script is None or shebang is None:
            return self.rewrite(argv)
        try:
            if self._shebang is None:
                self._shebang = await self._accepts(b"#!lua\nreturn 1", ask)
            # Kept here too: of a script with very many flags not all are remembered.
            known: dict[bytes, bool] = {}
            for flag in shebang[1]:
                knows = known.get(flag)
                if knows is None:
                    knows = self._knows(flag)
                if knows is None:
                    knows = await self._accepts(b"#!lua flags=" + flag + b"\nreturn 1", ask)
                    self._remember(flag, knows)
                known[flag] = knows
        except _NotAnswered as error:
            return b"-%b\r\n" % str(error).encode()
        rewritten = self._rewritten(shebang, known)
        if rewritten == script:
            return argv
        if word(argv[0]) == b"SCRIPT":
            reply = await call(b"SCRIPT", b"LOAD", rewritten)
            if isinstance(reply, ErrorReply):
                return b"-%b\r\n" % str(reply).encode()
        original = sha1(script)
        self._cache.publish(self._instance, original, sha1(rewritten))
        if word(argv[0]) == b"SCRIPT":
            return b"$40\r\n%b\r\n" % original
        return [argv[0], rewritten, *argv[2:]]

    @staticmethod
    async def _accepts(script: bytes, ask: Call) -> bool:
        reply = await ask(b"SCRIPT", b"LOAD", script)
        if not isinstance(reply, ErrorReply):
            return True
        if _UNKNOWN.match(reply) is None:
            raise _NotAnswered(str(reply))
        return False

    def _knows(self, flag: bytes) -> bool | None:
        """Whether the server knows a flag; None: it has to be asked."""
        if self._shebang is False or len(flag) > MAX_FLAG_BYTES:
            return False
        return self._known.get(flag)

    def _remember(self, flag: bytes, knows: bool) -> None:
        if len(self._known) >= MAX_REMEMBERED_FLAGS:
            # The flag in everyday use stays, whatever others make up.
            del self._known[next(known for known in self._known if known != b"allow-key-locking")]
        self._known[flag] = knows

    def rewrite(self, argv: list[bytes]) -> list[bytes]:
        """The command as this server understands it."""
        name = word(argv[0])
        if name in (b"EVALSHA", b"EVALSHA_RO"):
            if len(argv) > 1:
                resolved = self._cache.resolve(self._instance, argv[1])
                return argv if resolved is argv[1] else [argv[0], resolved, *argv[2:]]
        elif name == b"SCRIPT" and len(argv) > 2 and word(argv[1]) == b"EXISTS":
            return [*argv[:2], *(self._cache.resolve(self._instance, digest) for digest in argv[2:])]
        elif name != b"SCRIPT" and len(argv) > 1:
            shebang = split_shebang(argv[1])
            rewritten = self._rewritten(shebang, self._known) if shebang is not None else argv[1]
            if rewritten != argv[1]:
                self._cache.publish(self._instance, sha1(argv[1]), sha1(rewritten))
                return [argv[0], rewritten, *argv[2:]]
        return argv

    def _rewritten(self, shebang: tuple[bytes, list[bytes], bytes], known: Mapping[bytes, bool]) -> bytes:
        line, flags, rest = shebang
        if self._shebang is False:
            return rest  # an empty first line: error messages keep their line numbers
        kept = [flag for flag in flags if known.get(flag, False)]
        if len(kept) == len(flags):
            return line + rest
        line = _FLAGS.sub(b"flags=" + b",".join(kept) if kept else b"", line, count=1).rstrip(b" \t")
        return line + rest

    @staticmethod
    def _script_of(argv: Sequence[bytes]) -> bytes | None:
        name = word(argv[0])
        if name in (b"EVAL", b"EVAL_RO"):
            return argv[1] if len(argv) > 1 else None
        if name == b"SCRIPT" and len(argv) == 3 and word(argv[1]) == b"LOAD":
            return argv[2]
        return None
