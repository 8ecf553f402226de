"""Mail to people: invitations and password resets.

How it is delivered is a setting: `mailer = "module:function"` names an async function that takes a `Message`; the
built-in one is `log`. Delivery happens behind the request, so that no answer tells by its time whether a mail was
sent. A mail that cannot be delivered is logged, without its text.
"""

import asyncio
import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from redisgate.config import ConfigError, Settings

MAX_WAITING: Final = 1000
"""Mails of one process that wait for delivery; more are dropped and logged."""
DELIVERY_SECONDS: Final = 30.0
"""For one mail."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """A mail; its text may carry a secret link."""

    to: str
    subject: str
    text: str = field(repr=False)


Deliver = Callable[[Message], Awaitable[None]]


class Mailer:
    """Hands messages to a delivery function, one after the other."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._waiting: asyncio.Queue[Message] = asyncio.Queue(MAX_WAITING)
        self._task: asyncio.Task[None] | None = None

    def post(self, message: Message) -> None:
        """Deliver a message later. Never waits, never raises."""
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            log.error("a mail to %s was dropped: %d wait for delivery", message.to, MAX_WAITING)
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="mailer")

    async def flush(self) -> None:
        """Wait until nothing waits for delivery."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while not self._waiting.empty():
            message = self._waiting.get_nowait()
            try:
                async with asyncio.timeout(DELIVERY_SECONDS):
                    await self._deliver(message)
            except Exception as error:
                log.error("a mail to %s (%s) was not delivered: %r", message.to, message.subject, error)


async def _log_with_text(message: Message) -> None:
    log.warning("mail to %s: %s\n%s", message.to, message.subject, message.text)  # `redisgate dev` shows no less


async def _log_without_text(message: Message) -> None:
    log.warning(
        "a mail to %s (%s) was not sent: no mailer is configured, and its link is too secret for a production log;"
        " set REDISGATE_MAILER",
        message.to,
        message.subject,
    )


def make_mailer(settings: Settings) -> Mailer:
    """The mailer that the settings name. `log` shows the text, with its link, in dev mode only.

    Raises:
        ConfigError: there is no such function.
    """
    name = settings.control.mailer
    if name == "log":
        return Mailer(_log_with_text if settings.control.mode == "dev" else _log_without_text)
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ConfigError(f"REDISGATE_MAILER: expected log or module:function, not {name!r}")
        deliver = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"REDISGATE_MAILER: {name} cannot be imported: {error}") from error
    if not inspect.iscoroutinefunction(deliver):
        raise ConfigError(f"REDISGATE_MAILER: {name} is no async function")
    return Mailer(deliver)
