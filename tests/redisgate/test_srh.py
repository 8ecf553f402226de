"""The variables and the file of serverless-redis-http mean here what they mean there."""

import json
from pathlib import Path

import pytest

from redisgate.config import ConfigError, Settings, load
from tests.http import Client
from tests.servers import Gateway, RedisServer

ENV = {"SRH_MODE": "env", "SRH_TOKEN": "example_token", "SRH_CONNECTION_STRING": "redis://redis:6379"}
FILE = {
    "token_one": {"srh_id": "one", "connection_string": "redis://:pw@localhost:6379", "max_connections": 5},
    "token_two": {"srh_id": "two", "connection_string": "rediss://localhost:6380/3"},
    "token_three": {"srh_id": "one", "connection_string": "redis://:pw@localhost:6379", "max_connections": 5},
}


def test_one_connection_by_variables(tmp_path: Path) -> None:
    settings = load({}, {**ENV, "SRH_MAX_CONNECTIONS": "7"}, tmp_path)
    assert (settings.host, settings.port) == ("0.0.0.0", 80)
    assert settings.instances[0].address.host == "redis"
    assert settings.instances[0].pool_size == 7
    assert settings.tokens[0].token == "example_token"


def test_port_and_ipv6(tmp_path: Path) -> None:
    settings = load({}, {**ENV, "SRH_PORT": "8079", "SRH_IPV6": "true"}, tmp_path)
    assert (settings.host, settings.port) == ("::", 8079)


def test_our_own_settings_win(tmp_path: Path) -> None:
    settings = load({"port": "4000"}, {**ENV, "REDISGATE_HOST": "127.0.0.1"}, tmp_path)
    assert (settings.host, settings.port) == ("127.0.0.1", 4000)


def check_file(settings: Settings) -> None:
    assert [(instance.id, instance.pool_size) for instance in settings.instances] == [("one", 5), ("two", 3)]
    assert settings.instances[1].address.tls
    assert settings.instances[1].address.database == 3
    assert [(token.token, token.instance) for token in settings.tokens] == [
        ("token_one", "one"),
        ("token_two", "two"),
        ("token_three", "one"),
    ]


def test_the_file_beside_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "srh-config").mkdir()
    (tmp_path / "srh-config" / "tokens.json").write_text(json.dumps(FILE))
    check_file(load({}, {}, tmp_path))
    check_file(load({}, {"SRH_MODE": "file"}, tmp_path))


def test_the_file_by_flag(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(FILE))
    check_file(load({"srh_tokens": "mine.json"}, {}, tmp_path))


@pytest.mark.parametrize(
    ("environ", "content", "expected"),
    [
        ({"SRH_MODE": "nosuch"}, None, "SRH_MODE: expected env or file"),
        ({"SRH_MODE": "env", "SRH_TOKEN": "t"}, None, "SRH_CONNECTION_STRING is not set"),
        ({**ENV, "SRH_TOKEN": ""}, None, "SRH_TOKEN is not set"),
        ({**ENV, "SRH_PORT": "x"}, None, "SRH_PORT"),
        ({**ENV, "SRH_MAX_CONNECTIONS": "0"}, None, "max_connections"),
        ({"SRH_MODE": "file"}, None, "No such file"),
        ({"SRH_MODE": "file"}, "{", "is not JSON"),
        ({"SRH_MODE": "file"}, "[]", "expected an object of tokens"),
        ({"SRH_MODE": "file"}, '{"t": {"srh_id": "x"}}', "entry 1 needs a token"),
        ({"SRH_MODE": "file"}, '{"t": {"srh_id": "x", "connection_string": "mysql://:hidden@h"}}', "redis://"),
        (
            {"SRH_MODE": "file"},
            '{"t": {"srh_id": "x", "connection_string": "redis://a"},'
            ' "u": {"srh_id": "x", "connection_string": "redis://b"}}',
            "used for two connection strings",
        ),
    ],
)
def test_what_is_wrong_is_said(environ: dict[str, str], content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "srh-config").mkdir()
        (tmp_path / "srh-config" / "tokens.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load({}, environ, tmp_path)
    assert expected in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_it_serves(redis_server: RedisServer) -> None:
    environ = {"SRH_MODE": "env", "SRH_TOKEN": "srh-token", "SRH_CONNECTION_STRING": redis_server.url}
    gateway = Gateway(environ, ["--workers", "1"])
    try:
        with Client(gateway.port, "srh-token") as client:
            assert client.command("SET", "srh", "1").result == "OK"
            assert client.post("/pipeline", [["GET", "srh"]]).json() == [{"result": "1"}]
    finally:
        gateway.stop()
