"""Which command runs for whom: the reviewed tables, the ways around them, and what each scope adds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redisgate.policy import MAX_NAME_BYTES, MAX_REMEMBERED_NAMES, Policy, Scope, Verdict, validate_names
from resp.commands import Command, CommandTable, bundled_table

ALL = [entry for top in bundled_table() for entry in (top, *top.subcommands.values())]

# The commands that pass with the arguments `app:1 2 app:2`, reviewed one by one: a change here is a change of what
# tokens may do. CONFIG GET, COPY and the like pass with other arguments and are tested below.

OPEN = """
  ACL|CAT ACL|GENPASS ACL|HELP ACL|WHOAMI APPEND BITCOUNT BITFIELD BITFIELD_RO BITOP BITPOS CLIENT|GETNAME CLIENT|HELP
  CLIENT|ID CLIENT|INFO COMMAND|COUNT COMMAND|DOCS COMMAND|GETKEYS COMMAND|GETKEYSANDFLAGS COMMAND|HELP COMMAND|INFO
  COMMAND|LIST CONFIG|HELP COPY DBSIZE DECR DECRBY DEL DUMP ECHO EVAL EVALSHA EVALSHA_RO EVAL_RO EXISTS EXPIRE
  EXPIREAT EXPIRETIME FCALL FCALL_RO FLUSHALL FLUSHDB FUNCTION|DELETE FUNCTION|DUMP FUNCTION|FLUSH FUNCTION|HELP
  FUNCTION|LIST FUNCTION|LOAD FUNCTION|RESTORE FUNCTION|STATS GEOADD GEODIST GEOHASH GEOPOS GEORADIUS
  GEORADIUSBYMEMBER GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GEOSEARCHSTORE GET GETBIT GETDEL GETEX GETRANGE GETSET
  HDEL HEXISTS HGET HGETALL HINCRBY HINCRBYFLOAT HKEYS HLEN HMGET HMSET HRANDFIELD HSCAN HSET HSETNX HSTRLEN HVALS
  INCR INCRBY INCRBYFLOAT INFO KEYS LASTSAVE LATENCY|HELP LCS LINDEX LINSERT LLEN LMOVE LMPOP LOLWUT LPOP LPOS LPUSH
  LPUSHX LRANGE LREM LSET LTRIM MEMORY|DOCTOR MEMORY|HELP MEMORY|MALLOC-STATS MEMORY|PURGE MEMORY|STATS MEMORY|USAGE
  MGET MODULE|HELP MSET MSETNX OBJECT|ENCODING OBJECT|FREQ OBJECT|HELP OBJECT|IDLETIME OBJECT|REFCOUNT PERSIST PEXPIRE
  PEXPIREAT PEXPIRETIME PFADD PFCOUNT PFMERGE PING PSETEX PTTL PUBLISH PUBSUB|CHANNELS PUBSUB|HELP PUBSUB|NUMPAT
  PUBSUB|NUMSUB PUBSUB|SHARDCHANNELS PUBSUB|SHARDNUMSUB RANDOMKEY RENAME RENAMENX RESTORE ROLE RPOP RPOPLPUSH RPUSH
  RPUSHX SADD SCAN SCARD SCRIPT|EXISTS SCRIPT|FLUSH SCRIPT|HELP SCRIPT|LOAD SDIFF SDIFFSTORE SET SETBIT SETEX SETNX
  SETRANGE SINTER SINTERCARD SINTERSTORE SISMEMBER SLOWLOG|HELP SMEMBERS SMISMEMBER SMOVE SORT SORT_RO SPOP SPUBLISH
  SRANDMEMBER SREM SSCAN STRLEN SUBSTR SUNION SUNIONSTORE TIME TOUCH TTL TYPE UNLINK XACK XADD XAUTOCLAIM XCLAIM XDEL
  XGROUP|CREATE XGROUP|CREATECONSUMER XGROUP|DELCONSUMER XGROUP|DESTROY XGROUP|HELP XGROUP|SETID XINFO|CONSUMERS
  XINFO|GROUPS XINFO|HELP XINFO|STREAM XLEN XPENDING XRANGE XREAD XREADGROUP XREVRANGE XSETID XTRIM ZADD ZCARD ZCOUNT
  ZDIFF ZDIFFSTORE ZINCRBY ZINTER ZINTERCARD ZINTERSTORE ZLEXCOUNT ZMPOP ZMSCORE ZPOPMAX ZPOPMIN ZRANDMEMBER ZRANGE
  ZRANGEBYLEX ZRANGEBYSCORE ZRANGESTORE ZRANK ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK ZREMRANGEBYSCORE ZREVRANGE
  ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE ZUNION ZUNIONSTORE
"""
READERS = """
  ACL|WHOAMI BITCOUNT BITFIELD_RO BITPOS CLIENT|GETNAME CLIENT|ID CLIENT|INFO COMMAND|COUNT COMMAND|DOCS
  COMMAND|GETKEYS COMMAND|GETKEYSANDFLAGS COMMAND|HELP COMMAND|INFO COMMAND|LIST DBSIZE DUMP ECHO EVALSHA_RO EVAL_RO
  EXISTS EXPIRETIME FCALL_RO GEODIST GEOHASH GEOPOS GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GET GETBIT GETRANGE
  HEXISTS HGET HGETALL HKEYS HLEN HMGET HRANDFIELD HSCAN HSTRLEN HVALS INFO LCS LINDEX LLEN LOLWUT LPOS LRANGE
  MEMORY|USAGE MGET OBJECT|ENCODING OBJECT|FREQ OBJECT|IDLETIME OBJECT|REFCOUNT PEXPIRETIME PFCOUNT PING PTTL
  PUBSUB|CHANNELS PUBSUB|NUMPAT PUBSUB|NUMSUB PUBSUB|SHARDCHANNELS PUBSUB|SHARDNUMSUB SCARD SDIFF SINTER SINTERCARD
  SISMEMBER SMEMBERS SMISMEMBER SORT_RO SRANDMEMBER SSCAN STRLEN SUBSTR SUNION TIME TOUCH TTL TYPE XINFO|CONSUMERS
  XINFO|GROUPS XINFO|STREAM XLEN XPENDING XRANGE XREAD XREVRANGE ZCARD ZCOUNT ZDIFF ZINTER ZINTERCARD ZLEXCOUNT
  ZMSCORE ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK ZREVRANGE ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN
  ZSCORE ZUNION
"""
WITH_PREFIX = """
  APPEND BITCOUNT BITFIELD BITFIELD_RO BITPOS DECR DECRBY DUMP ECHO EXPIRE EXPIREAT EXPIRETIME GEOADD GEODIST GEOHASH
  GEOPOS GEORADIUS GEORADIUSBYMEMBER GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GET GETBIT GETDEL GETEX GETRANGE
  GETSET HDEL HEXISTS HGET HGETALL HINCRBY HINCRBYFLOAT HKEYS HLEN HMGET HMSET HRANDFIELD HSCAN HSET HSETNX HSTRLEN
  HVALS INCR INCRBY INCRBYFLOAT LINDEX LINSERT LLEN LPOP LPOS LPUSH LPUSHX LRANGE LREM LSET LTRIM MEMORY|USAGE MSET
  MSETNX OBJECT|ENCODING OBJECT|FREQ OBJECT|IDLETIME OBJECT|REFCOUNT PERSIST PEXPIRE PEXPIREAT PEXPIRETIME PFADD PING
  PSETEX PTTL RESTORE RPOP RPUSH RPUSHX SADD SCARD SET SETBIT SETEX SETNX SETRANGE SISMEMBER SMEMBERS SMISMEMBER SPOP
  SRANDMEMBER SREM SSCAN STRLEN SUBSTR TIME TTL TYPE XACK XADD XAUTOCLAIM XCLAIM XDEL XGROUP|CREATE
  XGROUP|CREATECONSUMER XGROUP|DELCONSUMER XGROUP|DESTROY XGROUP|SETID XINFO|CONSUMERS XINFO|GROUPS XINFO|STREAM XLEN
  XPENDING XRANGE XREVRANGE XSETID XTRIM ZADD ZCARD ZCOUNT ZINCRBY ZLEXCOUNT ZMSCORE ZPOPMAX ZPOPMIN ZRANDMEMBER
  ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK ZREMRANGEBYSCORE ZREVRANGE ZREVRANGEBYLEX
  ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE
"""

SCOPES = {
    "open": Scope(),
    "readonly": Scope(readonly=True),
    "allow": Scope(allow=frozenset({"@string", "config|get", "del"})),
    "deny": Scope(deny=frozenset({"@dangerous", "get", "xgroup|destroy"})),
    "prefixes": Scope(prefixes=(b"app:", b"shared:")),
    "own user": Scope(own_user=True, deny=frozenset({"flushall"})),
}


def argv_of(line: str) -> list[bytes]:
    return [word.encode("latin-1") for word in line.split(" ")]


def decide(policy: Policy, argv: Sequence[bytes]) -> Verdict | None:
    rule = policy.rule(argv[0])
    return None if rule is None else rule.check(argv)


def verdict(line: str, scope: Scope | None = None) -> Verdict:
    found = decide(Policy(bundled_table(), scope or Scope()), argv_of(line))
    assert found is not None
    return found


def refusal(line: str, scope: Scope | None = None) -> str:
    """The error line, "" where the command may run."""
    return (verdict(line, scope).refusal or b"").decode()


def noperm(command: str) -> str:
    return f"NOPERM this user has no permissions to run the '{command}' command"


NO_KEY = "NOPERM this user has no permissions to access one of the keys used as arguments"


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        pytest.param(Scope(), OPEN, id="unrestricted"),
        pytest.param(Scope(readonly=True), READERS, id="readonly"),
        pytest.param(Scope(prefixes=(b"app:",)), WITH_PREFIX, id="prefixes"),
    ],
)
def test_what_runs_is_what_was_reviewed(scope: Scope, allowed: str) -> None:
    policy = Policy(bundled_table(), scope)
    passing = []
    for entry in ALL:
        if not entry.subcommands:
            found = decide(policy, [*entry.name.split(b"|"), b"app:1", b"2", b"app:2"])
            assert found is not None
            if found.refusal is None:
                passing.append(entry.name.decode())
    assert passing == allowed.split()


COMMON = (
    "GET SET SETEX MGET MSET DEL EXISTS EXPIRE TTL INCR INCRBY DECR APPEND HGET HSET HMGET HGETALL HINCRBY HDEL LPUSH"
    " RPUSH LPOP RPOP LLEN SADD SREM SMEMBERS SISMEMBER ZADD ZREM ZSCORE ZINCRBY ZRANK XADD PFADD PUBLISH PING"
)


@pytest.mark.parametrize("name", COMMON.split())
def test_common_commands_are_plain_without_restrictions(name: str) -> None:
    rule = Policy(bundled_table(), Scope()).rule(name.encode())
    assert rule is not None
    assert rule.plain
    assert not rule.slow
    assert not rule.script


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name.decode())
def test_every_command_has_a_decision_of_one_piece(entry: Command, scope: Scope) -> None:
    policy = Policy(bundled_table(), scope)
    argv = entry.name.split(b"|")
    rule = policy.rule(argv[0])
    assert rule is not None
    for arguments in ([], [b"app:1"], [b"k", b"1", b"2"], [b""] * 9):
        found = rule.check(argv + arguments)
        if rule.plain:
            assert found == Verdict(slow=rule.slow)
        if rule.refusal is not None:
            assert found == Verdict(refusal=rule.refusal)
        for line in (found.refusal, rule.refusal):
            assert line is None or (line.startswith((b"ERR ", b"NOPERM ")) and line.isascii() and b"\n" not in line)


# --- Ways to disturb the others on the connection ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("AUTH default secret", "token of the request"),
        ("HELLO 3", "RESP2"),
        ("hello", "RESP2"),
        ("SELECT 1", "one database"),
        ("sElEcT 00", "one database"),
        ("SELECT 0\0", "one database"),
        ("QUIT", "connection"),
        ("RESET", "connection"),
        ("MULTI", "/multi-exec"),
        ("EXEC", "/multi-exec"),
        ("DISCARD", "/multi-exec"),
        ("WATCH k", "in a script"),
        ("UNWATCH", "in a script"),
        ("MOVE k 1", "another database"),
        ("SWAPDB 0 1", "another database"),
        ("COPY a b DB 1", "another database"),
        ("cOpY a b dB 1", "another database"),
        ("COPY a b REPLACE DB 0", "another database"),
        ("COPY a b DB\0x 1", "another database"),
        ("SUBSCRIBE c", "/subscribe"),
        ("ssubscribe c", "/subscribe"),
        ("UNSUBSCRIBE", "/subscribe"),
        ("SUNSUBSCRIBE", "/subscribe"),
        ("PSUBSCRIBE c*", "/psubscribe"),
        ("PUNSUBSCRIBE", "/psubscribe"),
        ("MONITOR", "/monitor"),
        ("READONLY", "nodes"),
        ("READWRITE", "nodes"),
        ("ASKING", "nodes"),
        ("CLUSTER SLOTS", "nodes"),
        ("CLUSTER", "nodes"),
        ("BLPOP k 0", "block"),
        ("BRPOPLPUSH a b 0", "block"),
        ("BLMOVE a b LEFT LEFT 0", "block"),
        ("BZMPOP 0 1 k MIN", "block"),
        ("WAIT 1 0", "hold up"),
        ("XREAD BLOCK 0 STREAMS s $", "block"),
        ("xread block 0 streams s $", "block"),
        ("XREAD COUNT 1 BLOCK 0 STREAMS s $", "block"),
        ("XREAD BLOCK\0x 0 STREAMS s $", "block"),
        ("XREAD NEWOPTION 1 BLOCK 0 STREAMS s $", "block"),
        ("XREAD GROUP BLOCK 0 STREAMS s $", "block"),
        ("XREADGROUP GROUP g c BLOCK 0 STREAMS s >", "block"),
        ("XREADGROUP GROUP STREAMS c BLOCK 0 STREAMS s >", "block"),
        ("XREADGROUP BLOCK 0 GROUP g c STREAMS s >", "block"),
        ("CLIENT REPLY OFF", "connection"),
        ("cLiEnT rEpLy SKIP", "connection"),
        ("CLIENT REPLY\0 OFF", "unknown command"),
        ("CLIENT TRACKING ON", "connection"),
        ("CLIENT CACHING YES", "connection"),
        ("CLIENT NO-EVICT ON", "administers"),
        ("CLIENT NO-TOUCH ON", "with this subcommand"),
        ("CLIENT CAPA redirect", "with this subcommand"),
        ("CLIENT KILL ID 1", "administers"),
        ("CLIENT PAUSE 1000", "administers"),
        ("CLIENT LIST", "administers"),
        ("CLIENT", "wrong number of arguments for 'client' command"),
        ("SHUTDOWN NOSAVE", "administers"),
        ("DEBUG SLEEP 9", "administers"),
        ("MODULE LOAD /x.so", "administers"),
        ("MODULE LIST", "administers"),
        ("REPLICAOF no one", "administers"),
        ("SLAVEOF no one", "administers"),
        ("SAVE", "administers"),
        ("BGSAVE", "administers"),
        ("BGREWRITEAOF", "administers"),
        ("FAILOVER", "administers"),
        ("SYNC", "administers"),
        ("PSYNC ? -1", "administers"),
        ("REPLCONF ACK 1", "administers"),
        ("RESTORE-ASKING k 0 v", "connection"),
        ("PFDEBUG GETREG k", "administers"),
        ("PFSELFTEST", "administers"),
        ("MIGRATE h 1 k 0 1", "administers"),
        ("LATENCY RESET", "administers"),
        ("LATENCY NEW", "with this subcommand"),
        ("SLOWLOG GET", "administers"),
        ("CONFIG SET maxmemory 1", "administers"),
        ("CONFIG REWRITE", "administers"),
        ("CONFIG NEW", "with this subcommand"),
        ("CONFIG GET *", "by exact name"),
        ("CONFIG GET requirepass", "by exact name"),
        ("CONFIG GET maxmemory requirepass", "by exact name"),
        ("CONFIG GET maxmemory* ", "by exact name"),
        ("CONFIG GET maxmemory\0", "by exact name"),
        ("CONFIG GET", "wrong number of arguments for 'config|get' command"),
        ("CONFIG GET\0x maxmemory", "unknown command"),
        ("ACL SETUSER x", "administers"),
        ("ACL LIST", "administers"),
        ("ACL LOG", "administers"),
        ("ACL DRYRUN u get k", "administers"),
        ("ACL NEW", "with this subcommand"),
        ("ACL RESTTOKEN u", "wrong number of arguments for 'acl|resttoken' command"),
        ("SCRIPT KILL", "administers"),
        ("SCRIPT DEBUG YES", "connection"),
        ("SCRIPT NEW", "with this subcommand"),
        ("FUNCTION KILL", "administers"),
        ("FUNCTION NEW", "with this subcommand"),
        # Redis closes the connection on which it reads these.
        ("POST /x", "unknown command"),
        ("host: x", "unknown command"),
        # Redis may find GET under this name.
        ("GET\0 k", "unknown command"),
        ("FLUSHALL\0x", "unknown command"),
        ("config|get maxmemory", "unknown command"),
        (" ", "unknown command"),
    ],
    ids=lambda value: repr(value),
)
def test_nobody_disturbs_the_others_on_the_connection(line: str, says: str) -> None:
    for scope in (Scope(), Scope(own_user=True)):
        assert says in refusal(line, scope)


@pytest.mark.parametrize(
    "line",
    [
        "COPY a b",
        "COPY DB db REPLACE",
        "XREAD STREAMS BLOCK 0",
        "XREAD COUNT 5 STREAMS s BLOCK 0 0",
        "XREADGROUP GROUP BLOCK BLOCK COUNT 1 NOACK STREAMS s >",
        "XREADGROUP GROUP g c CLAIM 5 STREAMS BLOCK >",
        "CONFIG GET maxmemory",
        "config get MAXMEMORY-policy maxmemory",
        "CLIENT ID",
        "CLIENT INFO",
        "client getname",
        "ACL WHOAMI",
        "ACL CAT",
        "ACL GENPASS",
        "ACL RESTTOKEN user password",
        "SCRIPT LOAD x",
        "SCRIPT EXISTS x",
        "FUNCTION LIST",
        "XGROUP NEWSUBCOMMAND k",
        "PUBSUB NUMSUB c",
        "FLUSHALL",
        "COMMAND",
        "INFO",
    ],
)
def test_harmless_forms_run(line: str) -> None:
    found = verdict(line)
    assert found.refusal is None
    assert found.local is None


@pytest.mark.parametrize(
    "line", ["SELECT 0", "select 0", "CLIENT SETNAME me", "client setname me", "CLIENT SETINFO LIB-NAME upstash"]
)
def test_what_would_name_the_connection_is_answered_here(line: str) -> None:
    assert verdict(line) == Verdict(local=b"+OK\r\n")
    assert verdict(line, Scope(readonly=True)) == Verdict(local=b"+OK\r\n")


@pytest.mark.parametrize("line", ["SELECT", "SELECT 0 0", "CLIENT SETNAME", "CLIENT SETINFO a", "CLIENT SETNAME a b"])
def test_what_is_answered_here_counts_its_arguments(line: str) -> None:
    assert "wrong number of arguments" in refusal(line)


def test_rules_tell_the_gateway_what_it_does_itself() -> None:
    policy = Policy(bundled_table(), Scope())
    marked = {name: policy.rule(name) for name in (b"EVAL", b"evalsha", b"EVAL_RO", b"EVALSHA_RO", b"SCRIPT")}
    assert all(rule and rule.script and not rule.plain for rule in marked.values())
    for name in (b"FCALL", b"FUNCTION", b"GET"):
        rule = policy.rule(name)
        assert rule is not None
        assert not rule.script
    acl, get = policy.rule(b"acl"), policy.rule(b"get")
    assert acl is not None
    assert acl.resttoken
    assert get is not None
    assert not get.resttoken


# --- Names ------------------------------------------------------------------------------------------------------------


def odd(argument: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    return bytes(c ^ 0x20 if chr(c).isalpha() and chance.random() < 0.5 else c for c in argument)


WORDS = st.sampled_from(b"BLOCK STREAMS DB STORE GET 0 1 2 app:k k maxmemory GROUP COUNT BYSCORE LIMIT -1".split())


@given(
    st.sampled_from(ALL),
    st.lists(WORDS | st.binary(max_size=4), max_size=8),
    st.sampled_from(list(SCOPES.values())),
    st.integers(0, 1000),
)
def test_no_spelling_changes_a_verdict(entry: Command, arguments: list[bytes], scope: Scope, seed: int) -> None:
    policy = Policy(bundled_table(), scope)
    names = entry.name.split(b"|")
    spelled = [odd(name, seed) for name in names]
    assert policy.rule(names[0]) is policy.rule(spelled[0])
    assert decide(policy, [*names, *arguments]) == decide(policy, [*spelled, *arguments])
    if b"app:k" not in arguments:  # options, but not keys, may be in any case
        shouted = [argument.upper() for argument in arguments]
        assert decide(policy, [*names, *shouted]) == decide(policy, [*names, *(odd(a, seed) for a in shouted)])


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=6), st.sampled_from(list(SCOPES.values())))
@example([b"GET" * 100], Scope())
@example([b"\xff"], Scope())
def test_nothing_makes_it_raise(argv: list[bytes], scope: Scope) -> None:
    decide(Policy(bundled_table(), scope), argv)
    Policy(bundled_table(), scope).stream_refusal(argv[0])


@pytest.mark.parametrize("name", [b" GET", b"GET ", b"GET\r\n", b"G E T", b"\xc7ET", b"NOSUCH", b"JSON.GET"])
def test_an_unknown_name_is_for_the_server_to_explain(name: bytes) -> None:
    assert Policy(bundled_table(), Scope()).rule(name) is None


def test_a_name_too_long_is_not_asked_about() -> None:
    rule = Policy(bundled_table(), Scope()).rule(b"x" * (MAX_NAME_BYTES + 1))
    assert rule is not None
    assert rule.refusal == b"ERR unknown command"


def test_spellings_are_remembered_within_bounds() -> None:
    policy = Policy(bundled_table(), Scope())
    name = b"georadiusbymember_ro"
    rule = policy.rule(name)
    for seed in range(2 * MAX_REMEMBERED_NAMES):
        assert policy.rule(odd(name, seed)) is rule
        assert policy.rule(b"unknown-%d" % seed) is None
    assert len(policy._spellings) <= MAX_REMEMBERED_NAMES


# --- Commands learned from the server ---------------------------------------------------------------------------------


def learned(entry: list[Any], line: str, scope: Scope | None = None) -> Verdict:
    table = bundled_table()
    policy = Policy(table, scope or Scope())
    argv = argv_of(line)
    assert policy.rule(argv[0]) is None
    assert table.learn(entry) is not None
    found = decide(policy, argv)
    assert found is not None
    return found


JSON_SET = [b"json.set", -4, [b"write", b"denyoom", b"module"], 1, 1, 1, []]
JSON_GET = [b"json.get", -2, [b"readonly", b"module"], 1, 1, 1, []]
SEARCH_6 = [b"ft.search", -1, [b"readonly"], 1, 1, 1, []]
HGETDEL = [b"hgetdel", -5, [b"write", b"fast"], 1, 1, 1, [b"@write", b"@hash", b"@fast"]]


def test_learned_commands_run_in_the_slow_lane() -> None:
    assert learned(JSON_SET, "JSON.SET k $ 1") == Verdict(slow=True)


def test_learned_writes_are_writes() -> None:
    reader = Scope(readonly=True)
    assert learned(JSON_SET, "JSON.SET k $ 1", reader).refusal == noperm("json.set").encode()
    assert learned(JSON_GET, "json.get k", reader).refusal is None
    assert learned(HGETDEL, "HGETDEL k FIELDS 1 f", reader).refusal == noperm("hgetdel").encode()


def test_prefixes_are_not_asked_of_modules_which_declare_too_few_keys() -> None:
    scope = Scope(prefixes=(b"app:",))
    assert learned(JSON_GET, "JSON.GET app:k", scope).refusal == noperm("json.get").encode()
    assert learned(SEARCH_6, "FT.SEARCH app:k", scope).refusal == noperm("ft.search").encode()
    assert learned(HGETDEL, "HGETDEL app:k FIELDS 1 f", scope).refusal is None
    assert learned(HGETDEL, "HGETDEL k FIELDS 1 f", scope).refusal == NO_KEY.encode()


@pytest.mark.parametrize(
    ("flags", "categories"),
    [
        ([b"admin"], []),
        ([b"blocking"], []),
        ([], [b"@blocking"]),
        ([], [b"@connection"]),
        ([], [b"@transaction"]),
        ([b"pubsub", b"noscript"], []),
        ([b"no_auth"], []),
        ([b"no_multi"], []),
        ([b"asking"], []),
    ],
    ids=repr,
)
def test_flags_alone_refuse_what_newer_servers_bring(flags: list[bytes], categories: list[bytes]) -> None:
    found = learned([b"newcmd", -1, [b"readonly", *flags], 0, 0, 0, categories], "NEWCMD a")
    assert found.refusal is not None
    assert found.refusal.startswith(b"ERR NEWCMD is not available over REST: ")


def test_learned_containers_are_judged_by_their_subcommands() -> None:
    get = [b"commandlog|get", -4, [b"admin"], 0, 0, 0, [b"@admin"], [], [], []]
    length = [b"commandlog|help", 2, [b"loading"], 0, 0, 0, [b"@slow"], [], [], []]
    entry = [b"commandlog", -2, [], 0, 0, 0, [b"@slow"], [], [], [get, length]]
    assert learned(entry, "COMMANDLOG get 1").refusal is not None
    assert learned(entry, "COMMANDLOG HELP").refusal is None
    assert learned(entry, "COMMANDLOG NEW").refusal is not None


def test_an_entry_under_another_name_does_not_open_the_one_asked_for() -> None:
    table = bundled_table()
    policy = Policy(table, Scope())
    table.learn([b"config", -2, [], 0, 0, 0, []])  # rename-command CONFIG renamed
    assert policy.rule(b"renamed") is None


# --- Scopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("SET k v", "set"),
        ("sEt k v", "set"),
        ("GETEX k", "getex"),
        ("GETDEL k", "getdel"),
        ("SORT k", "sort"),
        ("GEORADIUS k 1 2 3 m", "georadius"),
        ("XREADGROUP GROUP g c STREAMS s >", "xreadgroup"),
        ("BITFIELD k GET u8 0", "bitfield"),
        ("KEYS *", "keys"),
        ("SCAN 0", "scan"),
        ("RANDOMKEY", "randomkey"),
        ("EVAL s 0", "eval"),
        ("EVALSHA s 0", "evalsha"),
        ("FCALL f 0", "fcall"),
        ("SCRIPT LOAD s", "script|load"),
        ("SCRIPT FLUSH", "script|flush"),
        ("FUNCTION LOAD s", "function|load"),
        ("XGROUP CREATE k g $", "xgroup|create"),
        ("XGROUP NEWSUBCOMMAND k", "xgroup"),
        ("PUBLISH c m", "publish"),
        ("FLUSHDB", "flushdb"),
        ("CONFIG GET maxmemory", "config|get"),
        ("ACL RESTTOKEN u p", "acl|resttoken"),
        ("MEMORY PURGE", "memory|purge"),
    ],
)
def test_readers_write_nothing(line: str, command: str) -> None:
    assert refusal(line, Scope(readonly=True)) == noperm(command)


@pytest.mark.parametrize(
    "line",
    (
        "GET k|EVAL_RO s 0|EVALSHA_RO s 0|FCALL_RO f 0|XREAD STREAMS s 0|MEMORY USAGE k|ACL WHOAMI|PING|ECHO x|TIME"
        "|INFO|COMMAND COUNT|LOLWUT|CLIENT ID|PUBSUB CHANNELS|DBSIZE"
    ).split("|"),
)
def test_readers_read(line: str) -> None:
    assert refusal(line, Scope(readonly=True)) == ""


@pytest.mark.parametrize(
    ("allow", "deny", "line", "command"),
    [
        ("get", "", "GET k", ""),
        ("GET", "", "gEt k", ""),
        ("get", "", "SET k v", "set"),
        ("@read", "", "HGETALL k", ""),
        ("@read", "", "HSET k f v", "hset"),
        ("@read", "hgetall", "HGETALL k", "hgetall"),
        ("@all", "@write", "SET k v", "set"),
        ("@all", "@ALL", "GET k", "get"),
        ("", "@dangerous", "FLUSHALL", "flushall"),
        ("", "@dangerous", "GET k", ""),
        ("", "config|get", "CONFIG GET maxmemory", "config|get"),
        ("", "config", "CONFIG GET maxmemory", "config|get"),
        ("config", "", "CONFIG GET maxmemory", ""),
        ("config|get", "", "CONFIG GET maxmemory", ""),
        ("xgroup|create", "", "XGROUP CREATE k g $", ""),
        ("xgroup|create", "", "XGROUP DESTROY k g", "xgroup|destroy"),
        ("", "xgroup|destroy", "XGROUP CREATE k g $", ""),
        ("", "xgroup|destroy", "xGROUP dESTROY k g", "xgroup|destroy"),
        ("", "get", "XGROUP NEWSUBCOMMAND k", "xgroup"),
        ("ping", "", "CLIENT SETNAME x", "client|setname"),
        ("acl|resttoken", "", "ACL RESTTOKEN u p", ""),
        ("", "get", "EVAL s 0", "eval"),
        ("", "get", "EVAL_RO s 0", "eval_ro"),
        ("@all", "", "EVALSHA s 0", "evalsha"),
        ("eval", "", "EVAL s 0", "eval"),
        ("@scripting", "", "FCALL_RO f 0", "fcall_ro"),
        ("@all", "", "FUNCTION LOAD x", "function|load"),
        ("@all", "", "SCRIPT LOAD x", "script|load"),
    ],
)
def test_lists_narrow_and_deny_wins(allow: str, deny: str, line: str, command: str) -> None:
    scope = Scope(allow=frozenset(allow.split()), deny=frozenset(deny.split()))
    assert refusal(line, scope) == (noperm(command) if command else "")


def test_a_subcommand_that_ends_early_for_redis_does_not_slip_through() -> None:
    scope = Scope(deny=frozenset({"xgroup|destroy"}))
    assert refusal("XGROUP DESTROY\0 k g", scope) == "ERR unknown command"


def test_gears_are_scripts() -> None:
    entry = [b"tfcall", -3, [b"module"], 0, 0, 0, []]
    assert learned(entry, "TFCALL lib.f 0").refusal is None
    assert learned(entry, "TFCALL lib.f 0", Scope(deny=frozenset({"get"}))).refusal == noperm("tfcall").encode()


def test_redis_itself_watches_the_scripts_of_a_user_of_its_own() -> None:
    scope = Scope(own_user=True, deny=frozenset({"flushall"}))
    assert refusal("EVAL s 0", scope) == ""
    assert refusal("FCALL f 0", scope) == ""
    assert refusal("FLUSHALL", scope) == noperm("flushall")


APP = Scope(prefixes=(b"app:", b"shared:"))


@pytest.mark.parametrize(
    "line",
    [
        "GET app:1",
        "MGET app:1 shared:1",
        "MSET app:1 v app:2 v",
        "RENAME app:1 shared:2",
        "ZUNIONSTORE app:d 2 app:1 app:2",
        "BITOP AND app:d app:a app:b",
        "XREAD STREAMS app:s 0",
        "XREADGROUP GROUP g c STREAMS app:s >",
        "GEORADIUS app:k 1 2 3 m STORE app:d",
        "OBJECT ENCODING app:k",
        "MEMORY USAGE app:k",
        "LRANGE app:k 0 -1",
        "PING",
        "ECHO x",
        "TIME",
    ],
)
def test_prefix_tokens_reach_their_keys(line: str) -> None:
    assert refusal(line, APP) == ""


@pytest.mark.parametrize(
    "line",
    [
        "GET k",
        "GET APP:1",
        "GET app",
        "GET",
        "MGET app:1 k",
        "MSET app:1 v k v",
        "DEL app:1 k",
        "RENAME app:1 k",
        "COPY app:1 k",
        "ZUNIONSTORE app:d 2 app:1 k",
        "ZUNIONSTORE k 1 app:1",
        "ZUNION x app:1 k",
        "BITOP AND k app:a app:b",
        "XREAD STREAMS app:s k 0 0",
        "XREADGROUP NOACK GROUP g STREAMS STREAMS secret >",
        "GEORADIUS app:k 1 2 3 m STORE k",
        "GEORADIUS app:k 1 2 3 m STORE app:d STORE k",
        "GEORADIUS app:k 1 2 3 m STORE\0 k",
        "GEOSEARCHSTORE app:d k FROMMEMBER m BYBOX 1 1 m",
        "LMOVE app:a k LEFT LEFT",
        "SMOVE app:a k m",
        "OBJECT ENCODING k",
        "PFMERGE app:a k",
    ],
)
def test_prefix_tokens_reach_no_other_keys(line: str) -> None:
    assert refusal(line, APP) == NO_KEY


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("SORT app:k", "sort"),
        ("SORT_RO app:k BY w_* GET other_*", "sort_ro"),
        ("EVAL s 1 app:k", "eval"),
        ("EVAL_RO s 1 app:k", "eval_ro"),
        ("FCALL f 1 app:k", "fcall"),
        ("KEYS app:*", "keys"),
        ("SCAN 0", "scan"),
        ("RANDOMKEY", "randomkey"),
        ("FLUSHDB", "flushdb"),
        ("DBSIZE", "dbsize"),
        ("PUBLISH app:c m", "publish"),
        ("SPUBLISH app:c m", "spublish"),
        ("INFO", "info"),
        ("XGROUP NEWSUBCOMMAND app:k", "xgroup"),
        ("SELECT 0", "select"),
        ("FUNCTION LOAD x", "function|load"),
    ],
)
def test_prefix_tokens_run_nothing_whose_keys_are_not_known(line: str, command: str) -> None:
    assert refusal(line, APP) == noperm(command)


@given(st.sampled_from([e for e in ALL if not e.subcommands]), st.lists(WORDS | st.binary(max_size=4), max_size=8))
def test_a_prefix_token_names_a_key_of_its_own_or_none(entry: Command, arguments: list[bytes]) -> None:
    argv = [*entry.name.split(b"|"), *arguments]
    found = decide(Policy(bundled_table(), APP), argv)
    assert found is not None
    if found.refusal is None and entry.name not in (b"PING", b"ECHO", b"TIME"):
        keys = entry.keys(argv)
        assert keys
        assert all(key.startswith((b"app:", b"shared:")) for key in keys)


@pytest.mark.parametrize(
    ("scope", "subscribe", "monitor"),
    [
        (Scope(), True, True),
        (Scope(readonly=True), True, False),
        (Scope(prefixes=(b"a",)), False, False),
        (Scope(allow=frozenset({"get"})), False, False),
        (Scope(allow=frozenset({"@pubsub"})), True, False),
        (Scope(deny=frozenset({"@pubsub"})), False, True),
        (Scope(deny=frozenset({"monitor"})), True, False),
        (Scope(own_user=True), True, True),
    ],
    ids=repr,
)
def test_streams_follow_the_scope(scope: Scope, subscribe: bool, monitor: bool) -> None:
    policy = Policy(bundled_table(), scope)
    for command, allowed in (("subscribe", subscribe), ("PSUBSCRIBE", subscribe), ("Monitor", monitor)):
        expected = None if allowed else noperm(command.lower()).encode()
        assert policy.stream_refusal(command.encode()) == expected
    assert policy.stream_refusal(b"ssubscribe") is not None
    assert policy.stream_refusal(b"get") is not None


# --- Lanes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "slow"),
    [
        ("GET k", False),
        ("HGETALL k", False),
        ("SMEMBERS k", False),
        ("EVAL s 0", True),
        ("FCALL f 0", True),
        ("SCRIPT LOAD s", True),
        ("FUNCTION LIST", True),
        ("KEYS *", True),
        ("SORT k", True),
        ("SUNION a b", True),
        ("ZUNIONSTORE d 1 a", True),
        ("FLUSHALL", True),
        ("FLUSHDB", True),
        ("COMMAND", True),
        ("COMMAND DOCS", True),
        ("MEMORY STATS", True),
        ("MEMORY USAGE k", False),
        ("LRANGE k 0 9", False),
        ("LRANGE k 0 999", False),
        ("LRANGE k 0 1000", True),
        ("LRANGE k 0 -1", True),
        ("LRANGE k -10 -1", False),
        ("LRANGE k -5000 -1", True),
        ("LRANGE k 0 9223372036854775807", True),
        ("LRANGE k a b", True),
        ("LRANGE k 5 1", False),
        ("ZRANGE k 0 10 WITHSCORES", False),
        ("ZRANGE k 0 -1", True),
        ("ZRANGE k 0 10 BYSCORE", True),
        ("ZRANGE k 0 10 byscore LIMIT 0 10", False),
        ("ZRANGE k 0 10 BYLEX LIMIT 0 -1", True),
        ("ZREVRANGE k 0 10", False),
        ("ZRANGEBYSCORE k -inf +inf", True),
        ("ZRANGEBYSCORE k -inf +inf LIMIT 0 10", False),
        ("ZRANGEBYSCORE k -inf +inf limit 0 10 LIMIT 0 99999", True),
        ("ZRANGEBYLEX k - + LIMIT 0 10", False),
        ("XRANGE k - +", True),
        ("XRANGE k - + COUNT 10", False),
        ("XREVRANGE k + - COUNT 100000", True),
        ("SCAN 0", False),
        ("SCAN 0 COUNT 100", False),
        ("SCAN 0 COUNT 100000", True),
        ("HSCAN k 0 COUNT x", True),
    ],
)
def test_lanes(line: str, slow: bool) -> None:
    assert verdict(line) == Verdict(slow=slow)


# --- The check of a configuration -------------------------------------------------------------------------------------


def test_names_that_exist_are_accepted() -> None:
    names = frozenset({"get", "GET", "config|get", "client|setinfo", "acl|resttoken", "@read", "@ALL", "json.get"})
    assert validate_names(Scope(allow=names, deny=names), bundled_table()) == []


def test_names_that_do_not_exist_are_named() -> None:
    scope = Scope(allow=frozenset({"gett", "@reads"}), deny=frozenset({"config|gett", "config get", "@"}))
    assert validate_names(scope, bundled_table()) == [
        "allow: there is no command category '@reads'",
        "allow: there is no command 'gett'",
        "deny: there is no command category '@'",
        "deny: there is no command 'config get'",
        "deny: there is no command 'config|gett'",
    ]


def test_a_script_command_is_allowed_by_name_only_with_a_user_of_its_own() -> None:
    assert len(validate_names(Scope(allow=frozenset({"eval"})), bundled_table())) == 1
    assert validate_names(Scope(allow=frozenset({"eval"}), own_user=True), bundled_table()) == []
    assert validate_names(Scope(deny=frozenset({"eval"})), bundled_table()) == []


def test_learned_names_count() -> None:
    table: CommandTable = bundled_table()
    scope = Scope(allow=frozenset({"hgetdel"}))
    assert len(validate_names(scope, table)) == 1
    table.learn(HGETDEL)
    assert validate_names(scope, table) == []
