"""docs/configuration.md, made from the settings and the bounds in the code: `python -m redisgate.reference`."""

import importlib

from redisgate.config import INSTANCE_KEYS, SETTINGS, SINGLE, TOKEN_KEYS, Setting

# Bounds that are no settings: module, name, unit, what happens there.
BOUNDS: tuple[tuple[str, str, str, str], ...] = (
    ("redisgate.http_protocol", "MAX_UNPARSED_BYTES", "bytes", "read ahead of the requests under way; reading pauses"),
    (
        "redisgate.http_protocol",
        "WRITE_BUFFER_BYTES",
        "bytes",
        "answers not taken by a client; its next request waits",
    ),
    ("redisgate.http_protocol", "MIN_BODY_BYTES_PER_SECOND", "bytes/s", "by which body_timeout grows with a body"),
    ("redisgate.http_protocol", "LINGER_SECONDS", "s", "the rest of a refused request is read and thrown away"),
    ("redisgate.http_protocol", "DRAIN_GRACE_SECONDS", "s", "idle connections stay open when a worker stops"),
    ("redisgate.worker", "BACKLOG", "connections", "wait to be accepted"),
    ("redisgate.gateway", "MAX_PIPELINE_COMMANDS", "commands", "in one /pipeline or /multi-exec, else 400"),
    ("redisgate.gateway", "MAX_UNKNOWN_NAMES", "names", "that a server did not know are remembered"),
    ("redisgate.gateway", "NAMES_AT_ONCE", "names", "that a server is asked about in one COMMAND INFO"),
    ("redisgate.gateway", "MAX_LOGIN_FAILURES", "logins", "by ACL RESTTOKEN may fail per instance, then 429"),
    ("redisgate.gateway", "LOGIN_FAILURE_SECONDS", "s", "a failed login is remembered"),
    (
        "redisgate.access",
        "MAX_USER_POOLS",
        "pools",
        "per instance for tokens' Redis users; the longest unused closes",
    ),
    ("redisgate.worker", "RENEW_USERS_SECONDS", "s", "between new logins of those users"),
    ("redisgate.capacity", "SAMPLE_SECONDS", "s", "between looks at the memory of a server with a capacity"),
    ("redisgate.policy", "MAX_REMEMBERED_NAMES", "spellings", "of commands are remembered per scope"),
    ("redisgate.policy", "MAX_NAME_BYTES", "bytes", "longest name of a command, else 400"),
    ("redisgate.policy", "MAX_FAST_ELEMENTS", "elements", "asked for at once before a command takes the slow lane"),
    (
        "redisgate.scripts",
        "MAX_REMEMBERED_FLAGS",
        "flags",
        "of scripts are remembered per instance; the oldest give way",
    ),
    ("redisgate.scripts", "MAX_FLAG_BYTES", "bytes", "longest flag of a script that a server is asked about"),
    ("redisgate.shared", "ALIAS_CAPACITY", "scripts", "whose SHA1 is translated; the oldest give way (NOSCRIPT)"),
    ("redisgate.replies", "MAX_REPLY_DEPTH", "levels", "of nesting in a reply, else 400 for that command"),
    ("redisgate.resttoken", "MAX_TOKEN_BYTES", "bytes", "longest token that carries a login"),
    ("redisgate.logs", "MAX_WAITING_LINES", "lines", "wait for standard error; more are dropped and counted"),
    ("redisgate.logs", "MAX_LINE_BYTES", "bytes", "of one log line; the rest is cut off"),
    ("resp.pool", "MAX_QUEUED_BYTES", "bytes", "of commands wait per instance and worker, then 503"),
    ("resp.pool", "MAX_SLOW_WAITERS", "requests", "of one connection are looked at for the log of slow ones at a time"),
    ("resp.pool", "MAX_BACKOFF_SECONDS", "s", "longest pause before a Redis that is away is tried again"),
    ("resp.connection", "MAX_UNSENT_BYTES", "bytes", "that Redis has not taken on one connection, then 503"),
    ("resp.connection", "STREAM_THRESHOLD_BYTES", "bytes", "larger replies are passed on while they arrive"),
    ("resp.connection", "STALLED_READER_SECONDS", "s", "a slow reader may hold up others; then it moves aside"),
    ("resp.subscriptions", "PING_SECONDS", "s", "between PINGs on a quiet subscription connection"),
    ("resp.subscriptions", "MAX_MESSAGE_BUFFER_BYTES", "bytes", "of one published message"),
    ("resp.scanner", "MAX_BULK_BYTES", "bytes", "of one string in a reply; Redis's own bound"),
    ("resp.scanner", "MAX_ARRAY_ITEMS", "items", "of one array in a reply, else its connection is closed"),
    ("resp.scanner", "MAX_LINE_BYTES", "bytes", "of a status, error or number, else its connection is closed"),
    ("resp.commands", "MAX_LEARNED_COMMANDS", "commands", "learned from a server beyond the bundled table"),
)


def reference_page() -> str:
    """The whole page."""
    lines = [
        "# Configuration",
        "",
        "<!-- Made by `python -m redisgate.reference`; change redisgate/config.py instead. -->",
        "",
        "Every setting has a flag of `redisgate serve`, a variable, and a line in the file that `--config` names",
        "(TOML); the first of these that is given counts. Sizes are bytes or `10MiB`; times are seconds, `500ms`",
        "or `2m`. A complete file: [redisgate.example.toml](redisgate.example.toml).",
        "",
        "| setting | flag | variable | default | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for setting in SETTINGS:
        default = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
        shown = "" if default in (None, "") else f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
        name = f"limits.{setting.name}" if setting.limit else setting.name
        lines.append(f"| `{name}` | `{setting.flag}` | `{setting.variable}` | {shown} | {setting.help} |")
    lines += [
        "",
        "## One instance",
        "",
        "One instance needs no tables: `REDISGATE_REDIS_URL`, `REDISGATE_TOKEN` and, if wanted,",
        "`REDISGATE_READONLY_TOKEN` make one called `default`, beside those of the file. The two tokens have no flag,",
        "because everybody on a machine sees the arguments of its processes. The variables and the `tokens.json` of",
        "serverless-redis-http are understood too.",
        "",
        "| setting | flag | variable | meaning |",
        "| --- | --- | --- | --- |",
        *[_single_line(setting) for setting in SINGLE],
        "",
        "## `[[instances]]`",
        "",
        "| key | meaning |",
        "| --- | --- |",
        *[f"| `{key}` | {meaning} |" for key, (_, meaning) in INSTANCE_KEYS.items()],
        "",
        "## `[[tokens]]`",
        "",
        "| key | meaning |",
        "| --- | --- |",
        *[f"| `{key}` | {meaning} |" for key, (_, meaning) in TOKEN_KEYS.items()],
        "",
        "## Bounds that are no settings",
        "",
        "Every queue, buffer and wait has a bound with a name. These are the same everywhere:",
        "",
        "| bound | value | |",
        "| --- | --- | --- |",
    ]
    for module, name, unit, meaning in BOUNDS:
        value = getattr(importlib.import_module(module), name)
        lines.append(f"| `{name}` | {_readable(value, unit)} | {meaning} |")
    lines.append("")
    return "\n".join(lines)


def _single_line(setting: Setting) -> str:
    flag = "" if setting.secret else f"`{setting.flag}`"
    return f"| `{setting.name}` | {flag} | `{setting.variable}` | {setting.help} |"


def _readable(value: float, unit: str) -> str:
    if unit.startswith("bytes"):
        for exponent, prefix in ((20, "MiB"), (10, "KiB")):
            if value >= 1 << exponent and value % (1 << exponent) == 0:
                return f"{int(value) >> exponent:,} {prefix}{unit[5:]}"
    return f"{value:,g} {unit}" if value < 1000 else f"{int(value):,} {unit}"


if __name__ == "__main__":
    print(reference_page(), end="")
