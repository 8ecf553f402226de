"""What a token may run, decided before anything reaches Redis.

Two questions. May anybody run this over a connection that all clients share? Commands that change the connection,
block it, answer more or less than once, leave the database or administer the server may not. May this token run it?
That is its scope. The answers come from the command table's flags and categories; the small tables below, each entry
with its reason, say what the flags do not.

A Rule answers per command name and is remembered for each spelling, so a common command costs one dictionary lookup.
Only where the answer depends on the arguments (options, subcommands, key prefixes, sizes) does `Rule.check` look.

What surprised us: Redis looks names up in a hash table that compares them as C strings, so a name with a NUL byte in it
reaches the command before the NUL as soon as their hashes share a bucket (1 of 300 tries). And a command named POST or
Host: makes it close the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redisgate.counters import WORKER, Series
from resp.commands import Command, CommandTable, integer, word

# Spellings remembered per policy; when full, all are forgotten, which costs each one more look into the table.
MAX_REMEMBERED_NAMES = 4096

# No command of Redis or its modules comes near; longer names are not worth asking the server about. In bytes.
MAX_NAME_BYTES = 128

# A range of more elements than this belongs to the slow lane.
MAX_FAST_ELEMENTS = 1000


@dataclass(frozen=True)
class Scope:
    """What a token may do. Names are as in `COMMAND LIST`, in any case: "get", "config|get", "@read"."""

    readonly: bool = False
    allow: frozenset[str] = frozenset()  # empty: everything
    deny: frozenset[str] = frozenset()  # wins over allow
    prefixes: tuple[bytes, ...] = ()  # empty: every key
    own_user: bool = False  # mapped to a Redis ACL user of its own, so Redis looks inside scripts too


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for one argument list: refuse it, answer it here, or send it by one of the lanes."""

    refusal: bytes | None = None  # error line
    local: bytes | None = None  # a whole RESP2 frame; nothing is sent
    slow: bool = False


FAST = Verdict()
SLOW = Verdict(slow=True)
LOCAL_OK = Verdict(local=b"+OK\r\n")

Check = Callable[[Sequence[bytes]], Verdict]


_NOBODYS = Series()


class Rule:
    """What a policy says of one command name. Neither plain nor a refusal: `check` looks at the arguments."""

    __slots__ = ("check", "plain", "refusal", "resttoken", "script", "series", "slow")

    plain: bool  # nothing in the arguments matters: send it, by the slow lane if slow
    slow: bool  # belongs to the slow lane
    refusal: bytes | None  # error line; the command never runs
    script: bool  # EVAL, EVALSHA, their _RO forms and SCRIPT: may need rewriting
    resttoken: bool  # may be ACL RESTTOKEN, which check() leaves to the gateway: it never reaches Redis
    check: Check  # right for plain and refused commands too; never raises
    series: Series  # that counts it

    def __init__(
        self,
        *,
        refusal: bytes | None = None,
        slow: bool = False,
        script: bool = False,
        resttoken: bool = False,
        check: Check | None = None,
    ) -> None:
        constant = Verdict(refusal=refusal) if refusal is not None else SLOW if slow else FAST
        self.plain = refusal is None and check is None and not script
        self.slow = slow
        self.refusal = refusal
        self.script = script
        self.resttoken = resttoken
        self.check = check if check is not None and refusal is None else lambda argv: constant
        self.series = _NOBODYS


# --- What nobody may run over a shared connection ---------------------------------------------------------------------

_STATE = "it changes the connection that all clients share"
_TRANSACTION = "connections are shared; send the commands of a transaction to /multi-exec"
_SUBSCRIBE = "connections are shared; use the /subscribe stream"
_PSUBSCRIBE = "connections are shared; use the /psubscribe stream"
_ADMIN = "it administers the server; use redis-cli on the server itself"
_CLUSTER = "which nodes serve an instance is the gateway's business"
_WAIT = "it would hold up all who share the connection, and tell of their writes too"
_BLOCKING = "it would block the connection that all clients share; use its form that does not wait, and ask again"
_DATABASE = "it reaches another database; a token's commands stay in the database of its instance"

# What the flags do not tell, or do not tell well.
_REASONS: dict[bytes, str] = {
    b"ASKING": _CLUSTER,
    b"AUTH": "the gateway authenticates by the token of the request",
    b"CLUSTER": _CLUSTER,
    b"DISCARD": _TRANSACTION,
    b"EXEC": _TRANSACTION,
    # Ends whichever function runs: on a shared server that may be somebody else's.
    b"FUNCTION|KILL": _ADMIN,
    b"HELLO": "the gateway speaks RESP2 to Redis; replies are JSON, or RESP2 with Upstash-Response-Format: resp2",
    # Flagged as a write only; connects to any address it is told, and the server waits for it.
    b"MIGRATE": _ADMIN,
    b"MONITOR": "connections are shared; use the /monitor stream",
    b"MOVE": _DATABASE,
    b"MULTI": _TRANSACTION,
    b"PSUBSCRIBE": _PSUBSCRIBE,
    b"PUNSUBSCRIBE": _PSUBSCRIBE,
    b"READONLY": _CLUSTER,
    b"READWRITE": _CLUSTER,
    # Turns the connection into a debugger session.
    b"SCRIPT|DEBUG": _STATE,
    b"SCRIPT|KILL": _ADMIN,
    # Exchanges what all clients of both databases see.
    b"SWAPDB": _DATABASE,
    b"UNWATCH": "connections are shared; compare and set in a script",
    # Redis 7.0 does not flag it as blocking.
    b"WAIT": _WAIT,
    b"WAITAOF": _WAIT,
    b"WATCH": "connections are shared; compare and set in a script",
}

# The connection category holds what changes the connection, and these; SELECT has a check of its own.
_HARMLESS_CONNECTION = frozenset(
    b"PING ECHO SELECT CLIENT|ID CLIENT|INFO CLIENT|GETNAME CLIENT|HELP"
    b" COMMAND COMMAND|COUNT COMMAND|DOCS COMMAND|GETKEYS COMMAND|GETKEYSANDFLAGS COMMAND|HELP COMMAND|INFO"
    b" COMMAND|LIST".split()
)

# Flagged admin, allowed after a look at the arguments.
_CHECKED_ADMIN = frozenset({b"CONFIG|GET"})

# Flagged as blocking, but blocks only where its arguments say so.
_BLOCKS_BY_OPTION = frozenset({b"XREAD", b"XREADGROUP"})

# Flags that only commands have which take the connection over or end it: QUIT, RESET, SYNC, RESTORE-ASKING...
_STATE_FLAGS = frozenset({"no_auth", "no_multi", "asking"})

# Settings that applications ask for and that tell nothing of passwords, paths, addresses or replication.
_READABLE_SETTINGS = frozenset(
    b"activedefrag active-expire-effort appendfsync appendonly busy-reply-threshold databases hash-max-listpack-entries"
    b" hash-max-listpack-value hash-max-ziplist-entries hash-max-ziplist-value hll-sparse-max-bytes hz io-threads"
    b" lazyfree-lazy-eviction lazyfree-lazy-expire lazyfree-lazy-server-del lazyfree-lazy-user-del"
    b" lazyfree-lazy-user-flush lfu-decay-time lfu-log-factor list-compress-depth list-max-listpack-size"
    b" list-max-ziplist-size lua-time-limit maxclients maxmemory maxmemory-clients maxmemory-eviction-tenacity"
    b" maxmemory-policy maxmemory-samples notify-keyspace-events proto-max-bulk-len save set-max-intset-entries"
    b" set-max-listpack-entries stream-node-max-bytes stream-node-max-entries tcp-keepalive timeout"
    b" tracking-table-max-keys zset-max-listpack-entries zset-max-listpack-value zset-max-ziplist-entries"
    b" zset-max-ziplist-value".split()
)

_UNKNOWN = b"ERR unknown command"


def _refused(name: bytes, reason: str) -> bytes:
    return f"ERR {name.decode('latin-1').replace('|', ' ')} is not available over REST: {reason}".encode("latin-1")


def _shared_refusal(command: Command) -> bytes | None:
    """Why nobody may run this command, whatever its arguments and the token; None where one may."""
    name, flags, categories = command.name, command.flags, command.categories
    reason = _REASONS.get(name)
    if reason is None:
        if "admin" in flags and name not in _CHECKED_ADMIN:
            reason = _ADMIN
        elif ("blocking" in flags or "blocking" in categories) and name not in _BLOCKS_BY_OPTION:
            reason = _BLOCKING
        elif "pubsub" in flags and "noscript" in flags:  # PUBLISH and PUBSUB may run in scripts
            reason = _SUBSCRIBE
        elif "transaction" in categories:
            reason = _TRANSACTION
        elif flags & _STATE_FLAGS or ("connection" in categories and name not in _HARMLESS_CONNECTION):
            reason = _STATE
    return None if reason is None else _refused(name, reason)


# --- Checks of arguments, for every token -----------------------------------------------------------------------------


def _wrong_arity(name: bytes) -> Verdict:
    return Verdict(refusal=b"ERR wrong number of arguments for '%s' command" % name.lower())


def _check_select(argv: Sequence[bytes]) -> Verdict:
    if len(argv) != 2:
        return _wrong_arity(b"SELECT")
    # Every instance is one database, which its clients may call 0.
    return LOCAL_OK if argv[1] == b"0" else Verdict(refusal=_refused(b"SELECT", "an instance has one database, 0"))


def _check_copy(argv: Sequence[bytes]) -> Verdict:
    # COPY source destination [DB n] [REPLACE]
    if any(word(option) == b"DB" for option in argv[3:]):
        return Verdict(refusal=_refused(b"COPY", f"with DB {_DATABASE}"))
    return FAST


def _check_xread(argv: Sequence[bytes]) -> Verdict:
    """Refuses the BLOCK option, reading the options as Redis does: what follows STREAMS are keys and ids."""
    name = argv[0].upper()
    values = {b"COUNT": 1, b"CLAIM": 1, b"NOACK": 0}
    if name == b"XREADGROUP":
        values[b"GROUP"] = 2
    at = 1
    while at < len(argv):
        option = word(argv[at])
        if option == b"STREAMS":
            break
        if option not in values:
            # BLOCK, or an option of a newer server with who knows how many values.
            if any(word(argument) == b"BLOCK" for argument in argv[at:]):
                return Verdict(refusal=_refused(name, f"with BLOCK {_BLOCKING}"))
            break
        at += 1 + values[option]
    return FAST


def _check_config_get(argv: Sequence[bytes]) -> Verdict:
    if len(argv) < 3:
        return _wrong_arity(b"CONFIG|GET")
    if all(setting.lower() in _READABLE_SETTINGS for setting in argv[2:]):
        return FAST
    return Verdict(refusal=_refused(b"CONFIG|GET", "only settings that tell nothing of the server are, by exact name"))


def _check_setname(argv: Sequence[bytes]) -> Verdict:
    return LOCAL_OK if len(argv) == 3 else _wrong_arity(b"CLIENT|SETNAME")


def _check_setinfo(argv: Sequence[bytes]) -> Verdict:
    return LOCAL_OK if len(argv) == 4 else _wrong_arity(b"CLIENT|SETINFO")


def _check_resttoken(argv: Sequence[bytes]) -> Verdict:
    return FAST if len(argv) == 4 else _wrong_arity(b"ACL|RESTTOKEN")


_CHECKS: dict[bytes, Check] = {
    b"ACL|RESTTOKEN": _check_resttoken,
    b"CLIENT|SETINFO": _check_setinfo,
    b"CLIENT|SETNAME": _check_setname,
    b"CONFIG|GET": _check_config_get,
    b"COPY": _check_copy,
    b"SELECT": _check_select,
    b"XREAD": _check_xread,
    b"XREADGROUP": _check_xread,
}

# Subcommands that the gateway answers itself, on servers that do not know them too. Their flags would refuse them.
_OFFERED: dict[bytes, tuple[Command, ...]] = {
    b"ACL": (Command(b"ACL|RESTTOKEN", 4, categories=frozenset({"slow"})),),
    b"CLIENT": (
        Command(b"CLIENT|SETINFO", 4, categories=frozenset({"connection", "slow"})),
        Command(b"CLIENT|SETNAME", 3, categories=frozenset({"connection", "slow"})),
    ),
}
_OFFERED_NAMES = frozenset(command.name for commands in _OFFERED.values() for command in commands)


# --- The slow lane ----------------------------------------------------------------------------------------------------
# Commands whose time or reply grows with the data set, not with their arguments, would keep small commands waiting.
# HGETALL, SMEMBERS and their like stay in the fast lane: they are what small objects are read with.

_SLOW = frozenset(
    b"COMMAND BITOP FLUSHALL FLUSHDB KEYS LCS SORT SORT_RO"
    b" SDIFF SDIFFSTORE SINTER SINTERCARD SINTERSTORE SUNION SUNIONSTORE"
    b" ZDIFF ZDIFFSTORE ZINTER ZINTERCARD ZINTERSTORE ZRANGESTORE ZUNION ZUNIONSTORE"
    b" MEMORY|DOCTOR MEMORY|MALLOC-STATS MEMORY|PURGE MEMORY|STATS".split()
)


def _few(argument: bytes) -> bool:
    """Whether a count is a number between 0 and the bound."""
    count = integer(argument)
    return count is not None and 0 <= count <= MAX_FAST_ELEMENTS


def _few_after(option: bytes, options: Sequence[bytes], skip: int = 1) -> bool:
    """Whether the last value of an option (COUNT n; with skip=2 LIMIT offset n) is a small number."""
    few = False
    for at, argument in enumerate(options):
        if word(argument) == option:
            few = at + skip < len(options) and _few(options[at + skip])
    return few


def _big_index_range(argv: Sequence[bytes]) -> bool:
    # LRANGE key start stop; indexes from the end are negative
    if len(argv) < 4:
        return False
    start, stop = integer(argv[2]), integer(argv[3])
    if start is None or stop is None:
        return True
    return (start < 0) != (stop < 0) or stop - start >= MAX_FAST_ELEMENTS


def _big_zrange(argv: Sequence[bytes]) -> bool:
    options = argv[4:]
    if any(word(option) in (b"BYSCORE", b"BYLEX") for option in options):
        return not _few_after(b"LIMIT", options, 2)
    return _big_index_range(argv)


def _big_limited_range(argv: Sequence[bytes]) -> bool:
    return not _few_after(b"LIMIT", argv[4:], 2)


def _big_stream_range(argv: Sequence[bytes]) -> bool:
    return not _few_after(b"COUNT", argv[4:])


def _big_scan(argv: Sequence[bytes]) -> bool:
    return any(word(option) == b"COUNT" for option in argv) and not _few_after(b"COUNT", argv)


_SLOW_IF: dict[bytes, Callable[[Sequence[bytes]], bool]] = {
    b"HSCAN": _big_scan,
    b"LRANGE": _big_index_range,
    b"SCAN": _big_scan,
    b"SSCAN": _big_scan,
    b"XRANGE": _big_stream_range,
    b"XREVRANGE": _big_stream_range,
    b"ZRANGE": _big_zrange,
    b"ZRANGEBYLEX": _big_limited_range,
    b"ZRANGEBYSCORE": _big_limited_range,
    b"ZREVRANGE": _big_index_range,
    b"ZREVRANGEBYLEX": _big_limited_range,
    b"ZREVRANGEBYSCORE": _big_limited_range,
    b"ZSCAN": _big_scan,
}


# --- What a scope allows ----------------------------------------------------------------------------------------------

_SCRIPTS = frozenset({b"EVAL", b"EVALSHA", b"EVAL_RO", b"EVALSHA_RO", b"FCALL", b"FCALL_RO"})
_REWRITTEN = frozenset({b"EVAL", b"EVALSHA", b"EVAL_RO", b"EVALSHA_RO", b"SCRIPT"})

# RedisGears runs JavaScript or Python that calls any command; Redis does not file these under @scripting.
_GEARS = (b"TFCALL", b"TFUNCTION", b"RG.")

# Flagged readonly, but they walk or reveal the whole database.
_NOT_FOR_READERS = frozenset({b"KEYS", b"SCAN", b"RANDOMKEY"})

# Not flagged readonly, because they read no keys, and harmless.
_FOR_READERS = frozenset(
    b"PING ECHO TIME INFO COMMAND SELECT ACL|WHOAMI"
    b" CLIENT|ID CLIENT|INFO CLIENT|GETNAME CLIENT|SETNAME CLIENT|SETINFO"
    b" PUBSUB|CHANNELS PUBSUB|NUMPAT PUBSUB|NUMSUB PUBSUB|SHARDCHANNELS PUBSUB|SHARDNUMSUB".split()
)

# Without keys, and telling nothing of the data.
_WITHOUT_KEYS = frozenset({b"PING", b"ECHO", b"TIME"})

# The streams run SUBSCRIBE, PSUBSCRIBE and MONITOR on connections of their own.
_STREAMS = frozenset({b"SUBSCRIBE", b"PSUBSCRIBE", b"MONITOR"})

_NO_KEY = b"NOPERM this user has no permissions to access one of the keys used as arguments"


def _no_command(command: Command) -> bytes:
    return b"NOPERM this user has no permissions to run the '%s' command" % command.name.lower()


def _runs_scripts(command: Command) -> bool:
    name = command.name
    return name in _SCRIPTS or "scripting" in command.categories or name.startswith(_GEARS)


def _from_module(command: Command) -> bool:
    # Redis 6 does not show the flag; modules name their commands with a dot.
    return "module" in command.flags or b"." in command.name


class Policy:
    """The decisions for one scope over one command table."""

    def __init__(self, table: CommandTable, scope: Scope) -> None:
        self._table = table
        self._scope = scope
        self._allow = frozenset(name.lower() for name in scope.allow)
        self._deny = frozenset(name.lower() for name in scope.deny)
        self._narrowed = bool(scope.allow or scope.deny or scope.prefixes)
        self._rules: dict[bytes, Rule] = {}  # by upper-case name; as bounded as the table
        self._spellings: dict[bytes, Rule] = {}
        self._unspeakable = Rule(refusal=_UNKNOWN)
        self._unspeakable.series = WORKER.family(None)

    def rule(self, name: bytes) -> Rule | None:
        """The rule for a command name in any case.

        None for an unknown command: ask the server for its COMMAND INFO, let the table learn it, and ask again; still
        None means that it must not be sent. Names that must not even be asked about have a refusal.
        """
        rule = self._spellings.get(name)
        return rule if rule is not None else self._look_up(name)

    def stream_refusal(self, command: bytes) -> bytes | None:
        """The error line that refuses this scope the stream subscribe, psubscribe or monitor; None: it may have it."""
        name = command.upper()
        known = self._table.find([name])
        if name not in _STREAMS or known is None:
            return _UNKNOWN
        scope = self._scope
        if not self._listed(known) or scope.prefixes or (scope.readonly and name == b"MONITOR"):
            return _no_command(known)
        return None

    def _look_up(self, name: bytes) -> Rule | None:
        upper = name.upper()
        # Redis takes a client that says POST or Host: for a browser and hangs up.
        if len(name) > MAX_NAME_BYTES or b"\0" in name or b"|" in name or upper in (b"", b"POST", b"HOST:"):
            return self._unspeakable
        rule = self._rules.get(upper)
        if rule is None:
            command = self._table.find([upper])
            if command is None:
                return None
            rule = self._rules[upper] = self._make_rule(command)
            rule.series = WORKER.family(command)
        if len(self._spellings) >= MAX_REMEMBERED_NAMES:
            self._spellings.clear()
        self._spellings[name] = rule
        return rule

    def _make_rule(self, command: Command) -> Rule:
        offered = _OFFERED.get(command.name, ())
        if command.subcommands or offered:
            return self._container_rule(command, (*command.subcommands.values(), *offered))
        return self._simple_rule(command)

    def _container_rule(self, container: Command, commands: Sequence[Command]) -> Rule:
        """One rule that picks the subcommand's.

        A subcommand that the table does not know is judged by the container's own entry; where the container has
        refused ones (CLIENT, CONFIG...) or the scope is narrowed, it is refused.
        """
        refusal = _shared_refusal(container)
        if refusal is not None:
            return Rule(refusal=refusal)
        rules = {command.name.rpartition(b"|")[2]: self._simple_rule(command) for command in commands}
        if self._narrowed:
            other = Rule(refusal=_no_command(container))
        elif any(command.name not in _OFFERED_NAMES and _shared_refusal(command) is not None for command in commands):
            other = Rule(refusal=_refused(container.name, "not with this subcommand"))
        else:
            other = self._simple_rule(container)
        script = container.name in _REWRITTEN
        every = [other, *rules.values()]
        if not script and all(rule.plain and rule.slow == other.slow for rule in every):
            return other
        without = _wrong_arity(container.name)
        unspeakable = self._unspeakable

        def check(argv: Sequence[bytes]) -> Verdict:
            if len(argv) < 2:
                return without
            if b"\0" in argv[1]:  # names a subcommand to Redis, though not to us
                return unspeakable.check(argv)
            return rules.get(argv[1].upper(), other).check(argv)

        resttoken = rules.get(b"RESTTOKEN")
        return Rule(
            slow=all(rule.slow for rule in every if rule.refusal is None),
            script=script,
            resttoken=resttoken is not None and resttoken.refusal is None,
            check=check,
        )

    def _simple_rule(self, command: Command) -> Rule:
        name = command.name
        refusal = None if name in _OFFERED_NAMES else _shared_refusal(command)
        if refusal is None:
            refusal = self._scope_refusal(command)
        if refusal is not None:
            return Rule(refusal=refusal)
        container = name.partition(b"|")[0]
        slow = name in _SLOW or container in _SLOW or _runs_scripts(command) or self._table.learned(container)
        return Rule(slow=slow, script=name in _REWRITTEN, check=self._make_check(command, slow))

    def _make_check(self, command: Command, slow: bool) -> Check | None:
        """The look at the arguments that this command needs: of the options, of the keys, of the sizes."""
        options = _CHECKS.get(command.name)
        prefixes = self._scope.prefixes if command.name not in _WITHOUT_KEYS else ()
        is_slow = _SLOW_IF.get(command.name)
        if options is None and not prefixes and is_slow is None:
            return None

        def check(argv: Sequence[bytes]) -> Verdict:
            if options is not None:
                verdict = options(argv)
                if verdict.refusal is not None or verdict.local is not None:
                    return verdict
            if prefixes:
                keys = command.keys(argv)
                if not keys or not all(key.startswith(prefixes) for key in keys):
                    return Verdict(refusal=_NO_KEY)
            return SLOW if slow or (is_slow is not None and is_slow(argv)) else FAST

        return check

    def _scope_refusal(self, command: Command) -> bytes | None:
        """Why this scope may not run the command, whatever its arguments; None where it may."""
        scope, name = self._scope, command.name
        allowed = (
            self._listed(command)
            # What a script does cannot be seen from here; only a user of its own makes Redis look.
            and not (self._narrowed and not scope.own_user and _runs_scripts(command))
            and (not scope.readonly or _only_reads(command))
            and (not scope.prefixes or name in _WITHOUT_KEYS or _keys_are_known(command))
        )
        return None if allowed else _no_command(command)

    def _listed(self, command: Command) -> bool:
        """Whether the allow and deny lists let the command through."""
        name = command.name.decode("latin-1").lower()
        names = {name, name.partition("|")[0], "@all", *(f"@{category}" for category in command.categories)}
        return names.isdisjoint(self._deny) and (not self._allow or not names.isdisjoint(self._allow))


def _only_reads(command: Command) -> bool:
    name = command.name
    if name in _FOR_READERS or name.partition(b"|")[0] == b"COMMAND":
        return True
    return "readonly" in command.flags and "write" not in command.flags and name not in _NOT_FOR_READERS


def _keys_are_known(command: Command) -> bool:
    """Whether a prefix can be asked of the command: it has keys, and they can be told.

    Not of modules' commands, which have declared fewer keys than they touch (RedisJSON's JSON.MGET: one).
    """
    specs = [spec for spec in command.specs if "not_key" not in spec.flags]
    unknown = any(spec.find[0] == "unknown" or "incomplete" in spec.flags for spec in specs)
    return bool(specs) and not unknown and not _from_module(command)


def validate_names(scope: Scope, table: CommandTable) -> list[str]:
    """What is wrong with the names in a scope's allow and deny lists, a sentence for each; empty where nothing is.

    Names with a dot belong to modules, which the table may not have learned: they are taken as they are.
    """
    if not scope.allow and not scope.deny:
        return []
    names: set[str] = set()
    categories = {"@all"}
    for top in table:
        for command in (top, *top.subcommands.values(), *_OFFERED.get(top.name, ())):
            names.add(command.name.decode("latin-1").lower())
            categories.update(f"@{category}" for category in command.categories)
    problems = []
    for title, listed in (("allow", scope.allow), ("deny", scope.deny)):
        for name in sorted(listed):
            lower = name.lower()
            if lower.startswith("@"):
                if lower not in categories:
                    problems.append(f"{title}: there is no command category {name!r}")
            elif lower not in names and "." not in lower:
                problems.append(f"{title}: there is no command {name!r}")
            elif title == "allow" and not scope.own_user and lower.upper().encode() in _SCRIPTS:
                problems.append(f"allow: {name!r} could run any command, so only a token with a Redis user may have it")
    return problems
