"""Live streams for people: MONITOR and subscriptions as Server-Sent Events, filtered and bounded.

A reader hears at most `MAX_EVENTS_A_SECOND`; what does not fit in the buffer meanwhile is counted, and that is said.
Whether the person may still watch is asked again every few seconds, and the stream ends with the right to it.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from control import http
from control.console import ConsoleSession, bulk, open_session
from control.database import DatabaseAway
from control.http import ApiError, ApiRequest, BadRequest, Forbidden, TooManyRequests, Unavailable
from redisgate.access import Instance
from resp.errors import RespError
from resp.subscriptions import Message

MAX_STREAMS_PER_PERSON: Final = 6
"""In one worker; a person with more closes one first."""
MAX_WAITING_EVENTS: Final = 500
"""For one reader; then the oldest give way, and it is told how many."""
SEND_SECONDS: Final = 0.1
"""Between two writes to a reader, so that many events make one."""
MAX_EVENTS_A_SECOND: Final = 1000
"""To one reader."""
MAX_EVENT_BYTES: Final = 2048
"""Of one line or message; the rest is cut off."""
MAX_CHANNELS: Final = 20
"""In one stream."""
CHECK_SECONDS: Final = 5.0
"""Between two looks whether the person may still watch, each with a sign of life to the reader."""
CONFIRM_SECONDS: Final = 5.0
"""For Redis to confirm."""


class Reader:
    """What is on its way to one person; see `resp.subscriptions.Subscriber`."""

    def __init__(self, wanted: Callable[[Message], bool]) -> None:
        self._wanted = wanted
        self._events: deque[dict[str, Any]] = deque()
        self._skipped = 0
        self.wake = asyncio.Event()
        self.confirmed = 0
        self.ended: str | None = None

    def subscribed(self, channel: bytes, pattern: bool) -> None:
        """Redis has confirmed."""
        self.confirmed += 1
        self.wake.set()

    def deliver(self, message: Message) -> None:
        """Keep a message, if it is wanted."""
        if not self._wanted(message):
            return
        if len(self._events) >= MAX_WAITING_EVENTS:
            self._events.popleft()
            self._skipped += 1
        event: dict[str, Any] = {"value": bulk(message.payload[:MAX_EVENT_BYTES])}
        if len(message.payload) > MAX_EVENT_BYTES:
            event["size"] = len(message.payload)
        if message.channel:
            event["channel"] = bulk(message.channel)
            event["at"] = time.time()
        if message.pattern is not None:
            event["pattern"] = bulk(message.pattern)
        self._events.append(event)
        self.wake.set()

    def lost(self, error: RespError) -> None:
        """Nothing more will come."""
        self.ended = str(error)
        self.wake.set()

    def take(self) -> bytes:
        """What is to be sent now."""
        parts: list[bytes] = []
        if self._skipped:
            parts.append(event_of("skipped", {"count": self._skipped}))
            self._skipped = 0
        for _ in range(min(len(self._events), int(MAX_EVENTS_A_SECOND * SEND_SECONDS))):
            parts.append(event_of("", self._events.popleft()))
        if not self._events:
            self.wake.clear()
        return b"".join(parts)


def event_of(kind: str, data: object) -> bytes:
    """One event; JSON has no line ends of its own."""
    name = f"event: {kind}\n" if kind else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


class EventStream(Response):
    """A response that goes on until either side has had enough."""

    media_type = "text/event-stream"

    def __init__(self, request: ApiRequest, instance: Instance, reader: Reader, leave: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._instance = instance
        self._reader = reader
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = self._reader
        if scope["method"] == "HEAD":
            reader.ended = ""
        gone = asyncio.ensure_future(_left(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _piece(send, event_of("ready", {}))
            checked = time.monotonic()
            while reader.ended is None and not gone.done():
                due = checked + CHECK_SECONDS - time.monotonic()
                if due <= 0:
                    reader.ended = await self._no_longer()
                    checked = time.monotonic()
                    await _piece(send, b": \n\n")
                    continue
                waking = asyncio.ensure_future(reader.wake.wait())
                await asyncio.wait((waking, gone), timeout=due, return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                events = reader.take()
                if events:
                    await _piece(send, events)
                    await asyncio.wait((gone,), timeout=SEND_SECONDS)
            if reader.ended is not None:
                await _piece(send, event_of("ended", {"reason": reader.ended}))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # the client has left
        finally:
            gone.cancel()
            self._leave()

    async def _no_longer(self) -> str | None:
        """Why the person may not watch any more; None: they may."""
        try:
            await http.admit(self._request)
            async with open_session(
                self._request, write=self._request.endpoint.permission == "console.write", wait=False
            ) as session:
                if session.instance is not self._instance:
                    return "the instance was changed; connect again"
        except (Unavailable, DatabaseAway):
            return None  # it cannot be told now; what was allowed goes on
        except ApiError as error:
            return error.message
        return None


async def _left(receive: Receive) -> None:
    """Until the client has left, or the gateway wants to stop."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _piece(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


class _Places:
    """How many streams each person has in this worker."""

    def __init__(self, request: ApiRequest) -> None:
        self._counts: dict[UUID, int] = request.context.extra.setdefault("console streams", {})
        self._person = request.user_id
        if self._counts.get(self._person, 0) >= MAX_STREAMS_PER_PERSON:
            raise TooManyRequests(f"{MAX_STREAMS_PER_PERSON} of your streams are open; close one first", 1)
        self._counts[self._person] = self._counts.get(self._person, 0) + 1

    def leave(self) -> None:
        """Give it back."""
        self._counts[self._person] -= 1
        if not self._counts[self._person]:
            del self._counts[self._person]


async def watch(request: ApiRequest, session: ConsoleSession, contains: str) -> Response:
    """Every command that the instance runs, as far as its line contains a text. Raises ApiError."""
    _permit(session, b"monitor")
    hub, needle = session.instance.backend.monitor, contains.lower().encode()
    reader = Reader(lambda message: not needle or needle in message.payload.lower())
    return await _opened(request, session, reader, lambda: hub.watch(reader), lambda: hub.leave(reader), 1)


async def subscribe(
    request: ApiRequest, session: ConsoleSession, channels: list[bytes], patterns: list[bytes], contains: str
) -> Response:
    """What is published on channels and on those that match patterns. Raises ApiError."""
    channels, patterns = list(dict.fromkeys(channels)), list(dict.fromkeys(patterns))
    if not 0 < len(channels) + len(patterns) <= MAX_CHANNELS:
        raise BadRequest(f"name 1 to {MAX_CHANNELS} channels or patterns")
    _permit(session, b"subscribe" if channels else b"psubscribe")
    hub, needle = session.instance.backend.subscriptions, contains.lower().encode()
    reader = Reader(lambda message: not needle or needle in message.payload.lower())

    def begin() -> None:
        if channels:
            hub.subscribe(reader, channels, pattern=False)
        if patterns:
            hub.subscribe(reader, patterns, pattern=True)

    def leave() -> None:
        hub.unsubscribe(reader, channels, pattern=False)
        hub.unsubscribe(reader, patterns, pattern=True)

    return await _opened(request, session, reader, begin, leave, len(channels) + len(patterns))


def _permit(session: ConsoleSession, command: bytes) -> None:
    from control.console import READER, WRITER

    refusal = session.instance.policy(WRITER if session.may_write else READER).stream_refusal(command)
    if refusal is not None:
        raise Forbidden(refusal.decode())


async def _opened(
    request: ApiRequest,
    session: ConsoleSession,
    reader: Reader,
    begin: Callable[[], None],
    leave: Callable[[], None],
    confirmations: int,
) -> Response:
    """The stream, once Redis has confirmed."""
    places = _Places(request)
    left = False

    def leave_once() -> None:
        nonlocal left
        if not left:
            left = True
            places.leave()
            leave()

    try:
        begin()
        async with asyncio.timeout(CONFIRM_SECONDS):
            while reader.ended is None and reader.confirmed < confirmations:
                await reader.wake.wait()
                reader.wake.clear()
        if reader.ended is not None:
            raise Unavailable(reader.ended)
    except TimeoutError:
        leave_once()
        raise Unavailable(f"Redis did not confirm within {CONFIRM_SECONDS:g} s; try again") from None
    except BaseException:
        leave_once()
        raise
    reader.wake.set()
    return EventStream(request, session.instance, reader, leave_once)
