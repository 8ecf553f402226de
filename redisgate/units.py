"""Numbers, sizes and times as people read them, in pages, in the terminal and in messages."""

from typing import Final

NOTHING: Final = "\N{EN DASH}"
"""In place of a number that is not known."""


def bytes_text(count: float | None, digits: int = 1) -> str:
    """A size: 1.5 MiB."""
    if count is None:
        return NOTHING
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.{digits if size % 1 and units[0] != 'B' else 0}f} {units[0]}"


def bytes_rate_text(value: float | None) -> str:
    """Bytes per second: 1.5 MiB/s."""
    return NOTHING if value is None else f"{bytes_text(value)}/s"


def number_text(value: float | None, digits: int = 0) -> str:
    """A number: 1,234."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def short_number(value: float) -> str:
    """A count that has little room: 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1000 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def rate_text(value: float) -> str:
    """A count per second: 12.5/s."""
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


def percent_text(value: float | None) -> str:
    """A share in percent: 99.5 %."""
    return NOTHING if value is None else f"{value:.3g} %"


def milliseconds_text(value: float | None) -> str:
    """A latency in milliseconds: 1.25 ms."""
    if value is None:
        return NOTHING
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def microseconds_text(value: float | None) -> str:
    """A latency in microseconds, in the unit that suits it: 12 µs, 2.5 ms."""
    if value is None:
        return NOTHING
    if value < 1000:
        return f"{value:.0f} µs"
    return f"{value / 1000:.1f} ms" if value < 1e6 else f"{value / 1e6:.1f} s"


def span_text(seconds: float) -> str:
    """How long something has gone on, in its largest unit: 1.5 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def duration_text(milliseconds: int | None) -> str:
    """A time to live, in its two largest units: 2 d 3 h. None: there is no end, and no text."""
    if milliseconds is None:
        return ""
    seconds = milliseconds / 1000
    if seconds < 10:
        return f"{seconds:.1f} s"
    parts: list[str] = []
    left = int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size or parts:
            parts.append(f"{left // size} {unit}")
            left %= size
        if len(parts) == 2:
            break
    return " ".join(parts)
