"""From a request to a command: who asks, of which instance, what, and whether they may.

Nothing here waits. What has to be known first (an unknown command's flags,
what a server makes of a script's flags) is looked up by a task, while the
connection takes no further request, so that order is kept.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

import redisgate
from redisgate.access import UNAUTHORIZED, AccessTable, Backend, Grant, Instance, LimitRefusal, Refusal
from redisgate.config import Settings
from redisgate.counters import COMMAND, WORKER, Series
from redisgate.exchange import RETRY_AFTER, Exchange, PipelineExchange, TransactionExchange
from redisgate.http_head import Head, header_fields
from redisgate.http_protocol import ALLOW, HttpConnection
from redisgate.peers import Peers
from redisgate.policy import Rule
from redisgate.replies import BASE64, JSON, RESP2, quote
from redisgate.requests import BadRequest, parse_command, parse_commands, split_path, split_query
from redisgate.resttoken import RestTokens
from redisgate.streams import MonitorStream, SubscriptionStream
from resp.connection import connect
from resp.encoder import encode_command
from resp.errors import ConnectFailed, ReplyLost, RespError, Unavailable

MAX_PIPELINE_COMMANDS: Final = 1_000_000
"""Commands in one /pipeline or /multi-exec; the body limit is usually reached first."""
LONG_PIPELINE_COMMANDS: Final = 1_000
"""Commands in one request above which it goes by the slow lane, so that others need not wait for all its replies."""
MAX_UNKNOWN_NAMES: Final = 1024
"""Names that a server did not know, remembered by a worker; and names that one request may have it asked about."""
NAMES_AT_ONCE: Final = 128
"""Names in one COMMAND INFO."""
UNKNOWN_NAME_SECONDS: Final = 10.0
"""How long such a name is remembered; a module may be loaded meanwhile."""
MAX_LOGIN_FAILURES: Final = 5
"""Failed ACL RESTTOKEN commands per instance within `LOGIN_FAILURE_SECONDS`."""
LOGIN_FAILURE_SECONDS: Final = 30.0

OVER_CAPACITY: Final = b"ERR DB capacity quota exceeded"
QUESTION: Final = 0x3F  # b"?"; see `redisgate.requests.PERCENT`

_BODY_METHODS: Final = (b"POST", b"PUT")
_COMMAND_METHODS: Final = (b"GET", b"POST", b"PUT", b"HEAD")
_STREAMS: Final = (b"subscribe", b"psubscribe", b"monitor")
_CORS_MAX_AGE: Final = b"86400"
_CONTROL_PLANE: Final = b"login logout register auth api static metrics stats docs openapi.json".split()
_CONTROL_PLANE_PREFIXES: Final = (b"reset", b"invitations", b"dashboard", b"admin", b"health", b"docs")
"""What begins with these is reserved too, longer names included."""

log = logging.getLogger(__name__)

Argv = list[bytes]


class ControlPlane(Protocol):
    """What answers the reserved paths of the main host."""

    def handle(
        self, connection: HttpConnection, method: bytes, path: bytes, query: bytes, head: Head, body: bytes
    ) -> None:
        """Answer one whole request; `path` as it came, percent signs and all."""
        ...


class Gateway:
    """The data plane of one worker."""

    def __init__(
        self, settings: Settings, access: AccessTable, tokens: RestTokens, control: ControlPlane | None = None
    ) -> None:
        self._control = control
        self._settings = settings
        self._access = access
        self._tokens = tokens
        self._tasks: set[asyncio.Task[None]] = set()
        self._unknown: dict[tuple[str, bytes], float] = {}  # until when (monotonic) a name is known to be unknown
        self._login_failures: dict[str, list[float]] = {}
        base = settings.base_domain.lower().strip(".").encode() if settings.base_domain else b""
        self._host_suffix = b"." + base if base else b""
        self._peers = Peers(settings.control.trusted_proxies)
        self._any_origin = "*" in settings.cors_origins
        self._origins = frozenset(origin.encode() for origin in settings.cors_origins)
        self.draining = False
        self.on_submit: Callable[[Exchange, Backend, bytes], None] | None = None
        """Hears of what goes to Redis; for tracing."""
        self._unknown_series = WORKER.family(None)
        # First segments of paths that are no commands, on the main host and in an instance's own space.
        self._endpoints: dict[bytes, Callable[..., None]] = {
            b"pipeline": self._pipeline,
            b"multi-exec": self._transaction,
            b"subscribe": self._subscribe,
            b"psubscribe": self._psubscribe,
            b"monitor": self._monitor,
        }
        self._reserved: dict[bytes, Callable[[HttpConnection, bytes, bytes, bytes, Head, bytes], None]] = {
            b"health": self._health,
            b"version": self._version if control is None else control.handle,
        }
        self._elsewhere = self._not_built if control is None else control.handle
        self._reserved |= dict.fromkeys(_CONTROL_PLANE, self._elsewhere)
        self._special = frozenset(self._endpoints) | frozenset(self._reserved) | {b"redis", b""}

    # Once per header block

    def prepare(self, head: Head) -> None:
        """Derive from a header block what every request with it needs."""
        head.rendering = JSON
        if head.response_format is not None and head.response_format.lower() == b"resp2":
            head.rendering = RESP2
        if head.encoding is not None and head.encoding.lower() == b"base64" and head.rendering is JSON:
            head.rendering = BASE64
        head.problem = self._format_problem(head)
        if head.origin is not None and (self._any_origin or head.origin in self._origins):
            head.extra = (
                b"Access-Control-Allow-Origin: %b\r\n"
                b"Access-Control-Expose-Headers: Upstash-Sync-Token, Retry-After, X-Request-Id, Traceparent,"
                b" RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset\r\n"
                b"Vary: Origin\r\n" % (b"*" if self._any_origin else head.origin)
            )
        elif self._origins:
            head.extra = b"Vary: Origin\r\n"
        if head.version == b"HTTP/1.0" and head.keep_alive:
            head.extra += b"Connection: keep-alive\r\n"
        if head.traceparent:
            head.extra += b"Traceparent: %b\r\n" % head.traceparent
        if head.request_id:
            head.extra += b"X-Request-Id: %b\r\n" % head.request_id
        self._authorize(head)

    def _authorize(self, head: Head) -> None:
        head.revision = self._access.revision
        head.grant = None
        if head.authorization is not None:
            scheme, _, credential = head.authorization.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                head.grant = self._access.lookup(credential.strip())

    def _label(self, head: Head) -> str | None:
        """The instance that the host names; None on the main host."""
        host = head.host.lower().partition(b":")[0].rstrip(b".")
        if self._host_suffix and host.endswith(self._host_suffix):
            return host[: -len(self._host_suffix)].decode("latin-1")
        return None

    @staticmethod
    def _format_problem(head: Head) -> bytes | None:
        if head.response_format is not None and head.response_format.lower() not in (b"json", b"resp2"):
            return b"ERR unsupported Upstash-Response-Format, expected json or resp2"
        if head.encoding is not None:
            if head.encoding.lower() != b"base64":
                return b"ERR unsupported Upstash-Encoding, expected base64"
            if head.rendering is RESP2:
                return b"ERR Upstash-Encoding: base64 cannot be combined with Upstash-Response-Format: resp2"
        return None

    # Once per request

    def handle(self, connection: HttpConnection, method: bytes, target: bytes, head: Head, body: bytes) -> None:
        """Dispatch one whole request; it is answered through the exchange that is made for it."""
        connection.target = target
        if head.revision != self._access.revision:
            self._authorize(head)
        grant: Grant | None = head.grant
        whole_target = target
        appended: Argv | None = None
        if QUESTION in target:
            target, _, query = target.partition(b"?")
            appended, query_token = split_query(query)
            if query_token is not None and head.authorization is None:
                grant = self._access.lookup(query_token)
        argv = split_path(target)
        if method not in _COMMAND_METHODS:
            self._other_method(connection, method, target, query if appended is not None else b"", head, body)
            return
        # Of which instance, if the address names one; every path is a command there.
        reference: str | None = self._label(head) if self._host_suffix else None
        special = argv[0] in self._special or (len(argv[0]) > 4 and argv[0].startswith(_CONTROL_PLANE_PREFIXES))
        if special and reference is None:
            if argv[0] == b"redis":
                reference = argv[1].decode("utf-8", "replace") if len(argv) > 1 else ""
                argv = argv[2:] or [b""]
                special = argv[0] in self._special
            elif argv[0] in self._reserved or argv[0].startswith(_CONTROL_PLANE_PREFIXES):
                query = query if appended is not None else b""
                self._reserved.get(argv[0], self._elsewhere)(connection, method, target, query, head, body)
                return
            elif argv == [b""] and method not in _BODY_METHODS:
                self._welcome(connection, method, head)
                return
        # Who.
        if (
            grant is None
            or (grant.expires is not None and time.time() >= grant.expires)
            or (reference is not None and not grant.names(reference))
        ):
            grant = self._who(connection, method, whole_target, head, body, reference)
            if grant is None:
                return
        if head.problem is not None and argv[0] not in _STREAMS:
            exchange = Exchange(connection, head, method)
            exchange.rendering = JSON
            exchange.error(400, head.problem)
            return
        WORKER.hits += 1
        # What.
        if special:
            if argv[0] in self._endpoints:
                self._endpoints[argv[0]](connection, method, head, grant, argv, body)
                return
            if argv == [b""]:
                try:
                    argv = self._command_of_body(method, appended, body)
                except BadRequest as error:
                    Exchange(connection, head, method).error(400, str(error).encode())
                    return
                body, appended = b"", None
        if body:
            argv.append(body)
        if appended:
            argv += appended
        self._command(connection, method, head, grant, argv)

    def _who(
        self, connection: HttpConnection, method: bytes, target: bytes, head: Head, body: bytes, reference: str | None
    ) -> Grant | None:
        """What is granted where the header block alone does not tell; None: the request was answered, or waits."""
        credential, in_header = self._credential(target, head)
        found: Grant | Refusal | None = UNAUTHORIZED
        if credential:
            # A session, which counts in the header only, counts under /redis/ only, too.
            by_host = bool(self._host_suffix) and self._label(head) is not None
            found = self._access.resolve(
                credential,
                reference,
                in_header=in_header and not by_host,
                address=lambda: self._peers.client(connection, head),
            )
        if isinstance(found, Grant):
            return found
        exchange = Exchange(connection, head, method)
        if found is not None:
            exchange.error(found.status, found.line, found.headers)
            return None

        self._later(
            connection,
            exchange,
            self._load(exchange, credential, reference),
            lambda: self._instead(exchange, lambda: self._handle_loaded(connection, method, target, head, body)),
        )
        return None

    def _handle_loaded(self, connection: HttpConnection, method: bytes, target: bytes, head: Head, body: bytes) -> None:
        """Dispatch a request again whose credential was asked for, which is no hit."""
        hits = WORKER.hits
        self.handle(connection, method, target, head, body)
        WORKER.hits = hits

    @staticmethod
    def _instead(exchange: Exchange, again: Callable[[], None]) -> None:
        """Let what comes of a request now take the place of the exchange that waited for it."""
        if exchange.connection is not None:
            exchange.connection.exchanges.remove(exchange)
            exchange.connection.trace = exchange.trace
            again()
            exchange.connection.trace = None

    async def _load(self, exchange: Exchange, credential: bytes, reference: str | None) -> None:
        assert self._access.source is not None
        WORKER.loads += 1
        refusal = await self._access.source.load(credential, reference)
        if refusal is not None:
            exchange.error(refusal.status, refusal.line, refusal.headers)

    def trusts(self, connection: HttpConnection, target: bytes, head: Head) -> bool:
        """Whether a request has a credential that is known here, or comes from a trusted proxy."""
        credential, _ = self._credential(target, head)
        if credential and self._access.lookup(credential) is not None:
            return True
        return self._peers.trusts(connection)

    @staticmethod
    def _credential(target: bytes, head: Head) -> tuple[bytes, bool]:
        """The credential of a request, or nothing, and whether it stood in the header."""
        if head.authorization is not None:
            scheme, _, credential = head.authorization.strip().partition(b" ")
            return (credential.strip() if scheme.lower() == b"bearer" else b""), True
        query = target.partition(b"?")[2]
        return (split_query(query)[1] or b"") if query else b"", False

    @staticmethod
    def _command_of_body(method: bytes, appended: Argv | None, body: bytes) -> Argv:
        if method not in _BODY_METHODS:
            raise BadRequest("ERR empty command")
        if appended:
            raise BadRequest("ERR query parameters belong to the path form of a command")
        argv = parse_command(body)
        if not argv:
            raise BadRequest("ERR empty command")
        return argv

    def _command(self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, argv: Argv) -> None:
        exchange = Exchange(connection, head, method)
        exchange.route = COMMAND
        exchange.instance = grant.instance.counters
        rule = grant.policy.rule(argv[0])
        series = self._unknown_series if rule is None else rule.series
        exchange.series = series
        limiter = grant.limiter
        if limiter is not None:
            exchange.meter(limiter)
            refusal = limiter.admit(argv)
            if refusal is not None:
                self._refuse(exchange, refusal, lambda: self._command(connection, method, head, grant, argv))
                return
            if limiter.cell is not None and limiter.cell.address is None:
                limiter.cell.address = self._peers.client(connection, head)
        if grant.instance.over_capacity and rule is not None and rule.refusal is None:
            if grant.instance.needs_memory(argv):
                WORKER.refused("memory")
                exchange.error(400, OVER_CAPACITY)
                return
        series.commands += 1
        if rule is not None and rule.plain:
            self._submit(connection, exchange, encode_command(argv), grant.backend, rule.slow)
        elif rule is not None and rule.refusal is not None:
            exchange.error(400, rule.refusal)
        elif rule is not None and not rule.script and not rule.resttoken:
            verdict = rule.check(argv)
            if verdict.refusal is not None:
                exchange.error(400, verdict.refusal)
            elif verdict.local is not None:
                exchange.reply(verdict.local, 0)
            else:
                self._submit(connection, exchange, encode_command(argv), grant.backend, verdict.slow)
        elif rule is not None and rule.resttoken and len(argv) > 1 and argv[1].upper() == b"RESTTOKEN":
            verdict = rule.check(argv)
            if verdict.refusal is not None:
                exchange.error(400, verdict.refusal)
            else:
                self._later(connection, exchange, self._rest_token(exchange, grant, argv), lambda: None)
        else:
            self._prepared(
                connection,
                exchange,
                grant,
                [argv],
                lambda checked: self._send_single(connection, exchange, grant, checked),
            )

    def _send_single(self, connection: HttpConnection, exchange: Exchange, grant: Grant, checked: "Checked") -> None:
        outcome = checked.outcomes[0]
        if isinstance(outcome, bytes):
            exchange.reply(outcome, 0)
        else:
            self._submit(connection, exchange, encode_command(outcome), grant.backend, checked.slow)

    def _submit(
        self, connection: HttpConnection, exchange: Exchange, payload: bytes, backend: Backend, slow: bool
    ) -> None:
        pool = backend.pool
        if exchange.instance is not None:
            exchange.instance.bytes_in += len(payload)
        if self.on_submit is not None:
            self.on_submit(exchange, backend, payload)
        if len(connection.exchanges) > 1 and (slow or connection.route is None or pool.shared is not connection.route):
            # Requests that a client pipelines run in their order, so they go one way or one at a time.
            connection.hold(lambda: self._submit_alone(connection, exchange, payload, backend, slow))
            return
        try:
            connection.route = pool.submit(payload, exchange, slow)
        except Unavailable as error:
            exchange.failed(error)

    def _submit_alone(
        self, connection: HttpConnection, exchange: Exchange, payload: bytes, backend: Backend, slow: bool
    ) -> None:
        try:
            connection.route = backend.pool.submit(payload, exchange, slow)
        except Unavailable as error:
            exchange.failed(error)

    def _refuse(self, exchange: Exchange, refusal: LimitRefusal, again: Callable[[], None]) -> None:
        """Say that a limit refuses a request; where that is not decided yet, call `again` for it once it is."""
        connection = exchange.connection
        if refusal.wait is not None and connection is not None:
            self._later(connection, exchange, refusal.wait(), lambda: self._instead(exchange, again))
            return
        WORKER.refused(refusal.kind)
        retry_after = b"Retry-After: %d\r\n" % refusal.retry_after if refusal.retry_after else b""
        exchange.error(refusal.status, refusal.line, retry_after)

    # Several commands

    def _pipeline(
        self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, segments: Argv, body: bytes
    ) -> None:
        if len(segments) > 1:
            self._command(connection, method, head, grant, [*segments, body] if body else segments)
            return
        exchange = PipelineExchange(connection, head, method)
        exchange.instance = grant.instance.counters
        if grant.limiter is not None:
            exchange.meter(grant.limiter)
        commands = self._commands(
            exchange, method, grant, body, lambda: self._pipeline(connection, method, head, grant, segments, body)
        )
        if commands is None:
            return
        if not commands:
            exchange.respond(200, exchange.rendering.pipeline(b"", 0, 0, {})[1], exchange.rendering.content_type)
            return
        self._prepared(
            connection,
            exchange,
            grant,
            commands,
            lambda checked: self._send_pipeline(connection, exchange, grant, checked),
        )

    def _send_pipeline(
        self, connection: HttpConnection, exchange: PipelineExchange, grant: Grant, checked: "Checked"
    ) -> None:
        outcomes = checked.outcomes
        commands = [outcome for outcome in outcomes if not isinstance(outcome, bytes)]
        if len(commands) != len(outcomes):
            exchange.inserts = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, bytes)}
        exchange.count = len(commands)
        if not commands:
            exchange.reply(b"", 0)
            return
        payload = b"".join([encode_command(argv) for argv in commands])
        slow = checked.slow or len(commands) > LONG_PIPELINE_COMMANDS
        self._submit(connection, exchange, payload, grant.backend, slow)

    def _transaction(
        self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, segments: Argv, body: bytes
    ) -> None:
        if len(segments) > 1:
            self._command(connection, method, head, grant, [*segments, body] if body else segments)
            return
        exchange = TransactionExchange(connection, head, method)
        exchange.instance = grant.instance.counters
        if grant.limiter is not None:
            exchange.meter(grant.limiter)
        commands = self._commands(
            exchange, method, grant, body, lambda: self._transaction(connection, method, head, grant, segments, body)
        )
        if commands is None:
            return
        if not commands:
            exchange.respond(200, b"[]", exchange.rendering.content_type)
            return
        self._prepared(
            connection,
            exchange,
            grant,
            commands,
            lambda checked: self._send_transaction(connection, exchange, grant, checked),
        )

    def _send_transaction(
        self, connection: HttpConnection, exchange: TransactionExchange, grant: Grant, checked: "Checked"
    ) -> None:
        pool = grant.backend.pool
        if pool.transactions is None:
            self._later(
                connection,
                exchange,
                self._learn_transactions(grant.backend),
                lambda: self._send_transaction(connection, exchange, grant, checked),
            )
            return
        if not pool.transactions:
            exchange.error(400, b"NOPERM this user has no permissions to run the 'multi' command")
            return
        commands: list[Argv] = [[b"MULTI"]]
        for outcome in checked.outcomes:
            if not isinstance(outcome, bytes):
                commands.append(outcome)
            elif outcome[:1] == b"-":
                # One forbidden command discards the transaction; nothing of it is sent.
                exchange.error(400, outcome[1:-2])
                return
            else:
                # Answered without Redis; ECHO keeps its place among the replies of EXEC.
                commands.append([b"ECHO", outcome[1:-2] if outcome[:1] == b"+" else outcome.split(b"\r\n")[1]])
        commands.append([b"EXEC"])
        exchange.count = len(commands)
        payload = b"".join([encode_command(argv) for argv in commands])
        slow = checked.slow or len(checked.outcomes) > LONG_PIPELINE_COMMANDS
        self._submit(connection, exchange, payload, grant.backend, slow)

    @staticmethod
    async def _learn_transactions(backend: Backend) -> None:
        await backend.pool.transactions_permitted()
        if backend.pool.transactions is None:
            raise Unavailable("the connection to the instance was lost before the transaction was sent")

    def _commands(
        self, exchange: Exchange, method: bytes, grant: Grant, body: bytes, again: Callable[[], None]
    ) -> list[Argv] | None:
        """The commands of a body, counted against the limits; None if the request was answered with an error."""
        if method not in _BODY_METHODS:
            exchange.error(405, b"ERR method not allowed, use POST", b"Allow: POST, PUT\r\n")
            return None
        try:
            commands = parse_commands(body)
            if len(commands) > MAX_PIPELINE_COMMANDS:
                raise BadRequest(f"ERR more than {MAX_PIPELINE_COMMANDS} commands in one request")
        except BadRequest as error:
            exchange.error(400, str(error).encode())
            return None
        if grant.limiter is not None and commands:
            refusal = grant.limiter.admit_all(commands)
            if refusal is not None:
                self._refuse(exchange, refusal, again)
                return None
        return commands

    # What may have to be found out first

    def _prepared(
        self,
        connection: HttpConnection,
        exchange: Exchange,
        grant: Grant,
        commands: list[Argv],
        send: Callable[["Checked"], None],
    ) -> None:
        """Check the commands and call `send`, at once unless the server has to be asked something first."""
        checked = Checked(grant)
        checked.counts = exchange.series is None  # a single command is counted already
        if checked.check(commands, self._is_unknown):
            send(checked)
        else:
            self._later(connection, exchange, self._find_out(exchange, grant, commands, checked), lambda: send(checked))

    async def _find_out(self, exchange: Exchange, grant: Grant, commands: list[Argv], checked: "Checked") -> None:
        instance, pool = grant.instance, grant.backend.pool
        await self._learn(exchange, grant, commands)
        for index, argv in enumerate(commands):
            rule = grant.policy.rule(argv[0])
            if exchange.gone:
                return
            if rule is not None and rule.script and rule.refusal is None and rule.check(argv).refusal is None:
                if instance.scripts.unsettled(argv):
                    checked.prepared[index] = await instance.scripts.prepare(
                        argv, instance.backend.pool.call, pool.call
                    )
        checked.check(commands, lambda instance_id, name: True)

    async def _learn(self, exchange: Exchange, grant: Grant, commands: list[Argv]) -> None:
        """Ask the server for the names that the table does not know, many at a time."""
        instance = grant.instance
        names = dict.fromkeys(
            argv[0]
            for argv in commands
            if grant.policy.rule(argv[0]) is None and not self._is_unknown(instance.id, argv[0])
        )
        # What a request has beyond the bound is unknown unasked: no server has as many commands.
        asked = list(names)[:MAX_UNKNOWN_NAMES]
        for at in range(0, len(asked), NAMES_AT_ONCE):
            if exchange.gone:
                return
            some = asked[at : at + NAMES_AT_ONCE]
            reply = await grant.backend.pool.call(b"COMMAND", b"INFO", *some)
            entries = reply if isinstance(reply, list) and len(reply) == len(some) else [None] * len(some)
            for name, entry in zip(some, entries, strict=True):
                if entry is None or instance.table.learn(entry) is None or grant.policy.rule(name) is None:
                    while len(self._unknown) >= MAX_UNKNOWN_NAMES:
                        del self._unknown[next(iter(self._unknown))]
                    self._unknown[instance.id, name] = time.monotonic() + UNKNOWN_NAME_SECONDS

    def _is_unknown(self, instance_id: str, name: bytes) -> bool:
        until = self._unknown.get((instance_id, name))
        return until is not None and until > time.monotonic()

    def _later(
        self,
        connection: HttpConnection,
        exchange: Exchange,
        work: Coroutine[Any, Any, None],
        then: Callable[[], None],
    ) -> None:
        """Do `work`, then call `then` when the requests before this one are answered; take no others meanwhile."""
        connection.hold(lambda: None, -1)

        async def run() -> None:
            try:
                await work
            except RespError as error:
                # Whatever was asked on the way, the client's own command was not sent.
                exchange.failed(error if isinstance(error, Unavailable) else Unavailable(str(error)))
            except Exception as error:
                exchange.bug(error)
            if exchange.gone:
                connection.release()
            elif len(connection.exchanges) <= 1:
                connection.release()
                self._guarded(exchange, then)
            else:
                connection.hold(lambda: self._guarded(exchange, then))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _guarded(exchange: Exchange, then: Callable[[], None]) -> None:
        try:
            then()
        except Exception as error:
            exchange.bug(error)

    # ACL RESTTOKEN

    async def _rest_token(self, exchange: Exchange, grant: Grant, argv: Argv) -> None:
        instance = grant.instance
        if not grant.full:
            # The new token would have none of the limits of the one that asks for it.
            exchange.error(400, b"NOPERM this user has no permissions to run the 'acl|resttoken' command")
            return
        now = time.monotonic()
        failures = [at for at in self._login_failures.get(instance.id, ()) if now - at < LOGIN_FAILURE_SECONDS]
        self._login_failures[instance.id] = failures
        if len(failures) >= MAX_LOGIN_FAILURES:
            wait = max(1, int(LOGIN_FAILURE_SECONDS - (now - failures[0])) + 1)
            exchange.error(429, b"ERR too many failed logins, try again in %d s" % wait, b"Retry-After: %d\r\n" % wait)
            return
        try:
            user, password = argv[2].decode(), argv[3].decode()
        except UnicodeDecodeError:
            exchange.error(400, b"ERR the user and the password must be UTF-8")
            return
        failures.append(now)  # while it is tried, it counts as failed: attempts at once are throttled too
        try:
            accepted = await self._logs_in(instance, user, password)
            any_password = accepted and await self._logs_in(instance, user, secrets.token_hex(16))
        except ConnectFailed:
            failures.remove(now)
            raise
        name = argv[2].replace(b"\r", b"").replace(b"\n", b"")
        if not accepted:
            exchange.error(400, b'ERR Wrong password or user "%b" does not exist' % name)
            return
        failures.remove(now)
        if any_password:
            exchange.error(400, b'ERR user "%b" has no password of its own, so a token would prove nothing' % name)
            return
        token = self._tokens.make(instance.id, user, password)
        exchange.reply(b"$%d\r\n%b\r\n" % (len(token), token), 0)

    @staticmethod
    async def _logs_in(instance: Instance, user: str, password: str) -> bool:
        """Whether the server accepts this pair, tried on a private connection."""
        address = instance.config.address.with_login(user, password)
        try:
            private = await connect(address, timeout=instance.config.connect_timeout)
        except ConnectFailed as error:
            if "AUTH was refused" in error.detail:
                return False
            raise
        private.close(ReplyLost("done"))
        return True

    # Streams

    def _subscribe(
        self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, segments: Argv, body: bytes
    ) -> None:
        self._stream(connection, method, head, grant, segments, pattern=False)

    def _psubscribe(
        self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, segments: Argv, body: bytes
    ) -> None:
        self._stream(connection, method, head, grant, segments, pattern=True)

    def _stream(
        self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, segments: Argv, *, pattern: bool
    ) -> None:
        exchange = SubscriptionStream(connection, head, method, self._settings.limits.max_client_buffer_bytes)
        if len(segments) < 2:
            exchange.error(400, b"ERR wrong number of arguments for '%b' command" % segments[0])
            return
        refusal = grant.policy.stream_refusal(segments[0])
        if refusal is not None:
            exchange.error(400, refusal)
            return
        limit = grant.limiter.admit(segments) if grant.limiter is not None else None
        if limit is not None:
            self._refuse(
                exchange, limit, lambda: self._stream(connection, method, head, grant, segments, pattern=pattern)
            )
            return
        exchange.grant = grant
        exchange.instance = grant.instance.counters
        exchange.begin(grant.backend.subscriptions, segments[1:], pattern=pattern)

    def _monitor(
        self, connection: HttpConnection, method: bytes, head: Head, grant: Grant, segments: Argv, body: bytes
    ) -> None:
        exchange = MonitorStream(connection, head, method, self._settings.limits.max_client_buffer_bytes)
        if len(segments) > 1:
            exchange.error(400, b"ERR wrong number of arguments for 'monitor' command")
            return
        refusal = grant.policy.stream_refusal(b"monitor")
        if refusal is not None:
            exchange.error(400, refusal)
            return
        limit = grant.limiter.admit(segments) if grant.limiter is not None else None
        if limit is not None:
            self._refuse(exchange, limit, lambda: self._monitor(connection, method, head, grant, segments, body))
            return
        exchange.grant = grant
        exchange.instance = grant.instance.counters
        exchange.begin(grant.backend.monitor)

    # What is no command

    def _other_method(
        self, connection: HttpConnection, method: bytes, path: bytes, query: bytes, head: Head, body: bytes
    ) -> None:
        """What no command is sent by; the control plane's resources have more methods."""
        ours = (
            self._control is not None
            and split_path(path)[0] in self._reserved
            and (not self._host_suffix or self._label(head) is None)
        )
        if method == b"OPTIONS":
            self._preflight(
                connection, head, b"GET, HEAD, POST, PUT, PATCH, DELETE" if ours else b"GET, HEAD, POST, PUT"
            )
        elif ours:
            self._reserved[split_path(path)[0]](connection, method, path, query, head, body)
        else:
            Exchange(connection, head, method).error(405, b"ERR method not allowed", ALLOW)

    def _preflight(self, connection: HttpConnection, head: Head, methods: bytes) -> None:
        exchange = Exchange(connection, head, b"OPTIONS")
        if not head.preflight or head.origin is None or b"Access-Control-Allow-Origin" not in head.extra:
            exchange.error(405, b"ERR method not allowed", ALLOW)
            return
        exchange.respond_without_content(
            b"Access-Control-Allow-Methods: %b\r\n"
            b"Access-Control-Allow-Headers: Authorization, Cache-Control, Content-Type, Upstash-Encoding,"
            b" Upstash-Response-Format, Upstash-Sync-Token, Upstash-Telemetry-Sdk, Upstash-Telemetry-Platform,"
            b" Upstash-Telemetry-Runtime, X-Request-Id, Traceparent, Tracestate\r\n"
            b"Access-Control-Max-Age: %b\r\n" % (methods, _CORS_MAX_AGE),
        )

    def _welcome(self, connection: HttpConnection, method: bytes, head: Head) -> None:
        if self._control is not None and any(
            name == b"accept" and b"text/html" in value for name, value in header_fields(head)
        ):
            self._control.handle(connection, method, b"/", b"", head, b"")  # a person with a browser
            return
        Exchange(connection, head, method).respond(
            200,
            b'{"name":"RedisGate","version":%b,"message":"Redis over HTTP. Send commands to this address with an'
            b' Authorization: Bearer header, for example GET /ping."}\n' % quote(redisgate.__version__.encode()),
            b"application/json",
        )

    def _health(
        self, connection: HttpConnection, method: bytes, path: bytes, query: bytes, head: Head, body: bytes
    ) -> None:
        if self.draining and path == b"/health/ready":
            Exchange(connection, head, method).respond(503, b'{"status":"draining"}', b"application/json", RETRY_AFTER)
        elif self._control is not None:
            self._control.handle(connection, method, path, query, head, body)
        elif path in (b"/health", b"/health/", b"/health/live", b"/health/ready"):
            Exchange(connection, head, method).respond(200, b'{"status":"ok"}', b"application/json")
        else:
            Exchange(connection, head, method).error(404, b"ERR no such page")

    def _version(
        self, connection: HttpConnection, method: bytes, path: bytes, query: bytes, head: Head, body: bytes
    ) -> None:
        answer = b'{"name":"RedisGate","version":%b}' % quote(redisgate.__version__.encode())
        Exchange(connection, head, method).respond(200, answer, b"application/json")

    def _not_built(
        self, connection: HttpConnection, method: bytes, path: bytes, query: bytes, head: Head, body: bytes
    ) -> None:
        Exchange(connection, head, method).error(
            404, b"ERR this path is reserved for the control plane, which this gateway does not have"
        )


class Checked:
    """A list of commands after the policy: each a command to send, or the frame it is answered with."""

    __slots__ = ("_counted", "_grant", "counts", "outcomes", "prepared", "slow")

    def __init__(self, grant: Grant) -> None:
        self._grant = grant
        self.outcomes: list[Argv | bytes] = []
        self.prepared: dict[int, Argv | bytes] = {}  # outcomes found out by asking the server
        self.slow = False
        self.counts = True  # the commands are to be counted by family
        self._counted = 0  # of them have been

    def check(self, commands: list[Argv], is_unknown: Callable[[str, bytes], bool]) -> bool:
        """Decide each command. False: the server has to be asked something first; call again afterwards."""
        grant = self._grant
        rule_of = grant.policy.rule
        over_capacity = grant.instance.over_capacity
        outcomes: list[Argv | bytes] = []
        slow = False
        counted = self._counted if self.counts else len(commands)
        for index, argv in enumerate(commands):
            rule = rule_of(argv[0])
            if rule is None:
                if not is_unknown(grant.instance.id, argv[0]):
                    return False
                if index >= counted:
                    self._count(WORKER.family(None), index, refused=True)
                outcomes.append(unknown_command(argv))
                continue
            if index >= counted:
                self._count(rule.series, index, refused=rule.refusal is not None)
            if over_capacity and rule.refusal is None and grant.instance.needs_memory(argv):
                outcomes.append(b"-%b\r\n" % OVER_CAPACITY)
            elif rule.plain:
                slow = slow or rule.slow
                outcomes.append(argv)
            else:
                outcome = self._one(rule, argv, index)
                if outcome is None:
                    return False
                outcomes.append(outcome)
        self.outcomes = outcomes
        self.slow = self.slow or slow
        return True

    def _count(self, series: Series, index: int, *, refused: bool) -> None:
        self._counted = index + 1
        series.commands += 1
        if refused:
            series.errors += 1

    def _one(self, rule: Rule, argv: Argv, index: int) -> Argv | bytes | None:
        if rule.refusal is not None:
            return b"-%b\r\n" % rule.refusal
        verdict = rule.check(argv)
        if verdict.refusal is not None:
            return b"-%b\r\n" % verdict.refusal
        if verdict.local is not None:
            return verdict.local
        self.slow = self.slow or verdict.slow
        if index in self.prepared:
            return self.prepared[index]
        if rule.resttoken and len(argv) > 1 and argv[1].upper() == b"RESTTOKEN":
            return b"-ERR ACL RESTTOKEN is available as a single command only\r\n"
        if rule.script:
            scripts = self._grant.instance.scripts
            if scripts.unsettled(argv):
                return None
            return scripts.rewrite(argv)
        return argv


def unknown_command(argv: Argv) -> bytes:
    """The frame that Redis 7 answers an unknown command with."""
    line = b"ERR unknown command '%b', with args beginning with: " % argv[0][:128]
    for argument in argv[1:]:
        if len(line) >= 384:
            break
        line += b"'%b' " % argument[:128]
    return b"-%b\r\n" % line.replace(b"\r", b" ").replace(b"\n", b" ")
