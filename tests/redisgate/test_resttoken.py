"""ACL RESTTOKEN: who may ask for a token, and for whom."""

from pathlib import Path

from tests.http import Client
from tests.servers import Gateway, RedisServer


def test_resttoken_sheds_no_limit_of_the_token_that_asks(tmp_path: Path, redis_server: RedisServer) -> None:
    redis_server.raw(b"ACL SETUSER carol on >wonder ~* +@all\r\n", 5)
    config = tmp_path / "redisgate.toml"
    config.write_text(
        f'[[instances]]\nid = "one"\nurl = "{redis_server.unix_url}"\n'
        + "".join(
            f'[[tokens]]\nname = "{name}"\ntoken = "{name}-token"\n{limit}\n'
            for name, limit in (
                ("full", ""),
                ("rated", "rate = 1000"),
                ("daily", "daily = 1000"),
                ("expiring", "expires = 2100-01-01T00:00:00Z"),
                ("narrowed", 'deny = ["flushall"]'),
                ("carol", 'user = "carol"\npassword = "wonder"'),
            )
        )
    )
    gateway = Gateway({}, ["--config", str(config), "--workers", "1"])
    try:
        for name in ("rated", "daily", "expiring", "narrowed", "carol"):
            with Client(gateway.port, f"{name}-token") as client:
                response = client.command("ACL", "RESTTOKEN", "carol", "wonder")
                assert response.error == "NOPERM this user has no permissions to run the 'acl|resttoken' command", name
        with Client(gateway.port, "full-token") as client:
            assert client.command("ACL", "RESTTOKEN", "carol", "wonder").result.startswith("rgu_")
    finally:
        gateway.stop()


def test_resttoken_needs_a_user_with_a_password(gateway: Gateway) -> None:
    with Client(gateway.port) as client:
        response = client.command("ACL", "RESTTOKEN", "default", "anything")
        assert response.error == 'ERR user "default" has no password of its own, so a token would prove nothing'
