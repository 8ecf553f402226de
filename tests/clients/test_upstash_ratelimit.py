"""upstash-ratelimit (PyPI) through the gateway: every algorithm and every public method."""

import pytest
from upstash_ratelimit import FixedWindow, Ratelimit, SlidingWindow, TokenBucket
from upstash_ratelimit.asyncio import Ratelimit as AsyncRatelimit
from upstash_redis import Redis
from upstash_redis.asyncio import Redis as AsyncRedis

from tests.servers import Gateway

ALGORITHMS = {
    "fixed window": lambda: FixedWindow(max_requests=3, window=30, unit="s"),
    "sliding window": lambda: SlidingWindow(max_requests=3, window=30, unit="s"),
    "token bucket": lambda: TokenBucket(max_tokens=3, refill_rate=1, interval=30, unit="s"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_fourth_request_is_refused(gateway: Gateway, name: str) -> None:
    with Redis(url=gateway.url, token=gateway.token) as redis:
        redis.flushall()
        limiter = Ratelimit(redis=redis, limiter=ALGORITHMS[name](), prefix=f"test-{name}")
        responses = [limiter.limit("user") for _ in range(4)]
        assert [response.allowed for response in responses] == [True, True, True, False]
        assert [response.remaining for response in responses[:3]] == [2, 1, 0]
        assert limiter.limit("other").allowed
        assert limiter.get_remaining("user") == 0
        assert limiter.get_reset("user") > 0
        assert not limiter.block_until_ready("user", timeout=0.05).allowed
        assert limiter.block_until_ready("third", timeout=0.05).allowed


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_asynchronously_too(gateway: Gateway, name: str) -> None:
    async with AsyncRedis(url=gateway.url, token=gateway.token) as redis:
        await redis.flushall()
        limiter = AsyncRatelimit(redis=redis, limiter=ALGORITHMS[name](), prefix=f"test-async-{name}")
        assert [(await limiter.limit("user")).allowed for _ in range(4)] == [True, True, True, False]
        assert await limiter.get_remaining("user") == 0
        assert await limiter.get_reset("user") > 0
        assert not (await limiter.block_until_ready("user", timeout=0.05)).allowed


def test_no_method_is_forgotten() -> None:
    public = {name for name in dir(Ratelimit) if not name.startswith("_")}
    assert public == {"block_until_ready", "get_remaining", "get_reset", "limit"}
