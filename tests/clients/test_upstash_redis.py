"""Every public method of upstash-redis (PyPI) through the gateway: alone, awaited, in a pipeline, in a transaction."""

import asyncio
import hashlib
import inspect
import time
from collections.abc import Iterator
from typing import Any

import pytest
from upstash_redis import AsyncRedis, Redis
from upstash_redis.commands import JsonCommands
from upstash_redis.errors import UpstashError

from tests.servers import Gateway, needs_redis_7

NEEDS_7_4 = "expiry of hash fields needs Redis 7.4"
NEEDS_8 = "needs Redis 8"
NEEDS_MODULE = "needs a module that plain Redis does not have"
CANNOT_WORK = {
    **dict.fromkeys(
        "hexpire hexpireat hexpiretime hpersist hpexpire hpexpireat hpexpiretime hpttl httl".split(), NEEDS_7_4
    ),
    **dict.fromkeys("hgetdel hgetex hsetex xackdel xdelex".split(), NEEDS_8),
    "json": NEEDS_MODULE,
    "search": NEEDS_MODULE,
}
NOT_COMMANDS = {"close", "execute", "from_env", "multi", "pipeline", "bitfield", "bitfield_ro"}  # tested by themselves


class Anything:
    """A result of a kind, where its value is not ours to say."""

    def __init__(self, check: Any) -> None:
        self._check = check

    def __eq__(self, other: object) -> bool:
        return bool(self._check(other))

    __hash__ = None  # type: ignore[assignment]


A_STRING = Anything(lambda value: isinstance(value, str) and value)


def unordered(*items: Any) -> Anything:
    return Anything(lambda value: isinstance(value, list) and sorted(value) == sorted(items))


def between(low: float, high: float) -> Anything:
    return Anything(lambda value: low <= value <= high)


def close_to(expected: float) -> Anything:
    return Anything(lambda value: abs(float(value) - expected) < abs(expected) * 1e-3)


Step = tuple[str, tuple[Any, ...], dict[str, Any], Any]


def step(method: str, *args: Any, gives: Any, **kwargs: Any) -> Step:
    return method, args, kwargs, gives


SCRIPT = "return {KEYS[1], ARGV[1]}"
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode()).hexdigest()
SOON = int(time.time()) + 1000

STEPS: list[Step] = [
    # Strings
    step("set", "s", "value", gives=True),
    step("set", "s", "é😀\n\"'\\", get=True, gives="value"),
    step("get", "s", gives="é😀\n\"'\\"),
    step("set", "s", "x", nx=True, gives=False),
    step("set", "s", "x", xx=True, ex=100, gives=True),
    step("ttl", "s", gives=between(99, 100)),
    step("pttl", "s", gives=between(90_000, 100_000)),
    step("set", "s", "x", keepttl=True, gives=True),
    step("persist", "s", gives=True),
    step("append", "s", "yz", gives=3),
    step("strlen", "s", gives=3),
    step("getrange", "s", 1, -1, gives="yz"),
    step("substr", "s", 0, 1, gives="xy"),
    step("setrange", "s", 1, "--", gives=3),
    step("getset", "s", "new", gives="x--"),
    step("getex", "s", ex=50, gives="new"),
    step("getdel", "s", gives="new"),
    step("get", "s", gives=None),
    step("setex", "s", 10, "x", gives=True),
    step("psetex", "s", 10_000, "x", gives=True),
    step("setnx", "s", "y", gives=False),
    step("mset", {"m1": "1", "m2": "2"}, gives=True),
    step("msetnx", {"m2": "3", "m3": "3"}, gives=False),
    step("mget", "m1", "m2", "m3", gives=["1", "2", None]),
    step("incr", "n", gives=1),
    step("incrby", "n", 9, gives=10),
    step("incrbyfloat", "n", 0.5, gives=10.5),
    step("set", "n", 10, gives=True),
    step("decr", "n", gives=9),
    step("decrby", "n", 4, gives=5),
    # Bitmaps
    step("setbit", "b", 7, 1, gives=0),
    step("getbit", "b", 7, gives=1),
    step("bitcount", "b", gives=1),
    step("bitpos", "b", 1, gives=7),
    step("bitop", "NOT", "b2", "b", gives=1),
    # Keys
    step("exists", "m1", "m2", "nope", gives=2),
    step("type", "m1", gives="string"),
    step("touch", "m1", "nope", gives=1),
    step("copy", "m1", "m1copy", gives=True),
    step("rename", "m1copy", "m1moved", gives=True),
    step("renamenx", "m1moved", "m2", gives=False),
    step("unlink", "m1moved", gives=1),
    step("expire", "m1", 100, gives=True),
    step("pexpire", "m1", 100_000, gives=True),
    step("expireat", "m1", SOON, gives=True),
    step("pexpireat", "m1", SOON * 1000, gives=True),
    step("delete", "m1", "m2", gives=2),
    step("randomkey", gives=A_STRING),
    step("keys", "b*", gives=unordered("b", "b2")),
    step("scan", 0, match="b?", count=1000, gives=Anything(lambda value: value[0] == 0 and value[1] == ["b2"])),
    step("dbsize", gives=between(1, 100)),
    # Hashes
    step("hset", "h", "f", "v", gives=1),
    step("hset", "h", values={"g": "1", "i": "x"}, gives=2),
    step("hmset", "h", {"j": "2"}, gives=True),
    step("hsetnx", "h", "f", "w", gives=False),
    step("hget", "h", "f", gives="v"),
    step("hmget", "h", "f", "nope", gives=["v", None]),
    step("hgetall", "h", gives={"f": "v", "g": "1", "i": "x", "j": "2"}),
    step("hexists", "h", "f", gives=True),
    step("hlen", "h", gives=4),
    step("hstrlen", "h", "f", gives=1),
    step("hkeys", "h", gives=unordered("f", "g", "i", "j")),
    step("hvals", "h", gives=unordered("v", "1", "x", "2")),
    step("hincrby", "h", "g", 2, gives=3),
    step("hincrbyfloat", "h", "g", 0.5, gives=3.5),
    step("hdel", "h", "i", "nope", gives=1),
    step("hrandfield", "h", 10, gives=unordered("f", "g", "j")),
    step("hscan", "h", 0, match="f", gives=(0, {"f": "v"})),
    # Lists
    step("rpush", "l", "a", "b", "c", gives=3),
    step("lpush", "l", "z", gives=4),
    step("lpushx", "nolist", "z", gives=0),
    step("rpushx", "l", "d", gives=5),
    step("lrange", "l", 0, -1, gives=["z", "a", "b", "c", "d"]),
    step("llen", "l", gives=5),
    step("lindex", "l", 1, gives="a"),
    step("linsert", "l", "BEFORE", "a", "y", gives=6),
    step("lpos", "l", "b", gives=3),
    step("lset", "l", 0, "zz", gives=True),
    step("lrem", "l", 1, "y", gives=1),
    step("lmove", "l", "l2", "LEFT", "RIGHT", gives="zz"),
    step("rpoplpush", "l", "l2", gives="d"),
    step("ltrim", "l", 0, 1, gives="OK"),
    step("lpop", "l", gives="a"),
    step("rpop", "l", gives="b"),
    # Sets
    step("sadd", "t", "a", "b", "c", gives=3),
    step("sadd", "u", "b", "x", gives=2),
    step("scard", "t", gives=3),
    step("sismember", "t", "a", gives=True),
    step("smismember", "t", "a", "q", gives=[True, False]),
    step("smembers", "t", gives=unordered("a", "b", "c")),
    step("sdiff", "t", "u", gives=unordered("a", "c")),
    step("sdiffstore", "t2", "t", "u", gives=2),
    step("sinter", "t", "u", gives=["b"]),
    step("sinterstore", "t3", "t", "u", gives=1),
    step("sunion", "t", "u", gives=unordered("a", "b", "c", "x")),
    step("sunionstore", "t4", "t", "u", gives=4),
    step("smove", "t", "u", "a", gives=True),
    step("srandmember", "t", 5, gives=unordered("b", "c")),
    step("sscan", "t", 0, match="c", gives=(0, ["c"])),
    step("srem", "t", "c", gives=1),
    step("spop", "t", gives="b"),
    # Sorted sets
    step("zadd", "z", {"a": 1, "b": 2, "c": 3}, gives=3),
    step("zadd", "y", {"b": 10, "d": 4}, gives=2),
    step("zcard", "z", gives=3),
    step("zcount", "z", 2, "+inf", gives=2),
    step("zincrby", "z", 0.5, "a", gives=1.5),
    step("zscore", "z", "a", gives=1.5),
    step("zmscore", "z", ["a", "q"], gives=[1.5, None]),
    step("zrank", "z", "b", gives=1),
    step("zrevrank", "z", "b", gives=1),
    step("zrange", "z", 0, -1, withscores=True, gives=[("a", 1.5), ("b", 2.0), ("c", 3.0)]),
    step("zrevrange", "z", 0, 0, gives=["c"]),
    step("zrangebyscore", "z", 2, 3, gives=["b", "c"]),
    step("zrevrangebyscore", "z", 3, 2, gives=["c", "b"]),
    step("zrangestore", "z2", "z", 0, 1, gives=2),
    step("zdiff", ["z", "y"], gives=["a", "c"]),
    step("zdiffstore", "z3", ["z", "y"], gives=2),
    step("zinter", ["z", "y"], gives=["b"]),
    step("zinterstore", "z4", ["z", "y"], gives=1),
    step("zunion", ["z", "y"], withscores=True, gives=[("a", 1.5), ("c", 3.0), ("d", 4.0), ("b", 12.0)]),
    step("zunionstore", "z5", ["z", "y"], gives=4),
    step("zrandmember", "z", 10, gives=unordered("a", "b", "c")),
    step("zscan", "z", 0, match="a", gives=(0, [("a", 1.5)])),
    step("zadd", "lex", {"a": 0, "b": 0, "c": 0, "d": 0}, gives=4),
    step("zlexcount", "lex", "[b", "+", gives=3),
    step("zrangebylex", "lex", "[b", "[c", gives=["b", "c"]),
    step("zrevrangebylex", "lex", "[c", "[b", gives=["c", "b"]),
    step("zremrangebylex", "lex", "[a", "[b", gives=2),
    step("zremrangebyrank", "z5", 0, 0, gives=1),
    step("zremrangebyscore", "z5", 4, 4, gives=1),
    step("zrem", "z", "c", gives=1),
    step("zpopmax", "z", gives=[("b", 2.0)]),
    step("zpopmin", "z", gives=[("a", 1.5)]),
    # Geo
    step("geoadd", "g", (13.361389, 38.115556, "Palermo"), (15.087269, 37.502669, "Catania"), gives=2),
    step("geodist", "g", "Palermo", "Catania", "KM", gives=close_to(166.2742)),
    step("geohash", "g", "Palermo", gives=["sqc8b49rny0"]),
    step("geopos", "g", "Palermo", "nope", gives=Anything(lambda value: len(value) == 2 and value[1] is None)),
    step("georadius", "g", 15, 37, 200, "KM", gives=unordered("Palermo", "Catania")),
    step("georadius_ro", "g", 15, 37, 100, "KM", gives=["Catania"]),
    step("georadiusbymember", "g", "Catania", 100, "KM", gives=["Catania"]),
    step("georadiusbymember_ro", "g", "Catania", 100, "KM", gives=["Catania"]),
    step("geosearch", "g", member="Palermo", radius=10, unit="KM", gives=["Palermo"]),
    step("geosearchstore", "g2", "g", member="Palermo", radius=10, unit="KM", gives=1),
    # HyperLogLog
    step("pfadd", "hll", "a", "b", gives=True),
    step("pfcount", "hll", gives=2),
    step("pfmerge", "hll2", "hll", gives=True),
    # Streams
    step("xadd", "x", "1-1", {"f": "v"}, gives="1-1"),
    step("xadd", "x", "1-2", {"f": "w"}, gives="1-2"),
    step("xlen", "x", gives=2),
    step("xrange", "x", gives=[["1-1", ["f", "v"]], ["1-2", ["f", "w"]]]),
    step("xrevrange", "x", count=1, gives=[["1-2", ["f", "w"]]]),
    step("xread", {"x": "1-1"}, gives=[["x", [["1-2", ["f", "w"]]]]]),
    step("xgroup_create", "x", "grp", "0", gives="OK"),
    step("xgroup_createconsumer", "x", "grp", "c1", gives=1),
    step("xreadgroup", "grp", "c1", {"x": ">"}, count=1, gives=[["x", [["1-1", ["f", "v"]]]]]),
    step("xpending", "x", "grp", gives=[1, "1-1", "1-1", [["c1", "1"]]]),
    step("xclaim", "x", "grp", "c2", 0, "1-1", gives=[["1-1", ["f", "v"]]]),
    step("xautoclaim", "x", "grp", "c1", 0, "0-0", gives=["0-0", [["1-1", ["f", "v"]]], []]),
    step("xack", "x", "grp", "1-1", gives=1),
    step("xinfo_groups", "x", gives=Anything(lambda value: len(value) == 1 and "grp" in value[0])),
    step("xinfo_consumers", "x", "grp", gives=Anything(lambda value: len(value) == 2)),
    step("xgroup_setid", "x", "grp", "0", gives="OK"),
    step("xgroup_delconsumer", "x", "grp", "c1", gives=0),
    step("xgroup_destroy", "x", "grp", gives=1),
    step("xdel", "x", "1-1", gives=1),
    step("xtrim", "x", maxlen=0, approximate=False, gives=1),
    # Scripts
    step("eval", SCRIPT, keys=["k"], args=["a"], gives=["k", "a"]),
    step("eval_ro", SCRIPT, keys=["k"], args=["a"], gives=["k", "a"]),
    step("script_load", SCRIPT, gives=SCRIPT_SHA),
    step("script_exists", SCRIPT_SHA, "f" * 40, gives=[True, False]),
    step("evalsha", SCRIPT_SHA, keys=["k"], args=["a"], gives=["k", "a"]),
    step("evalsha_ro", SCRIPT_SHA, keys=["k"], args=["a"], gives=["k", "a"]),
    step("script_flush", gives=True),
    # Server and connection
    step("ping", gives="PONG"),
    step("echo", "hi", gives="hi"),
    step("publish", "ch", "m", gives=0),
    step("time", gives=Anything(lambda value: len(value) == 2)),
    step("client_setinfo", "lib-name", "test", gives=Anything(lambda value: value in ("OK", True))),
    step("flushdb", gives=True),
    step("flushall", gives=True),
]


@pytest.fixture
def redis(gateway: Gateway) -> Iterator[Redis]:
    with Redis(url=gateway.url, token=gateway.token, allow_telemetry=True) as redis:
        redis.flushall()
        yield redis


@needs_redis_7
def test_every_method_of_the_client(redis: Redis) -> None:
    for method, args, kwargs, expected in STEPS:
        result = getattr(redis, method)(*args, **kwargs)
        assert expected == result, (method, args, kwargs, result)


@needs_redis_7
async def test_every_method_of_the_asynchronous_client(gateway: Gateway) -> None:
    async with AsyncRedis(url=gateway.url, token=gateway.token) as redis:
        await redis.flushall()
        for method, args, kwargs, expected in STEPS:
            result = await getattr(redis, method)(*args, **kwargs)
            assert expected == result, (method, args, kwargs, result)


@needs_redis_7
@pytest.mark.parametrize("encoding", ["base64", None])
@pytest.mark.parametrize("kind", ["pipeline", "multi"])
def test_every_method_in_one_request(gateway: Gateway, kind: str, encoding: Any) -> None:
    with Redis(url=gateway.url, token=gateway.token, rest_encoding=encoding) as redis:
        redis.flushall()
        batch = getattr(redis, kind)()
        for method, args, kwargs, _ in STEPS:
            getattr(batch, method)(*args, **kwargs)
        results = batch.exec()
    for (method, args, kwargs, expected), result in zip(STEPS, results, strict=True):
        assert expected == result, (method, args, kwargs, result)


@pytest.mark.parametrize("kind", ["pipeline", "multi"])
async def test_asynchronous_pipelines(gateway: Gateway, kind: str) -> None:
    async with AsyncRedis(url=gateway.url, token=gateway.token) as redis:
        batch = getattr(redis, kind)()
        batch.set("p", 1)
        batch.incr("p")
        assert await batch.exec() == [True, 2]


def test_bitfields(redis: Redis) -> None:
    assert redis.bitfield("bf").set("u8", 0, 200).incrby("u8", 0, 50).get("u8", 0).execute() == [0, 250, 250]
    assert redis.bitfield("bf").overflow("SAT").incrby("u8", 0, 50).execute() == [255]
    assert redis.bitfield_ro("bf").get("u8", 0).execute() == [255]


def test_execute_and_errors(redis: Redis) -> None:
    assert redis.execute(["SET", "raw", "x"]) in ("OK", True)
    with pytest.raises(UpstashError, match="WRONGTYPE"):
        redis.lpush("raw", "x")
    batch = redis.multi()
    batch.incr("raw")
    batch.ping()
    with pytest.raises(UpstashError, match="not an integer"):
        batch.exec()


def test_from_env_and_read_only(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTASH_REDIS_REST_URL", gateway.url)
    monkeypatch.setenv("UPSTASH_REDIS_REST_TOKEN", gateway.readonly_token)
    with Redis.from_env() as reader:
        assert reader.get("nothing") is None
        with pytest.raises(UpstashError, match="NOPERM"):
            reader.set("a", 1)


async def test_many_at_once(gateway: Gateway) -> None:
    async with AsyncRedis(url=gateway.url, token=gateway.token) as redis:
        await redis.delete("many")
        results = await asyncio.gather(*(redis.incr("many") for _ in range(100)))
        assert sorted(results) == list(range(1, 101))


@pytest.mark.parametrize("name", sorted(set(CANNOT_WORK) - {"json", "search"}))
def test_what_cannot_work_is_said_by_redis(redis: Redis, name: str) -> None:
    with pytest.raises(UpstashError, match="unknown command"):
        redis.execute([name.upper(), "key", "FIELDS", "1", "f"])


@pytest.mark.parametrize(
    "name", [name for name, _ in inspect.getmembers(JsonCommands, inspect.isfunction) if not name.startswith("_")]
)
def test_json_cannot_work_without_its_module(redis: Redis, name: str) -> None:
    with pytest.raises(UpstashError, match="unknown command"):
        redis.execute([f"JSON.{name.upper()}", "key"])


def test_no_method_is_forgotten() -> None:
    public = {name for name in dir(Redis) if not name.startswith("_")}
    tested = {method for method, _, _, _ in STEPS} | NOT_COMMANDS
    assert public - tested - set(CANNOT_WORK) == set()
    assert set(CANNOT_WORK) <= public
    assert not tested & set(CANNOT_WORK)
