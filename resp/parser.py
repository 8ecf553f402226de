"""Whole frames to Python objects, by hiredis.

hiredis gives up on the stream at 1,025 levels of nesting, takes push frames,
and cannot tell `+OK` from a bulk `OK`. So it never sees the stream: it gets
whole replies whose end and depth the scanner has found.
"""

from collections.abc import Callable
from typing import Any, cast

import hiredis

from resp.errors import ProtocolError

MAX_PARSED_DEPTH = 1024
"""Levels of nesting that hiredis can take."""


_INCOMPLETE = object()


class ErrorReply(str):
    """An error reply's line without the leading `-`, as text. A value, not an exception."""

    __slots__ = ()


# hiredis is typed for exceptions only, but takes whatever this returns.
as_value = cast(Callable[[str], Exception], ErrorReply)


class Parser:
    """Turns runs of whole replies into objects.

    Bulk and simple strings become `str` (invalid UTF-8 as U+FFFD) with
    `text=True`, else `bytes`; integers `int`; nil `None`; arrays `list`;
    errors `ErrorReply`.
    """

    __slots__ = ("_reader", "_text")

    def __init__(self, *, text: bool) -> None:
        self._text = text
        self._reset()

    def _reset(self) -> None:
        if self._text:
            self._reader = hiredis.Reader(
                encoding="utf-8", errors="replace", replyError=as_value, notEnoughData=_INCOMPLETE
            )
        else:
            self._reader = hiredis.Reader(replyError=as_value, notEnoughData=_INCOMPLETE)

    def parse(self, frames: bytes, count: int = 1) -> list[Any]:
        """The `count` replies that `frames` holds exactly; nested at most `MAX_PARSED_DEPTH` levels.

        Raises:
            ProtocolError: hiredis and the scanner disagree.
        """
        gets = self._reader.gets
        try:
            self._reader.feed(frames)
            replies = [gets() for _ in range(count)]
        except hiredis.ProtocolError as error:
            self._reset()  # hiredis never recovers; the next reply needs a reader without history
            raise ProtocolError(str(error)) from error
        if (replies and replies[-1] is _INCOMPLETE) or self._reader.has_data():
            self._reset()
            raise ProtocolError("the replies do not end where they should")
        return replies
