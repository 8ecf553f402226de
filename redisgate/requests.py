"""Request targets and bodies to argument lists.

Arguments are bytes, any bytes. What cannot be one argument unambiguously
(null, nested values, lone surrogates) is refused rather than guessed.
"""

import json
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec

PERCENT: Final = 0x25  # an integer, not b"%": looking for it is five times as fast as looking for a byte string


class BadRequest(Exception):
    """The request itself is wrong; the text is an error line for the client."""


_decode_strings: Final = msgspec.json.Decoder(list[str]).decode
_decode_string_lists: Final = msgspec.json.Decoder(list[list[str]]).decode


def _refuse_constant(name: str) -> None:
    raise BadRequest(f"ERR failed to parse the command: {name} is not JSON")


# Numbers reach Redis as they were written, so they are never turned into numbers here.
_decoder: Final = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refuse_constant)


def split_path(path: bytes) -> list[bytes]:
    """The segments after the first slash, percent-decoded; `+` stays `+`."""
    segments = path.split(b"/")
    del segments[0]
    if PERCENT in path:
        return [unquote_to_bytes(segment) if b"%" in segment else segment for segment in segments]
    return segments


def split_query(query: bytes) -> tuple[list[bytes], bytes | None]:
    """The arguments that a query string appends, and the value of `_token` if it has one.

    Each parameter appends its name and, unless it has no `=`, its value, in order.
    """
    arguments = []
    token = None
    for parameter in query.split(b"&"):
        if not parameter:
            continue
        name, equals, value = parameter.partition(b"=")
        name = unquote_to_bytes(name)
        if name == b"_token":
            token = unquote_to_bytes(value)
            continue
        arguments.append(name)
        if equals:
            arguments.append(unquote_to_bytes(value))
    return arguments, token


def parse_command(body: bytes) -> list[bytes]:
    """A body that holds one command as a JSON array.

    Raises:
        BadRequest: it holds anything else.
    """
    try:
        return [argument.encode() for argument in _decode_strings(body)]
    except (msgspec.DecodeError, UnicodeError):
        # Numbers and booleans, or an error: the slower way finds out which.
        return _command(_decode(body), "")


def parse_commands(body: bytes) -> list[list[bytes]]:
    """A body that holds several commands as a JSON array of arrays.

    Raises:
        BadRequest: it holds anything else, or an empty command.
    """
    try:
        commands = [[argument.encode() for argument in command] for command in _decode_string_lists(body)]
    except (msgspec.DecodeError, UnicodeError):
        value = _decode(body)
        if not isinstance(value, list):
            raise BadRequest("ERR failed to parse the pipeline: expected a JSON array of command arrays") from None
        commands = [_command(item, f" at index {index}") for index, item in enumerate(value)]
    for index, command in enumerate(commands):
        if not command:
            raise BadRequest(f"ERR empty command at index {index}")
    return commands


def _decode(body: bytes) -> Any:
    try:
        return _decoder.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"ERR the request body is not UTF-8: byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"ERR failed to parse the request body as JSON: {error.msg} at byte {error.pos}") from error
    except RecursionError as error:
        raise BadRequest("ERR failed to parse the request body: nested too deep") from error


def _command(value: Any, where: str) -> list[bytes]:
    if not isinstance(value, list):
        raise BadRequest(f"ERR failed to parse the command{where}: expected a JSON array, got {_kind(value)}")
    arguments = []
    for position, argument in enumerate(value):
        if argument is True or argument is False:
            argument = "true" if argument else "false"
        elif not isinstance(argument, str):
            raise BadRequest(
                f"ERR failed to parse the command{where}: argument {position} is {_kind(argument)};"
                " expected a string, a number or a boolean"
            )
        try:
            arguments.append(argument.encode())
        except UnicodeEncodeError as error:
            raise BadRequest(
                f"ERR failed to parse the command{where}: argument {position} has a lone surrogate"
            ) from error
    return arguments


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "an array", str: "a string or number", bool: "a boolean"}.get(type(value), "?")
