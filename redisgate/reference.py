"""docs/configuration.md, made from the settings and the bounds in the code: `python -m redisgate.reference`."""

import importlib

from redisgate.config import INSTANCE_KEYS, SETTINGS, SINGLE, TOKEN_KEYS, Setting, duration, size

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
    ("redisgate.tls", "RELOAD_SECONDS", "s", "between two looks at the files of certificates and keys"),
    ("redisgate.tls", "ACCEPTS_PER_TURN", "connections", "by TLS are accepted before others have their turn"),
    ("redisgate.tls", "SHUTDOWN_SECONDS", "s", "for a client to answer that a TLS connection ends"),
    ("redisgate.tls", "DRAIN_SECONDS", "s", "for handshakes under way when a worker stops"),
    ("redisgate.check", "MAX_AT_ONCE", "connections", "`check` and `doctor` try side by side"),
    ("redisgate.healthcheck", "TIMEOUT", "s", "`healthcheck` waits for an answer"),
    ("redisgate.loadtest", "MAX_RATE", "requests/s", "`loadtest` sends at most"),
    ("redisgate.loadtest", "MAX_SECONDS", "s", "a `loadtest` lasts at most"),
    ("redisgate.loadtest", "MAX_CONNECTIONS", "connections", "of one `loadtest`"),
    ("redisgate.loadtest", "REQUEST_SECONDS", "s", "for one of its requests; then it has failed"),
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
        "redisgate.access",
        "MAX_REFERENCE_LENGTH",
        "characters",
        "longest name of an instance that is looked up, else 401",
    ),
    ("redisgate.access", "MAX_REFERENCES", "names", "of instances remembered per credential for several"),
    ("redisgate.metering", "MAX_REMEMBERED_NAMES", "spellings", "of commands are remembered per credential's usage"),
    ("redisgate.asgi", "MAX_REQUESTS", "requests", "to the control plane under way in one worker, then 503"),
    ("redisgate.limits", "ALLOWANCE_SECONDS", "s", "a worker spends a small part of a limit without asking the others"),
    ("redisgate.shared", "MAX_RECORDS", "subjects", "tokens, keys and organizations whose limits are counted"),
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
    ("redisgate.logs", "MAX_KEY_BYTES", "bytes", "of a key in a log line, where keys are shown"),
    (
        "redisgate.counters",
        "MAX_COUNTED_INSTANCES",
        "instances",
        "counted by name in one worker; then all others together",
    ),
    ("redisgate.board", "SLOT_BYTES", "bytes", "for what one process publishes of its counts, twice"),
    ("redisgate.board", "SILENT_SECONDS", "s", "without a word after which a process is shown as stuck"),
    ("redisgate.metrics", "PUBLISH_SECONDS", "s", "between two publications of a process's counts"),
    ("redisgate.metrics", "MAX_SHOWN_BREAKERS", "instances", "out of reach that metrics name"),
    ("redisgate.exporter", "MAX_CONNECTIONS", "connections", "to the metrics port at a time"),
    ("redisgate.status", "MAX_INSTANCES", "instances", "in one answer of /status and /api/admin/metrics"),
    ("redisgate.tracing", "MAX_WAITING_SPANS", "spans", "of one process wait to be exported; more are dropped"),
    ("redisgate.tracing", "EXPORT_TIMEOUT", "s", "for a collector to take spans"),
    ("redisgate.tracing", "STOP_SECONDS", "s", "for the last spans to leave when a worker stops"),
    ("redisgate.tracing", "MAX_WANTED_TRACES", "requests", "of one worker in a second traced because clients want it"),
    ("redisgate.tracing", "MAX_QUERY_LENGTH", "characters", "of a statement in its span"),
    ("resp.pool", "MAX_QUEUED_BYTES", "bytes", "of commands wait per instance and worker, then 503"),
    ("resp.pool", "MAX_SLOW_WAITERS", "requests", "of one connection are looked at for the log of slow ones at a time"),
    ("resp.pool", "MAX_BACKOFF_SECONDS", "s", "longest pause before a Redis that is away is tried again"),
    ("resp.connection", "MAX_UNSENT_BYTES", "bytes", "that Redis has not taken on one connection, then 503"),
    ("resp.connection", "MAX_CALL_BYTES", "bytes", "of a reply that the gateway itself asked for"),
    ("resp.connection", "STREAM_THRESHOLD_BYTES", "bytes", "larger replies are passed on while they arrive"),
    ("resp.connection", "STALLED_READER_SECONDS", "s", "a slow reader may hold up others; then it moves aside"),
    ("resp.subscriptions", "PING_SECONDS", "s", "between PINGs on a quiet subscription connection"),
    ("resp.subscriptions", "MAX_MESSAGE_BUFFER_BYTES", "bytes", "of one published message"),
    ("resp.scanner", "MAX_BULK_BYTES", "bytes", "of one string in a reply; Redis's own bound"),
    ("resp.scanner", "MAX_ARRAY_ITEMS", "items", "of one array in a reply, else its connection is closed"),
    ("resp.scanner", "MAX_LINE_BYTES", "bytes", "of a status, error or number, else its connection is closed"),
    ("resp.commands", "MAX_LEARNED_COMMANDS", "commands", "learned from a server beyond the bundled table"),
)
CONTROL_BOUNDS: tuple[tuple[str, str, str, str], ...] = (
    ("control.http", "MAX_BODY_BYTES", "bytes", "of a request's body, else 413"),
    ("control.http", "MAX_PAGE_LIMIT", "items", "on one page of a list"),
    ("control.tokens", "MAX_TOKEN_BYTES", "bytes", "longest session token or API key"),
    ("control.database", "CONNECT_TIMEOUT", "s", "to connect, and to wait for a connection of the pool; then 503"),
    ("control.database", "COMMAND_TIMEOUT", "s", "for one statement; then 503"),
    ("control.migrate", "LOCK_SECONDS", "s", "to wait for another process that migrates"),
    ("control.migrate", "TABLE_LOCK_SECONDS", "s", "a migration waits for a table in use, and others behind it"),
    ("control.migrate", "TABLE_LOCK_ATTEMPTS", "attempts", "a second apart; then it gives up"),
    ("control.plane", "MAX_RETRY_SECONDS", "s", "longest pause before a PostgreSQL that is away is tried again"),
    ("control.app", "MAX_WAITING_PASSWORDS", "sign-ins", "of one worker wait for a thread, then 503"),
    ("control.passwords", "MIN_PASSWORD_LENGTH", "characters", "of a password at least"),
    ("control.mailer", "MAX_WAITING", "mails", "of one process wait for delivery; more are dropped and logged"),
    ("control.organizations", "MAX_INVITATIONS_A_DAY", "invitations", "of one organization, then 403"),
    ("control.plane", "ACCESS_POOL_SIZE", "connections", "of one worker to the database for what the data plane asks"),
    ("control.organizations", "MAX_OWN_ORGANIZATIONS", "organizations", "made by one person"),
    ("control.feed", "POLL_SECONDS", "s", "between two looks for changes that no notification told of"),
    ("control.feed", "MAX_CREDENTIALS", "credentials", "known to one worker; then the oldest are read again"),
    ("control.feed", "MAX_UNKNOWN", "credentials", "that grant nothing are remembered"),
    ("control.feed", "UNKNOWN_SECONDS", "s", "they are"),
    ("control.feed", "MAX_LOADS", "loads", "of credentials ask PostgreSQL at a time; more wait"),
    ("control.usage", "FLUSH_SECONDS", "s", "between two writes of a worker's usage"),
    ("control.usage", "MAX_PENDING", "rows", "of usage wait for a PostgreSQL that is away; the oldest give way"),
    ("control.usage", "LAST_USED_SECONDS", "s", "to which a key's last use is right"),
    ("control.usage", "MAX_POINTS", "points", "in one series"),
    ("control.usage", "MAX_COMMANDS", "commands", "of one instance whose calls are counted"),
    ("control.console", "MAX_PER_PERSON", "requests", "of one person to the console in one worker, then 429"),
    ("control.console", "MAX_COMMANDS", "commands", "typed at once"),
    ("control.console", "COMMANDS_AT_ONCE", "commands", "of the console are sent together; a transaction always whole"),
    ("control.console", "MAX_KEPT_BYTES", "bytes", "of their replies are kept, the rest is read and thrown away"),
    ("control.console", "MAX_LINE_CHARACTERS", "characters", "of one command as it is typed, else 400"),
    ("control.pages", "MAX_FORM_BYTES", "bytes", "of a form's text in the dashboard, files not counted, else 413"),
    ("control.console", "MAX_SHOWN_BYTES", "bytes", "of replies that the console shows"),
    ("control.browser", "SCAN_SECONDS", "s", "to find one page of keys"),
    ("control.browser", "SCAN_COUNT", "keys", "that Redis looks at in one step of a search"),
    ("control.browser", "SWEEP_SECONDS", "s", "for one step of counting or deleting keys"),
    ("control.browser", "MAX_VALUE_BYTES", "bytes", "of a value that the data browser shows and edits"),
    ("control.live", "MAX_STREAMS_PER_PERSON", "streams", "of the console, of one person in one worker, then 429"),
    ("control.live", "MAX_WAITING_EVENTS", "events", "for one reader; then the oldest give way, and it is told"),
    ("control.live", "MAX_EVENTS_A_SECOND", "events", "to one reader"),
    ("control.live", "CHECK_SECONDS", "s", "between two looks whether a person may still watch"),
    ("control.backups", "MAX_AT_ONCE", "snapshots", "that one worker hands out at a time, then 429"),
    ("control.provisioners.snapshots", "SNAPSHOT_SECONDS", "s", "for redis-server to send the next part of a snapshot"),
    ("control.provisioners.snapshots", "CHECK_SECONDS", "s", "to look through an uploaded snapshot"),
    ("control.workers", "REPORT_SECONDS", "s", "between two reports of a worker, for administrators"),
    ("control.workers", "SILENT_SECONDS", "s", "after which a worker counts as silent"),
    ("control.audit", "CHECKS_KEPT", "checks", "of the audit log's chain are kept"),
    ("control.daily", "STALE_SECONDS", "s", "after which a gateway's lease on a daily limit is given to others"),
    ("control.instances", "SETTLE_SECONDS", "s", "an answer waits for what was asked for to be done"),
    ("control.reconciler", "MAX_CREATE_ATTEMPTS", "failures", "after which a creation is rolled back"),
    ("control.reconciler", "MAX_BACKOFF_SECONDS", "s", "longest pause between two attempts"),
    ("control.reconciler", "PASSWORD_OVERLAP_SECONDS", "s", "Redis accepts the old password after a rotation"),
    ("control.steward", "SWEEP_SECONDS", "s", "between two looks at every instance of a host"),
    ("control.steward", "EXTERNAL_SWEEP_SECONDS", "s", "between two looks at every external instance"),
    ("control.steward", "LEADER_SECONDS", "s", "in which another host takes over the deployment's work"),
    ("control.hosts", "AWAY_SECONDS", "s", "of silence after which a host counts as away"),
    ("control.steward", "MAX_AT_ONCE", "instances", "are worked on side by side"),
    ("control.provisioners.local", "START_SECONDS", "s", "for redis-server to answer"),
    ("control.provisioners.local", "STOP_SECONDS", "s", "for redis-server to end before it is killed"),
    ("control.addresses", "RESOLVE_SECONDS", "s", "for a name server to answer"),
    ("control.addresses", "MAX_ADDRESSES", "addresses", "of one name; a name with more is refused"),
)

KUBERNETES_BOUNDS: tuple[tuple[str, str, str, str], ...] = (
    ("control.kubernetes.client", "CALL_SECONDS", "s", "for the API server to answer a call"),
    ("control.kubernetes.client", "CONNECTIONS", "calls", "under way at a time; more wait"),
    ("control.kubernetes.client", "EVENT_BYTES", "bytes", "largest event of a watch"),
    ("control.kubernetes.reflector", "SILENCE_SECONDS", "s", "after which a watch counts as dead"),
    ("control.kubernetes.reflector", "RETRY_SECONDS_MOST", "s", "longest pause before a watch is tried again"),
    ("control.kubernetes.queue", "WORKERS", "resources", "are worked on side by side"),
    ("control.kubernetes.queue", "BACKOFF_SECONDS_MOST", "s", "longest pause before work that failed is done again"),
    ("control.kubernetes.lease", "DURATION_SECONDS", "s", "after which the lease of who is silent is taken"),
    ("control.kubernetes.lease", "DEADLINE_SECONDS", "s", "without a renewal after which who has it stops working"),
    ("control.kubernetes.routes", "SYNC_SECONDS", "s", "a worker waits for all routes before it serves"),
    ("control.kubernetes.routes", "MAX_ROUTE_BYTES", "bytes", "largest route; a larger one is refused"),
    (
        "control.provisioners.kubernetes",
        "READY_SECONDS",
        "s",
        "for an instance to be ready; then the attempt has failed",
    ),
    ("control.provisioners.kubernetes", "GONE_SECONDS", "s", "for what was deleted to be gone; then again later"),
    ("control.provisioners.kubernetes", "ROUTE_SECONDS", "s", "for gateways to say that they route to an instance"),
    ("control.kubernetes.fleet", "SWEEP_SECONDS", "s", "between two looks at all instances of the control plane"),
    ("control.kubernetes.fleet", "MAX_CHANGED", "resources", "that changed wait to be looked at; then a sweep does"),
    ("control.kubernetes.routes", "PROBE_SECONDS", "s", "for the API server to answer before an instance is made"),
    ("control.kubernetes.routes", "MAX_TOKENS", "keys", "of one instance, older ones that still work included"),
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
        shown = _default(setting)
        variable = f"`{setting.variable}`" + (f" or `{setting.other_variable}`" if setting.other_variable else "")
        lines.append(f"| `{setting.path}` | `{setting.flag}` | {variable} | {shown} | {setting.help} |")
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
    lines += _bounds(BOUNDS)
    lines += [
        "",
        "Of the control plane:",
        "",
        "| bound | value | |",
        "| --- | --- | --- |",
        *_bounds(CONTROL_BOUNDS),
        "",
        "With Kubernetes:",
        "",
        "| bound | value | |",
        "| --- | --- | --- |",
        *_bounds(KUBERNETES_BOUNDS),
        "",
    ]
    return "\n".join(lines)


def _single_line(setting: Setting) -> str:
    flag = "" if setting.secret else f"`{setting.flag}`"
    return f"| `{setting.name}` | {flag} | `{setting.variable}` | {setting.help} |"


def _default(setting: Setting) -> str:
    """As somebody would write it."""
    value = setting.default
    if isinstance(value, tuple):
        value = ", ".join(value)
    if value in (None, ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if setting.parse is size:
        exponent, unit = next((e, u) for e, u in ((20, "MiB"), (10, "KiB"), (0, "")) if value % (1 << e) == 0)
        return f"`{value >> exponent}{unit}`"
    if setting.parse is duration:
        seconds, unit = next((n, u) for n, u in ((86400, "d"), (3600, "h"), (1, "")) if value % n == 0)
        return f"`{value / seconds:g}{unit}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _bounds(bounds: tuple[tuple[str, str, str, str], ...]) -> list[str]:
    return [
        f"| `{name}` | {_readable(getattr(importlib.import_module(module), name), unit)} | {meaning} |"
        for module, name, unit, meaning in bounds
    ]


def _readable(value: float, unit: str) -> str:
    if unit.startswith("bytes"):
        for exponent, prefix in ((20, "MiB"), (10, "KiB")):
            if value >= 1 << exponent and value % (1 << exponent) == 0:
                return f"{int(value) >> exponent:,} {prefix}{unit[5:]}"
    return f"{value:,g} {unit}" if value < 1000 else f"{int(value):,} {unit}"


if __name__ == "__main__":
    print(reference_page(), end="")
