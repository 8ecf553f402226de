"""What can go wrong between a command and its reply.

The families answer one question for whoever sent the command: may it have
run? `Unavailable` says certainly not; `ReplyLost` and `ReplyTimeout` say that
it may have. Error replies are not exceptions: they are values, as Redis sent
them.
"""


class RespError(Exception):
    """Base of everything this package raises or hands to a waiter."""


class Unavailable(RespError):
    """The command was never passed to the transport: it has not run."""


class ConnectFailed(Unavailable):
    """There is no connection to send it on.

    The text is for anybody; `detail`, with the address, and `cause`, if an exception is, for the operator.
    """

    def __init__(self, detail: str, cause: Exception | None = None) -> None:
        if "LOADING" in detail:
            text = "the instance is loading its data"
        elif "was refused: " in detail or "NOAUTH" in detail:
            text = "the instance does not let the gateway in"
        else:
            text = "the instance cannot be reached"
        super().__init__(text)
        self.detail = detail
        self.cause = cause  # not __cause__: a raise in compiled code does not set it


class LoginRefused(ConnectFailed):
    """The login that a client brought (`Address.delegated`) is wrong, or no longer right."""


class ReplyLost(RespError):
    """The command was passed to the transport and its reply was lost: it may have run."""


class ReplyTimeout(ReplyLost):
    """The command was passed to the transport and not answered in time: it may run yet."""


class ReplyTooLarge(ReplyLost):
    """The command ran, and its reply was larger than whoever asked takes."""


class ProtocolError(RespError):
    """The server sent something that is not RESP2, or a reply nobody waits for."""
