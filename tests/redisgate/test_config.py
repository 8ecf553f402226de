"""Flags, variables and file; and that what is wrong is said in one clear line."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from redisgate.config import SETTINGS, SETTINGS_VERSION, SINGLE, ConfigError, Limits, Settings, ensure_secret_key, load
from redisgate.policy import Scope
from redisgate.reference import BOUNDS, reference_page
from resp.address import Address

ROOT = Path(__file__).parents[2]
ONE = {"REDISGATE_REDIS_URL": "redis://h:1/2", "REDISGATE_TOKEN": "the-token"}
HEAD = '[[instances]]\nid = "a"\nurl = "redis://h"\n'


def configure(tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, **flags: Any) -> Settings:
    path = tmp_path / "redisgate.toml"
    path.write_text(toml)
    return load({"config": str(path), **flags}, environ or {}, tmp_path)


def test_one_instance_by_variables(tmp_path: Path) -> None:
    settings = load({}, {**ONE, "REDISGATE_READONLY_TOKEN": "reads"}, tmp_path)
    (instance,) = settings.instances
    assert (instance.id, instance.address) == ("default", Address(host="h", port=1, database=2))
    assert [(token.token, token.scope.readonly) for token in settings.tokens] == [("the-token", False), ("reads", True)]
    assert settings.port == 3000
    assert settings.limits == Limits()
    assert "the-token" not in repr(settings)


SINGLE_VALUES: dict[str, tuple[Any, str, str]] = {  # as in OTHER_VALUES
    "redis_pool_size": (3, "4", "5"),
    "redis_max_waiting": (30, "40", "50"),
    "redis_connect_timeout": ("1s", "2s", "3s"),
    "redis_command_timeout": ("1s", "2s", "3s"),
    "redis_stall_timeout": ("1s", "2s", "3s"),
    "redis_idle_timeout": ("1s", "2s", "3s"),
    "redis_capacity": ("1MiB", "2MiB", "3MiB"),
    "redis_tls_ca_file": ("a", "b", "c"),
    "redis_tls_cert_file": ("a", "b", "c"),
    "redis_tls_key_file": ("a", "b", "c"),
    "redis_tls_server_name": ("a", "b", "c"),
    "redis_tls_verify": (False, "true", "false"),
}


@pytest.mark.parametrize("setting", SINGLE, ids=lambda setting: setting.name)
def test_flag_before_variable_before_file_for_one_instance(setting: Any, tmp_path: Path) -> None:
    url = "rediss://h:1"
    if setting.name == "redis_url":
        values: tuple[Any, ...] = ("redis://file", "redis://variable", "redis://flag")
    elif setting.name.endswith("token_file") or setting.name == "srh_tokens":
        values = ("in-file", "in-variable", "in-flag")
        for name in values:
            entry = f'{{"{name}": {{"srh_id": "{name}", "connection_string": "redis://h"}}}}'
            (tmp_path / name).write_text(entry if setting.name == "srh_tokens" else name)
    elif setting.secret:
        values = ("in-file", "in-variable")
    else:
        values = SINGLE_VALUES[setting.name]

    def seen(flag: Any = None, environ: dict[str, str] | None = None) -> Any:
        toml = f"{setting.name} = {str(values[0]).lower() if isinstance(values[0], int) else repr(values[0])}\n"
        given = {"REDISGATE_REDIS_URL": url, "REDISGATE_TOKEN": "the-token", **(environ or {})}
        if setting.name == "redis_url" and environ is None:
            del given["REDISGATE_REDIS_URL"]
        if setting.name in ("token", "token_file") and environ is None:
            del given["REDISGATE_TOKEN"]
        settings = configure(tmp_path, toml, given, **({} if flag is None else {setting.name: flag}))
        instance = settings.instances[0]
        if setting.name == "redis_url":
            return instance.address.host
        if "token" in setting.name:
            return settings.tokens[-1].token
        name = setting.name.removeprefix("redis_")
        if name.startswith("tls_"):
            return getattr(instance.address, name.removeprefix("tls_"))
        return getattr(instance, name)

    def expected(value: Any) -> Any:
        return value.removeprefix("redis://") if setting.name == "redis_url" else setting.parse(value)

    assert seen() == expected(values[0])
    if setting.name != "token_file":
        assert seen(environ={setting.variable: values[1]}) == expected(values[1])
    if not setting.secret and setting.name != "token_file":
        assert seen(values[2], {setting.variable: values[1]}) == expected(values[2])


def test_tokens_of_the_file_may_be_for_the_instance_of_the_variables(tmp_path: Path) -> None:
    tables = '[[tokens]]\nname = "t"\ntoken = "from-the-file"\n'
    settings = configure(tmp_path, tables, {"REDISGATE_REDIS_URL": "redis://h"})
    assert [(token.token, token.instance) for token in settings.tokens] == [("from-the-file", "default")]
    settings = configure(tmp_path, tables, ONE)
    assert [token.token for token in settings.tokens] == ["the-token", "from-the-file"]


def test_a_tokens_file_of_srh_counts_beside_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text('{"t": {"srh_id": "s", "connection_string": "redis://h"}}')
    settings = configure(tmp_path, HEAD, srh_tokens="tokens.json")
    assert [instance.id for instance in settings.instances] == ["a", "s"]
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.json"):
        configure(tmp_path, HEAD, srh_tokens="missing.json")


def test_certificates_are_found_beside_where_it_was_started(tmp_path: Path) -> None:
    settings = configure(tmp_path, HEAD, {"REDISGATE_TLS_CERT_FILE": "c.pem, /etc/d.pem"})
    assert settings.tls_cert_file == (str(tmp_path / "c.pem"), "/etc/d.pem")


def test_a_file_for_a_newer_release_is_refused(tmp_path: Path) -> None:
    assert configure(tmp_path, f"settings_version = {SETTINGS_VERSION}\n{HEAD}") == configure(tmp_path, HEAD)
    with pytest.raises(ConfigError, match=r"written for a newer release.*upgrade"):
        configure(tmp_path, f"settings_version = {SETTINGS_VERSION + 1}\n{HEAD}")
    with pytest.raises(ConfigError, match="expected a whole number"):
        configure(tmp_path, f'settings_version = "new"\n{HEAD}')


def test_no_token_at_all_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(tmp_path, HEAD)
    assert "there is no token" in capsys.readouterr().err


OTHER_VALUES: dict[str, tuple[Any, Any, Any]] = {  # in the file, in the variable, as a flag
    "host": ("10.0.0.1", "10.0.0.2", "10.0.0.3"),
    "base_domain": ("a.example", "b.example", "c.example"),
    "state_dir": ("one", "two", "three"),
    "secret_key": ("a" * 20, "b" * 20, "c" * 20),
    "tls_cert_file": (["/a"], "/b, /c", "/d"),
    "tls_key_file": (["/a"], "/b, /c", "/d"),
    "cors_origins": (["https://a"], "https://b, https://c", "*"),
    "log_level": ("debug", "warning", "error"),
    "log_format": ("json", "text", "json"),
    "database_url": ("postgresql://a@h/one", "postgresql://b@h/two", "postgres://c@h/three"),
    "database_direct_url": ("postgresql://a@h/one", "postgresql://b@h/two", "postgres://c@h/three"),
    "database_migration_url": ("postgresql://a@h/one", "postgresql://b@h/two", "postgres://c@h/three"),
    "mode": ("dev", "production", "dev"),
    "provisioner": ("external", "local", "external"),
    "trusted_proxies": (["10.0.0.0/8"], "fd00::/8, 10.1.0.0/16", "192.0.2.1/32"),
    "allowed_networks": (["10.0.0.0/8"], "fd00::/8, 10.1.0.0/16", "192.0.2.1/32"),
    **{name: (["a"], "b, c", "d") for name in ("previous_secret_keys", "encryption_keys")},
    **dict.fromkeys(("public_url", "audit_key", "mailer", "redis_server", "instances_dir"), ("a", "b", "c")),
    **dict.fromkeys(("migrate_on_start", "registration", "allow_private_addresses"), (True, "false", "true")),
    "access_log": ("off", "all", "errors"),
    "metrics_host": ("10.0.0.1", "10.0.0.2", "10.0.0.3"),
    "trace_endpoint": ("http://a:4318", "https://b", "http://c/v1"),
    "log_keys": (True, "false", "true"),
    **dict.fromkeys(("access_log_sample", "trace_ratio"), (0.5, "0.25", "0.75")),
    "kubernetes": ("on", "off", "on"),
    **dict.fromkeys(("kubeconfig", "kubernetes_context", "kubernetes_namespace", "kubernetes_watch"), ("a", "b", "c")),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_flag_before_variable_before_file(setting: Any, tmp_path: Path) -> None:
    in_file, in_variable, as_flag = OTHER_VALUES.get(setting.name, (11, "12", "13"))
    line = f"{setting.name} = {in_file!r}\n".replace("'", '"').replace("True", "true")
    toml = f"[{setting.table}]\n{line}{HEAD}" if setting.table else line + HEAD

    def value(**given: Any) -> Any:
        settings = configure(tmp_path, toml, **given)
        return getattr(getattr(settings, setting.table) if setting.table else settings, setting.name)

    def expected(raw: Any) -> Any:
        if setting.name == "state_dir":
            return tmp_path / raw
        return raw.encode() if setting.name == "secret_key" else setting.parse(raw)

    variable = {setting.variable: in_variable}
    assert value() == expected(in_file)
    assert value(environ=variable) == expected(in_variable)
    assert value(environ=variable, **{setting.name: as_flag}) == expected(as_flag)
    if setting.other_variable:
        other = {setting.other_variable: as_flag}
        assert value(environ=other) == expected(as_flag)
        assert value(environ=variable | other) == expected(in_variable)


def test_tokens_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-a-file\n")
    settings = configure(
        tmp_path,
        HEAD
        + """
[[tokens]]
name = "browser"
token_file = "secret"
readonly = true
allow = ["GET", "@Hash"]
deny = ["hgetall"]
prefixes = ["public:"]
expires = 2030-01-01T00:00:00Z
rate = 100
daily = 100_000
[[tokens]]
name = "app"
token_env = "APP_TOKEN"
user = "app"
password_env = "APP_PASSWORD"
""",
        {"APP_TOKEN": "from-a-variable", "APP_PASSWORD": "pw"},
    )
    browser, app = settings.tokens
    assert browser.token == "from-a-file"
    assert browser.instance == "a"
    assert browser.scope == Scope(
        readonly=True, allow=frozenset({"get", "@hash"}), deny=frozenset({"hgetall"}), prefixes=(b"public:",)
    )
    assert (browser.expires, browser.rate, browser.daily) == (1893456000.0, 100, 100_000)
    assert (app.token, app.user, app.password, app.scope.own_user) == ("from-a-variable", "app", "pw", True)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("port = 0x", "is not TOML"),
        ("port = 70000\n" + HEAD, "port: expected a whole number from 0 to 65535"),
        ("prot = 1\n" + HEAD, "unknown setting prot"),
        ("limits = 3\n" + HEAD, "limits is not a table"),
        ("[limits]\nmax_body_bytes = 0\n" + HEAD, "limits.max_body_bytes: expected a size above zero"),
        ("[limits]\nidle_timeout = true\n" + HEAD, "limits.idle_timeout: expected a time above zero"),
        ("instances = 3", "instances is no list of tables; each of them begins with a line [[instances]]"),
        ("tokens = [3]\n" + HEAD, "tokens is no list of tables; each of them begins with a line [[tokens]]"),
        ('[instances]\nid = "a"\nurl = "redis://h"', "begins with a line [[instances]]"),
        ('[[instances]]\nurl = "redis://h"', "instances[0] has no id"),
        ('[[instances]]\nid = "a"', "instances[0] has no url"),
        ('[[instances]]\nid = "a/b"\nurl = "redis://h"', "id: expected 1 to 63 letters"),
        ('[[instances]]\nid = "a"\nurl = "http://h"', "begins with redis://"),
        ('[[instances]]\nid = "a"\nurl_env = "NOT_THERE"', "the variable NOT_THERE, which is not set"),
        (HEAD + 'tls_ca_file = "x"', "tls_ settings need a rediss:// URL"),
        (HEAD + HEAD, "two instances are called 'a'"),
        (HEAD + HEAD.replace('"a"', '"A"'), "two instances are called 'a'"),
        (HEAD + '[[tokens]]\ntoken = "t"', "tokens[0] has no name"),
        (HEAD + '[[tokens]]\nname = "t"', "tokens[0] (t) has no token"),
        (HEAD + '[[tokens]]\nname = "t"\ntoken = "a b"', "printable ASCII without spaces"),
        (HEAD + '[[tokens]]\nname = "t"\ntoken = "t"\ninstance = "b"', "there is no instance 'b'"),
        (HEAD + '[[tokens]]\nname = "t"\ntoken = "t"\nallow = ["@nosuch"]', "@nosuch"),
        (HEAD + '[[tokens]]\nname = "t"\ntoken = "t"\nexpires = 2030-01-01T00:00:00', "expires needs a time zone"),
        (HEAD + '[[tokens]]\nname = "t"\ntoken = "t"\npassword = "hidden"', "has a password but no user"),
        (HEAD + '[[tokens]]\nname = "t"\ntoken = "t"\nrate = 1.5', "rate: expected a whole number"),
        (
            HEAD + '[[tokens]]\nname = "t"\ntoken = "hidden"\n[[tokens]]\nname = "u"\ntoken = "hidden"',
            "the tokens 't' and 'u' are the same",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(toml: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(tmp_path, toml)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert "hidden" not in message


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"REDISGATE_REDIS_URL": "redis://:password@h"}, "but not REDISGATE_TOKEN"),
        ({"REDISGATE_TOKEN": "x"}, "but not REDISGATE_REDIS_URL"),
        ({**ONE, "REDISGATE_REDIS_URL": "redis://:password@h:port"}, "the port is not a number"),
        ({**ONE, "REDISGATE_PORT": "many"}, "REDISGATE_PORT: expected a whole number"),
        ({**ONE, "REDISGATE_SECRET_KEY": "password"}, "shorter than 16 characters"),
        ({"REDISGATE_REDIS_POOL_SIZE": "3"}, "redis_pool_size is set, but not redis_url"),
        ({**ONE, "REDISGATE_REDIS_TLS_CA_FILE": "x"}, "tls_ settings need a rediss:// URL"),
        ({**ONE, "REDISGATE_TOKEN": "a password"}, "printable ASCII without spaces"),
        ({"REDISGATE_CONFIG": "not-there.toml"}, "No such file"),
    ],
)
def test_wrong_variables(environ: dict[str, str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load({}, environ, tmp_path)
    assert "password" not in str(caught.value)


def test_a_misspelt_variable_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load({}, {**ONE, "REDISGATE_WORKER": "2"}, tmp_path)
    assert "REDISGATE_WORKER is no setting" in capsys.readouterr().err


def test_a_secret_key_is_made_once_and_kept(tmp_path: Path) -> None:
    settings = load({}, {**ONE, "REDISGATE_STATE_DIR": str(tmp_path / "state")}, tmp_path)
    first = ensure_secret_key(settings).secret_key
    assert len(first) >= 32
    assert ensure_secret_key(settings).secret_key == first
    assert (tmp_path / "state" / "secret.key").stat().st_mode & 0o077 == 0
    assert first.decode() not in repr(ensure_secret_key(settings))


def test_an_unwritable_state_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = dataclasses.replace(load({}, ONE, tmp_path), state_dir=tmp_path / "file" / "state")
    with pytest.raises(ConfigError, match="REDISGATE_SECRET_KEY"):
        ensure_secret_key(settings)


def test_the_reference_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference_page(), (
        "run `python -m redisgate.reference > docs/configuration.md`"
    )
    assert len({bound[:2] for bound in BOUNDS}) == len(BOUNDS)


def test_the_example_file_is_right(tmp_path: Path) -> None:
    environ = {
        "SESSIONS_REDIS_URL": "rediss://user:password@host:6380/0",
        "CACHE_TOKEN": "1",
        "CACHE_BROWSER_TOKEN": "2",
        "SESSIONS_TOKEN": "3",
    }
    settings = load({"config": str(ROOT / "docs" / "redisgate.example.toml")}, environ, tmp_path)
    assert [instance.id for instance in settings.instances] == ["cache", "sessions"]
    assert [token.name for token in settings.tokens] == ["cache-app", "cache-browser", "sessions-app"]
