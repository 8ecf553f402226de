"""One run of the benchmark: its pace, the servers that are up, what was measured."""

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from benchmarks.load import LoadFailed
from benchmarks.peers import STARTERS, Missing, Peer, start_redis
from benchmarks.processes import Server

Figures = dict[str, float]

# How figures are shown: name, column, unit that it is divided by, digits.
COLUMNS = (
    ("rate", "requests/s", 1, 0),
    ("commands_per_cpu_second", "commands/CPU s", 1, 0),
    ("cpu", "CPU µs/request", 1, 2),
    ("p50", "p50 µs", 1, 0),
    ("p99", "p99 µs", 1, 0),
    ("p999", "p99.9 µs", 1, 0),
    ("bytes_per_second", "MB/s", 1e6, 1),
    ("memory", "memory MB", 1e6, 1),
    ("bytes_each", "bytes each", 1, 0),
    ("redis_connections", "Redis connections", 1, 0),
    ("milliseconds", "ms", 1, 1),
)


@dataclass
class Bench:
    """What the questions share.

    `seconds` of load per case and turn, `rounds` turns. `results` holds what was measured: question → case → figures.
    """

    seconds: int
    rounds: int
    only: tuple[str, ...] = tuple(STARTERS)
    results: dict[str, dict[str, Figures]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    step: str = ""

    def __post_init__(self) -> None:
        self._servers: list[Server] = []
        self._peers: dict[str, Peer] = {}
        self._began = time.monotonic()
        redis, self.redis_port = start_redis()
        self._servers.append(redis)

    def peer(self, name: str) -> Peer | None:
        """A running server, started when first asked for; None if it is not installed."""
        if name not in self._peers and name not in self.missing and name in self.only:
            self.progress(f"starting {name}")
            try:
                self._peers[name] = STARTERS[name](self.redis_port)
            except Missing as reason:
                self.missing[name] = str(reason)
                self.say(f"MISSING: {name}: {reason}")
        return self._peers.get(name)

    def peers(self, *names: str) -> list[Peer]:
        """The running ones of some servers, or of all."""
        return [peer for name in names or tuple(STARTERS) if (peer := self.peer(name)) is not None]

    def keep(self, peer: Peer) -> Peer:
        """Stop this one too at the end."""
        self._servers.append(peer.server)
        return peer

    def drop(self, peer: Peer) -> None:
        """Stop one that `keep` has."""
        self._servers.remove(peer.server)
        peer.server.stop()

    def compare(self, question: str, cases: Mapping[str, Callable[[], object]]) -> dict[str, Figures]:
        """Run the cases A B C A B C; keep and show the median of every figure, and the extremes of rate and CPU."""
        runs: dict[str, list[Figures]] = {name: [] for name in cases}
        for turn in range(self.rounds):
            for name, case in cases.items():
                self.progress(f"{question}: {name} ({turn + 1}/{self.rounds})")
                try:
                    figures = case()
                except LoadFailed as problem:
                    # webdis now and then answers nobody any more after a thousand connections.
                    self.say(f"FAILED, started anew: {problem}")
                    self._start_anew(problem)
                    figures = case()
                runs[name].append(figures if isinstance(figures, dict) else asdict(figures))  # type: ignore[call-overload]
        return self.record(question, {name: _summary(found) for name, found in runs.items()})

    def _start_anew(self, problem: LoadFailed) -> None:
        """Replace the server behind a peer; what is not ours to start fails the run."""
        peer = problem.peer
        if self._peers.get(peer.name) is not peer or peer.name == "RedisGate":
            raise problem
        peer.server.stop()
        fresh = STARTERS[peer.name](self.redis_port)
        peer.server, peer.port = fresh.server, fresh.port

    def record(self, question: str, figures: dict[str, Figures]) -> dict[str, Figures]:
        """Keep and show what was measured otherwise."""
        self.results.setdefault(question, {}).update(figures)
        self.clear()
        print(table(question, figures), flush=True)
        return figures

    # For the person at the terminal

    def progress(self, what: str) -> None:
        """Say what is going on, over the last such line."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            elapsed = time.monotonic() - self._began
            line = f"{self.step}  {elapsed:4.0f} s  {what}"[:width]
            print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the progress line away."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """A line that stays."""
        self.clear()
        print(what, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop every server."""
        self.clear()
        for server in [peer.server for peer in self._peers.values()] + self._servers[::-1]:
            server.stop()


def _summary(runs: list[Figures]) -> Figures:
    result = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    for name in ("rate", "cpu"):
        if name in result:
            result[f"{name}_low"] = min(run[name] for run in runs)
            result[f"{name}_high"] = max(run[name] for run in runs)
    return result


def _cell(figures: Figures, name: str, unit: float, digits: int) -> str:
    if name not in figures:
        return ""
    text = f"{figures[name] / unit:,.{digits}f}"
    if f"{name}_low" in figures and name in ("rate", "cpu"):
        low, high = figures[f"{name}_low"] / unit, figures[f"{name}_high"] / unit
        text += f" ({low:,.{digits}f} to {high:,.{digits}f})"
    return text


def table(title: str, cases: Mapping[str, Figures]) -> str:
    """Figures as a table in Markdown, which is readable in a terminal too."""
    columns = [column for column in COLUMNS if any(column[0] in figures for figures in cases.values())]
    rows = [["", *(column[1] for column in columns)]]
    for name, figures in cases.items():
        rows.append([name, *(_cell(figures, column[0], column[2], column[3]) for column in columns)])
    return f"\n{title}\n\n{grid(rows)}"


def grid(rows: Iterable[list[str]]) -> str:
    """Rows, of which the first is the head, as a Markdown table with even columns."""
    lines = list(rows)
    widths = [max(3, *(len(row[index]) for row in lines)) for index in range(len(lines[0]))]
    aligned = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [aligned[0], rule, *aligned[1:]])
