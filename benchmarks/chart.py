"""The SVG chart of docs/benchmarks.md: single GET, requests per second and CPU per request."""

from collections.abc import Mapping
from html import escape

WIDTH, ROW, LEFT, BAR = 760, 26, 110, 230


def single_get(cases: Mapping[str, Mapping[str, float]]) -> str:
    """Two groups of bars side by side, one row for each server."""
    names = sorted(cases, key=lambda name: cases[name]["cpu"])
    height = 70 + ROW * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="13">',
        "<title>Single GET, 64 connections, one core: requests per second and CPU per request</title>",
        "<style>text{fill:#24292f}.a{fill:#2f6f4f}.b{fill:#8c959f}.c{fill:#57606a}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.a{fill:#4fb286}.b{fill:#6e7681}.c{fill:#8b949e}}</style>",
    ]
    columns = (
        (LEFT, "rate", "requests per second, one core", "{:,.0f}"),
        (LEFT + BAR + 90, "cpu", "CPU µs per request (less is better)", "{:,.1f}"),
    )
    for x, figure, title, form in columns:
        parts.append(f'<text x="{x}" y="24" font-weight="600">{escape(title)}</text>')
        largest = max(cases[name][figure] for name in names)
        for index, name in enumerate(names):
            y = 40 + ROW * index
            value = cases[name][figure]
            width = max(1.0, value / largest * BAR)
            kind = "a" if name == "RedisGate" else "c" if name == "floor" else "b"
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width:.1f}" height="{ROW - 8}" rx="2"/>')
            parts.append(f'<text x="{x + width + 6:.1f}" y="{y + 14}">{form.format(value)}</text>')
    for index, name in enumerate(names):
        weight = ' font-weight="600"' if name == "RedisGate" else ""
        parts.append(f'<text x="{LEFT - 10}" y="{54 + ROW * index}" text-anchor="end"{weight}>{escape(name)}</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)
