"""Where a Redis is, and how to log in: `redis://`, `rediss://` and `unix://` URLs."""

import dataclasses
import ssl
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

DEFAULT_PORT = 6379


@dataclass(frozen=True)
class Address:
    """Everything needed to connect. Its text forms never show the password."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    path: str | None = None
    """Unix socket; if set, host and port mean nothing."""
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    ca_file: str | None = None
    """Certificate authorities to trust instead of the system's."""
    ca: str | None = field(default=None, repr=False)
    """The same as text (PEM), beside the file's."""
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    """The name the server's certificate must have, if it is not the host."""
    verify: bool = True
    delegated: bool = False
    """The login is a client's, not the operator's: if Redis refuses it, that is the client's affair."""

    @property
    def display(self) -> str:
        """For people: no credentials."""
        if self.path is not None:
            return f"unix://{self.path}?db={self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    def __str__(self) -> str:
        return self.display

    def with_login(self, username: str | None, password: str | None) -> "Address":
        """The same server as a client's own Redis user."""
        return dataclasses.replace(self, username=username, password=password, delegated=True)

    def ssl_context(self) -> ssl.SSLContext:
        """A client context that verifies the server, unless `verify` is off.

        Raises:
            OSError: a file cannot be read, or holds no certificate.
        """
        context = ssl.create_default_context(cafile=self.ca_file, cadata=self.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


def parse_url(url: str) -> Address:
    """`redis[s]://[user[:password]@]host[:port][/database]` or `unix://[user:password@]/path[?db=n]`.

    Raises:
        ValueError: with what is wrong, without the credentials.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # whose text may repeat the credentials
        raise ValueError("this is no URL such as redis://user:password@host:6379/0") from None
    scheme = parts.scheme.lower()
    if scheme not in ("redis", "rediss", "unix", "redis+unix"):
        raise ValueError(f"a Redis URL begins with redis://, rediss:// or unix://, not {scheme or 'nothing'}://")
    query = dict(parse_qsl(parts.query))
    username = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password is not None else None
    if scheme in ("unix", "redis+unix"):
        if not parts.path:
            raise ValueError("a unix:// URL needs the path of a socket: unix:///run/redis.sock?db=0")
        database = _database(query.pop("db", "0"))
        _no_more(query)
        return Address(path=unquote(parts.path), username=username, password=password, database=database)
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the port is not a number from 1 to 65535") from None
    if not parts.hostname:
        raise ValueError("the URL names no host")
    number = parts.path.strip("/") or query.pop("db", "") or "0"
    _no_more(query)
    return Address(
        host=parts.hostname,
        port=port or DEFAULT_PORT,
        tls=scheme == "rediss",
        username=username,
        password=password,
        database=_database(number),
    )


def _database(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"the database is a number, not {text!r}")
    return int(text)


def _no_more(query: dict[str, str]) -> None:
    if query:
        raise ValueError(f"unknown parameter {next(iter(query))!r}")
