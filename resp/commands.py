"""The command table: what Redis says of its commands (flags, arity, categories, where the keys are).

The data is `commands.json`, written by `generate_commands.py` from a live Redis 7; what it lacks (modules, newer
servers) is learned at run time from the server's own COMMAND INFO. Sources: https://redis.io/commands/command/ and
https://redis.io/topics/key-specs.

What surprised us: Redis compares option words as C strings, so `STORE\\0x` is STORE; and its key specs look only at the
first STORE of a GEORADIUS, while the command obeys the last. `Command.keys` therefore answers None where the arguments
leave room for another reading: it may report too much, never too little.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

# A server names a few hundred commands of its own and of its modules; one that names more is not believed.
MAX_LEARNED_COMMANDS = 4096

_NO_SUBCOMMANDS: Mapping[bytes, Command] = MappingProxyType({})

# The integers that string2ll accepts: no sign but "-", no leading zeros, no spaces; 64 bits.
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")


def word(argument: bytes) -> bytes:
    """The upper-case word that Redis sees where it looks for an option's name: strcasecmp stops at NUL."""
    return argument.partition(b"\0")[0].upper()


def integer(argument: bytes) -> int | None:
    """The integer Redis reads from an argument, None where it reads none."""
    number = int(argument) if _INTEGER.fullmatch(argument) else None
    return number if number is not None and -(2**63) <= number < 2**63 else None


class KeySpec(NamedTuple):
    """One key specification: where its search begins and how its keys follow from there.

    `begin` is ("index", position), ("keyword", word, start) or ("unknown",); `find` is ("range", last, step, limit),
    ("keynum", index of the count, first key, step) or ("unknown",).
    """

    flags: frozenset[str]
    begin: tuple[Any, ...]
    find: tuple[Any, ...]

    def keys(self, argv: Sequence[bytes]) -> list[bytes] | None:
        if "not_key" in self.flags:
            return []
        if "incomplete" in self.flags:
            return None
        first = self._first(argv)
        if first is None:
            return None
        if first >= len(argv):
            return []
        match self.find:
            case ("range", last, step, limit) if step > 0 and limit >= 0:
                if last >= 0:
                    last += first
                elif limit:
                    last += first + (len(argv) - first) // limit
                else:
                    last += len(argv)
            case ("keynum", index, offset, step) if step > 0 and offset >= 0 and 0 <= first + index < len(argv):
                number = integer(argv[first + index])
                if number is None or number < 0:
                    return None
                if number == 0:
                    return []
                first += offset
                last = first + (number - 1) * step
            case _:
                return None
        if not first <= last < len(argv):
            return None
        return list(argv[first : last + 1 : step])

    def _first(self, argv: Sequence[bytes]) -> int | None:
        """The position where the search begins; past the end: there are no such keys; None: it is in doubt."""
        match self.begin:
            case ("index", position) if position > 0:
                return int(position)
            case ("keyword", keyword, start):
                found = [i for i in range(1, len(argv)) if word(argv[i]) == keyword]
                if not found:
                    return len(argv)
                low, high = (start, len(argv) - 2) if start > 0 else (2, len(argv) + start)
                # A word that comes twice may be an option or another option's value, and of two options commands obey
                # now the first, now the last.
                if len(found) == 1 and low <= found[0] <= high:
                    return found[0] + 1
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """One command, or one subcommand of a container such as CONFIG, as the server describes it."""

    name: bytes
    arity: int
    flags: frozenset[str] = frozenset()
    categories: frozenset[str] = frozenset()
    specs: tuple[KeySpec, ...] = ()
    subcommands: Mapping[bytes, Command] = field(default_factory=lambda: _NO_SUBCOMMANDS)
    # The position of the only key, where there is exactly one and nothing to search: most commands.
    _only_key: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if len(self.specs) == 1:
            flags, begin, find = self.specs[0]
            if begin[0] == "index" and find == ("range", 0, 1, 0) and flags.isdisjoint(("not_key", "incomplete")):
                object.__setattr__(self, "_only_key", max(begin[1], 0))

    def keys(self, argv: Sequence[bytes]) -> list[bytes] | None:
        """The keys among the arguments; None where not all of them can be told. Never raises.

        `argv` starts with the command's name, for subcommands too. A list of the wrong length for the command is none
        of our business: the server refuses it.
        """
        if self._only_key:
            return [argv[self._only_key]] if self._only_key < len(argv) else []
        keys: list[bytes] = []
        for spec in self.specs:
            found = spec.keys(argv)
            if found is None:
                return None
            keys += found
        return keys


class CommandTable:
    """Commands by name. Learning adds to this table alone, not to the data it shares with others."""

    __slots__ = ("_learned", "_shared")

    def __init__(self, commands: Mapping[bytes, Command]) -> None:
        self._shared = commands
        self._learned: dict[bytes, Command] = {}

    def __iter__(self) -> Iterator[Command]:
        """Every command, containers without their subcommands."""
        yield from self._shared.values()
        yield from self._learned.values()

    def find(self, argv: Sequence[bytes]) -> Command | None:
        """The command that these arguments name: the subcommand where the table has it, else its container."""
        if not argv:
            return None
        name = argv[0].upper()
        command = self._shared.get(name) or self._learned.get(name)
        if command is not None and command.subcommands and len(argv) > 1:
            return command.subcommands.get(argv[1].upper(), command)
        return command

    def learned(self, name: bytes) -> bool:
        """True where the command is known only from the server's COMMAND INFO."""
        return name.upper() in self._learned

    def learn(self, command_info_entry: Any) -> Command | None:
        """Take in one entry of COMMAND INFO as hiredis gives it, of 6 (Redis 5), 7 (Redis 6) or 10 elements (Redis 7).

        Returns the command, or None where the entry is none (a nil for an unknown command, an odd shape) or the table
        is full. What is known already is not replaced: a server cannot talk us out of a flag. The name is the one in
        the entry, which differs from the one asked for where the server renames commands: look the name up again.
        """
        try:
            command = _from_command_info(command_info_entry)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
            return None
        if not command.name or b"|" in command.name or b"\0" in command.name:
            return None
        known = self.find([command.name])
        if known is not None:
            return known
        if len(self._learned) >= MAX_LEARNED_COMMANDS:
            return None
        self._learned[command.name] = command
        return command


def bundled_table() -> CommandTable:
    """A table of its own for each caller, over the commands of `commands.json`, which are read once."""
    return CommandTable(_Bundled(_data()))


class _Bundled(Mapping[bytes, Command]):
    """The commands of `commands.json`, each built when first asked for: start-up needs a few, and all take 5 ms."""

    __slots__ = ("_built", "_entries")

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries
        self._built = _built_commands()

    def __getitem__(self, name: bytes) -> Command:
        command = self._built.get(name)
        if command is None:
            text = name.decode("latin-1")
            command = self._built[name] = _from_json(text, self._entries[text])
        return command

    def __iter__(self) -> Iterator[bytes]:
        return (name.encode("latin-1") for name in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@cache
def _data() -> dict[str, Any]:
    commands: dict[str, Any] = json.loads(Path(__file__).with_name("commands.json").read_bytes())["commands"]
    return commands


@cache
def _built_commands() -> dict[bytes, Command]:
    return {}


def to_json(command: Command) -> list[Any]:
    """A command's entry in `commands.json`: arity, flags, categories, key specs, subcommands; the empty tail is cut."""

    def plain(parts: tuple[Any, ...]) -> list[Any]:
        return [part.decode("latin-1") if isinstance(part, bytes) else part for part in parts]

    entry: list[Any] = [
        command.arity,
        " ".join(sorted(command.flags)),
        " ".join(sorted(command.categories)),
        [[" ".join(sorted(spec.flags)), plain(spec.begin), plain(spec.find)] for spec in command.specs],
        {name.decode("latin-1"): to_json(sub) for name, sub in sorted(command.subcommands.items())},
    ]
    while not entry[-1]:
        entry.pop()
    return entry


def _from_json(name: str, entry: Any) -> Command:
    arity, flags, categories, specs, subcommands = entry + [0, "", "", [], {}][len(entry) :]

    def parts(values: list[Any]) -> tuple[Any, ...]:
        kind, *rest = values
        return (kind, *(value.encode("latin-1") if isinstance(value, str) else value for value in rest))

    return Command(
        name.encode("latin-1"),
        arity,
        frozenset(flags.split()),
        frozenset(categories.split()),
        tuple(KeySpec(frozenset(words.split()), parts(begin), parts(find)) for words, begin, find in specs),
        MappingProxyType({sub.encode("latin-1"): _from_json(f"{name}|{sub}", e) for sub, e in subcommands.items()}),
    )


def _from_command_info(entry: Any) -> Command:
    """The command of one COMMAND INFO entry. Raises one of the usual exceptions where the entry is not one."""
    name, arity, flag_words, first, last, step, *more = entry
    flags = frozenset(flag.decode("latin-1") for flag in flag_words)
    categories = frozenset(category.decode("latin-1").lstrip("@") for category in more[0]) if more else frozenset()
    subcommands: dict[bytes, Command] = {}
    if len(more) >= 4:
        specs = tuple(_spec_from_command_info(spec) for spec in more[2])
        for sub in map(_from_command_info, more[3]):
            subcommands[sub.name.rpartition(b"|")[2]] = sub
        # Of a module that names its keys by a callback, the server tells only a part.
        by_callback = "module" in flags and "movablekeys" in flags
    else:
        specs = (_legacy_spec(first, last, step),) if first else ()
        by_callback = "movablekeys" in flags
    if by_callback:
        specs = (KeySpec(frozenset(), ("unknown",), ("unknown",)),)
    return Command(name.upper(), int(arity), flags, categories, specs, MappingProxyType(subcommands))


def _legacy_spec(first: int, last: int, step: int) -> KeySpec:
    """The key spec that says what the old triple (first key, last key, step) says."""
    return KeySpec(frozenset(), ("index", first), ("range", last if last < 0 else last - first, step, 0))


def _spec_from_command_info(flat: list[Any]) -> KeySpec:
    def pairs(items: list[Any]) -> dict[bytes, Any]:
        return dict(zip(items[::2], items[1::2], strict=True))

    spec = pairs(flat)
    begin, find = pairs(spec[b"begin_search"]), pairs(spec[b"find_keys"])
    at, how = pairs(begin[b"spec"]), pairs(find[b"spec"])
    flags = frozenset(flag.decode("latin-1") for flag in spec[b"flags"])
    unknown = ("unknown",)
    match begin[b"type"]:
        case b"index":
            begins: tuple[Any, ...] = ("index", int(at[b"index"]))
        case b"keyword":
            begins = ("keyword", at[b"keyword"].upper(), int(at[b"startfrom"]))
        case _:
            begins = unknown
    match find[b"type"]:
        case b"range":
            finds: tuple[Any, ...] = ("range", int(how[b"lastkey"]), int(how[b"keystep"]), int(how[b"limit"]))
        case b"keynum":
            finds = ("keynum", int(how[b"keynumidx"]), int(how[b"firstkey"]), int(how[b"keystep"]))
        case _:
            finds = unknown
    return KeySpec(flags, begins, finds)
