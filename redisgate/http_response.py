"""The heads of HTTP/1.1 responses, in pieces that are made rarely and joined often."""

import email.utils
from http import HTTPStatus
from typing import Final

_TOKENS: Final = [b"%03x\r\n" % number for number in range(4096)]
_LENGTHS: Final = [b"Content-Length: %d\r\n\r\n" % size for size in range(4096)]


class ResponseHeads:
    """What responses begin with.

    A response is the lines for its status and content type, `next_token()`, further header lines, `length_line(n)`,
    body.
    """

    __slots__ = ("_date", "_lines", "_process", "_remember", "_renewals", "_sync_token", "_tokens", "ok_lines")

    def __init__(self, process: bytes, *, remember: bool = True) -> None:
        """`process` distinguishes this process in sync tokens; letters and digits. `remember`: use `ok_lines`."""
        self._remember = remember
        self._process = process
        self._renewals = 0
        self._lines: dict[tuple[int, bytes], bytes] = {}
        self.ok_lines: dict[bytes, bytes] = {}
        """For status 200, by content type; what is not there is made by `lines`."""
        self.renew()

    def renew(self) -> None:
        """Take the date of now; call once a second."""
        self._renewals += 1
        self._tokens = iter(_TOKENS)
        self._lines.clear()
        self.ok_lines.clear()
        self._date = email.utils.formatdate(usegmt=True).encode()
        self._sync_token = b"%b%08x" % (self._process, self._renewals)

    def next_token(self) -> bytes:
        """The part of a sync token that distinguishes a response, and the end of its line.

        Ask for it before the lines: it may renew them. Sync tokens are letters and digits, and all of the same
        length: a client that sends back the last one still sends a header block of the same form.
        """
        token = next(self._tokens, None)
        if token is None:
            self.renew()
            token = next(self._tokens)
        return token

    def whole_token(self, token: bytes) -> bytes:
        """The sync token whose last part `next_token` has just given."""
        return self._sync_token + token[:-2]

    def lines(self, status: int, content_type: bytes) -> bytes:
        """Status line and header lines, up to the part of the sync token that `next_token` gives."""
        lines = self._lines.get((status, content_type))
        if lines is None:
            lines = b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: %b\r\nUpstash-Sync-Token: %b" % (
                status,
                HTTPStatus(status).phrase.encode(),
                self._date,
                content_type,
                self._sync_token,
            )
            self._lines[status, content_type] = lines
            if status == 200 and self._remember:
                self.ok_lines[content_type] = lines
        return lines

    def start(self, status: int, content_type: bytes) -> bytes:
        """All the lines that every response has."""
        token = self.next_token()
        return self.lines(status, content_type) + token


def length_line(size: int) -> bytes:
    """The last header line, with the empty line behind it."""
    return _LENGTHS[size] if size < len(_LENGTHS) else b"Content-Length: %d\r\n\r\n" % size
