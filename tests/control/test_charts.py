"""Charts: what they draw, that it is well-formed and says its numbers in words, and how light it is."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from control.charts import NOTHING, Chart, Line, bins, nice_ticks, sparkline

START = datetime(2026, 11, 24, 18, tzinfo=UTC)
SVG = "{http://www.w3.org/2000/svg}"


def chart(*lines: Line, step: timedelta = timedelta(minutes=1)) -> Chart:
    return Chart("throughput", "Throughput", START, step, lines, lambda value: f"{value:g}/s")


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(text).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@pytest.mark.parametrize(
    "greatest", [0, 1e-9, 0.003, 0.1, 0.3, 1, 3, 7, 10, 97, 100, 101, 999, 12345, 1e12, float("inf")]
)
@pytest.mark.parametrize("binary", [False, True])
def test_the_axis_has_few_round_numbers_that_hold_every_value(greatest: float, binary: bool) -> None:
    ticks = nice_ticks(greatest, binary)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 6
    assert all(low < high for low, high in pairwise(ticks))
    if greatest < float("inf"):
        assert greatest * 0.999999 <= ticks[-1] <= max(greatest * 2.6, 1)


def test_ticks_of_sizes_are_round_in_their_binary_unit() -> None:
    assert nice_ticks(70 * 1024 * 1024, binary=True) == [n * 20 * 1024 * 1024 for n in range(5)]


def test_each_point_tells_its_numbers_and_the_table_has_the_same() -> None:
    made = chart(Line("reads", [1, None, 3]), Line("writes", [None, None, 0.5]), Line("limit", [9, 9, 9], limit=True))
    titles = [title.text for title in parsed(made.svg()).iter(f"{SVG}title")]
    assert titles == ["18:00\nreads 1/s", "18:02\nreads 3/s\nwrites 0.5/s"]
    assert [texts for _, texts in made.rows()] == [
        ["1/s", NOTHING, "9/s"],
        [NOTHING, NOTHING, "9/s"],
        ["3/s", "0.5/s", "9/s"],
    ]
    assert parsed(made.svg()).get("aria-label") == "Throughput. reads: 3/s (max 3/s); writes: 0.5/s (max 0.5/s)"


def test_what_is_missing_is_a_gap_and_a_lone_value_a_dot() -> None:
    def path(*values: float | None) -> str:
        drawn = parsed(chart(Line("a", values)).svg())
        return next(found.get("d", "") for found in drawn.iter(f"{SVG}path") if found.get("class") == "s1")

    assert [path(1, 2, None, 3, 4).count(letter) for letter in "ML"] == [2, 2]
    assert path(None, 1, None).endswith("h.1")
    assert path(None, None) == ""


def test_names_and_labels_are_data() -> None:
    hostile = "<script>alert(1)</script>\"'"
    drawn = Chart("x", hostile, START, timedelta(hours=1), [Line(hostile, [1.0])], lambda value: hostile).svg()
    assert "<script" not in drawn
    assert parsed(drawn).get("aria-label", "").startswith(hostile)
    assert "<script" not in sparkline([1, 2], hostile)


def test_no_chart_carries_a_style_or_a_script() -> None:
    drawn = chart(Line("a", [1.0] * 60)).svg() + sparkline([1, None, 2], "a")
    assert "style=" not in drawn
    assert " on" not in drawn


def test_nothing_to_show_is_told_apart_from_zero() -> None:
    assert chart(Line("a", [None, None]), Line("limit", [1, 1], limit=True)).empty
    assert not chart(Line("a", [None, 0])).empty


def test_a_chart_of_an_hour_is_light() -> None:
    made = chart(*(Line(name, [number * 0.7 for number in range(60)]) for name in ("reads", "writes")))
    assert len(made.svg()) < 6500


@pytest.mark.parametrize(
    ("span", "step"),
    [
        (timedelta(hours=1), timedelta(minutes=1)),
        (timedelta(hours=24), timedelta(minutes=30)),
        (timedelta(days=7), timedelta(hours=3)),
        (timedelta(days=30), timedelta(days=1)),
    ],
    ids=["1h", "24h", "7d", "30d"],
)
def test_bins_are_round_and_the_last_is_under_way(span: timedelta, step: timedelta) -> None:
    now = datetime(2026, 11, 24, 18, 47, 31, tzinfo=UTC)
    found = bins(span, step, now)
    assert len(found) == span / step
    assert found[-1] <= now < found[-1] + step
    assert all((moment.timestamp() % step.total_seconds()) == 0 for moment in found)
    made = dataclasses.replace(chart(Line("a", [1.0] * len(found)), step=step), start=found[0])
    labels = parsed(made.svg()).iter(f"{SVG}text")
    assert 2 <= len([text for text in labels if text.get("class") == "x"]) <= 8


def test_a_sparkline_fills_its_box() -> None:
    drawn = sparkline([0, 5, 10], "commands")
    path = parsed(drawn).find(f"{SVG}path")
    assert path is not None
    assert path.get("d") == "M0 26L60 14L120 2"
    assert parsed(sparkline([], "nothing")).find(f"{SVG}path") is not None
