"""Charts as SVG, made on the server: axes with round numbers, units, a tooltip per point, a table behind each.

What is drawn has classes and no styles: `static/charts.css` gives it colours, `static/js/charts.js` a line that
follows the pointer and the reader's own time. Without the script each point's `<title>` tells its numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from markupsafe import Markup, escape

from redisgate.units import NOTHING

WIDTH: Final = 600
HEIGHT: Final = 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 10, 22
_ROWS: Final = 4
"""Grid lines above the base, about."""
_LABELS: Final = 6
"""Times under the axis, about."""
_STEPS: Final = (1, 2, 5, 10, 15, 20, 30, 60, 120, 180, 240, 360, 720, 1440, 2880, 7200, 14400, 43200, 86400, 129600)
"""Between two labelled times, in minutes."""

Value = float | int | None


@dataclass(frozen=True)
class Line:
    """One thing over time: a value for each point, None where there is none. `limit`: drawn as a bound, not as data."""

    name: str
    values: Sequence[Value]
    limit: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over the same points: the first begins at `start`, the others follow at `step`."""

    name: str
    """For addresses and ids."""
    title: str
    start: datetime
    step: timedelta
    lines: Sequence[Line]
    unit: Callable[[float], str]
    """A value for people."""
    binary: bool = False
    """Round numbers are those of bytes."""
    top: float | None = None
    """The end of the axis; None: what the values need."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return all(value is None for line in self.lines if not line.limit for value in line.values)

    @property
    def count(self) -> int:
        """Of points."""
        return max((len(line.values) for line in self.lines), default=0)

    def times(self) -> list[datetime]:
        """The beginning of each point."""
        return [self.start + self.step * index for index in range(self.count)]

    def time_text(self, moment: datetime) -> str:
        """A point's time, as tightly as its step allows; UTC."""
        if self.step >= timedelta(days=1):
            return moment.strftime("%m-%d")
        return moment.strftime("%H:%M" if self.step * self.count <= timedelta(hours=25) else "%m-%d %H:%M")

    def rows(self) -> Iterator[tuple[datetime, list[str]]]:
        """The table behind it: the time, and each line's value for people."""
        for index, moment in enumerate(self.times()):
            yield moment, [self._text(line, index) for line in self.lines]

    def _text(self, line: Line, index: int) -> str:
        value = line.values[index] if index < len(line.values) else None
        return NOTHING if value is None else self.unit(value)

    def svg(self) -> Markup:
        """The drawing."""
        greatest = max((value for line in self.lines for value in line.values if value is not None), default=0)
        ticks = [self.top * row / _ROWS for row in range(_ROWS + 1)] if self.top else nice_ticks(greatest, self.binary)
        high = ticks[-1]
        parts = [
            Markup(
                '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"'
                ' data-chart="{}" data-start="{}" data-step="{}">'
            ).format(
                WIDTH,
                HEIGHT,
                self._described(),
                self.name,
                int(self.start.timestamp()),
                int(self.step.total_seconds()),
            )
        ]
        parts += self._grid(ticks, high)
        parts += [
            Markup('<path class="{}" d="{}"/>').format(
                "limit" if line.limit else f"s{number}", Markup(self._path(line, high))
            )
            for number, line in enumerate(self.lines, 1)
        ]
        parts += self._points()
        parts.append(Markup("</svg>"))
        return Markup("").join(parts)

    def _described(self) -> str:
        """In words, for who does not see it: the title, and of each line the last value and the highest."""
        summaries = []
        for line in self.lines:
            values = [value for value in line.values if value is not None]
            if values and not line.limit:
                summaries.append(f"{line.name}: {self.unit(values[-1])} (max {self.unit(max(values))})")
        return f"{self.title}. {'; '.join(summaries)}" if summaries else self.title

    def _x(self, index: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (index + 0.5) / max(self.count, 1)

    def _y(self, value: float, high: float) -> float:
        span = HEIGHT - _TOP - _BOTTOM
        return HEIGHT - _BOTTOM - span * (min(value, high) / high if high else 0)

    def _grid(self, ticks: Sequence[float], high: float) -> list[Markup]:
        parts = []
        for tick in ticks:
            y = _short(self._y(tick, high))
            parts.append(
                Markup('<path class="grid" d="M{} {}H{}"/><text class="y" x="{}" y="{}">{}</text>').format(
                    _LEFT, y, WIDTH - _RIGHT, _LEFT - 6, _short(self._y(tick, high) + 4), self.unit(tick)
                )
            )
        labelled = list(self._labelled())
        for index, moment in labelled:
            parts.append(
                Markup('<text class="x" x="{}" y="{}" data-at="{}">{}</text>').format(
                    _short(self._x(index)), HEIGHT - 6, int(moment.timestamp()), self.time_text(moment)
                )
            )
        return parts

    def _labelled(self) -> Iterator[tuple[int, datetime]]:
        """The points whose times stand under the axis: round ones."""
        minutes = self.step.total_seconds() / 60
        wanted = minutes * self.count / _LABELS
        apart = next((step for step in _STEPS if step >= max(wanted, minutes)), _STEPS[-1])
        edge = self.count / _LABELS / 3  # a label there would be cut off
        for index, moment in enumerate(self.times()):
            if (moment.timestamp() / 60) % apart == 0 and edge <= index + 0.5 <= self.count - edge:
                yield index, moment

    def _path(self, line: Line, high: float) -> str:
        """Neighbours are joined; a value without any is a dot; what is missing is a gap."""
        pieces: list[str] = []
        values = list(line.values)
        for index, value in enumerate(values):
            if value is None:
                continue
            point = f"{_short(self._x(index))} {_short(self._y(value, high))}"
            joined = index > 0 and values[index - 1] is not None
            alone = not joined and (index + 1 == len(values) or values[index + 1] is None)
            pieces.append(f"L{point}" if joined else f"M{point}{'h.1' if alone else ''}")
        return "".join(pieces)

    def _points(self) -> list[Markup]:
        """A strip for each point that has values, with its numbers: a line as wide as a step."""
        several = sum(not line.limit for line in self.lines) > 1
        width = (WIDTH - _LEFT - _RIGHT) / max(self.count, 1)
        parts = [Markup('<g class="points" stroke-width="{}">').format(f"{width:.1f}")]
        for index, moment in enumerate(self.times()):
            shown = [
                f"{line.name} {self._text(line, index)}" if several else self._text(line, index)
                for line in self.lines
                if not line.limit and index < len(line.values) and line.values[index] is not None
            ]
            if shown:
                text = escape(f"{self.time_text(moment)}\n" + "\n".join(shown))
                # By hand: Markup.format takes three times as long, and a page has hundreds of these.
                parts.append(
                    Markup(
                        f'<path d="M{_short(self._x(index))} {_TOP}V{HEIGHT - _BOTTOM}"><title>{text}</title></path>'
                    )
                )
        parts.append(Markup("</g>"))
        return parts


def sparkline(values: Sequence[Value], label: str, width: int = 120, height: int = 28) -> Markup:
    """A line without axes, for lists; `label` says in words what it shows."""
    known = [value for value in values if value is not None]
    high = max(known, default=0) or 1
    points: list[str] = []
    for index, value in enumerate(values):
        if value is not None:
            x = width * index / max(len(values) - 1, 1)
            y = height - 2 - (height - 4) * value / high
            points.append(f"{'L' if points and values[index - 1] is not None else 'M'}{_short(x)} {_short(y)}")
    return Markup(
        '<svg class="sparkline" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<title>{}</title><path d="{}"/></svg>'
    ).format(width, height, label, label, Markup("".join(points)))


def nice_ticks(greatest: float, binary: bool = False) -> list[float]:
    """Round numbers from 0 up to the first that is not below the greatest."""
    if greatest <= 0 or not math.isfinite(greatest):
        greatest = 1.0
    scale = 1.0
    if binary:
        while greatest / scale >= 1024:
            scale *= 1024
    rough = greatest / scale / _ROWS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    factor = next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999999)
    step = factor * magnitude * scale
    count = math.ceil(greatest / step - 1e-9)
    return [step * index for index in range(count + 1)]


def bins(span: timedelta, step: timedelta, now: datetime) -> list[datetime]:
    """The beginnings of the bins of a span that ends with the one that is under way."""
    last = datetime.fromtimestamp(now.timestamp() // step.total_seconds() * step.total_seconds(), UTC)
    count = round(span / step)
    return [last - step * (count - 1 - index) for index in range(count)]


def _short(number: float) -> str:
    """A coordinate with as few characters as it takes: a page has thousands."""
    return f"{number:.0f}"
