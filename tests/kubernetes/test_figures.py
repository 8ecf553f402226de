"""That the operator stays frugal: what `python -m benchmarks.kubernetes` measures, few resources and wide bounds."""

from benchmarks.kubernetes import measure

RESOURCES = 30


def test_the_operator_asks_little_and_answers_edits_at_once() -> None:
    figures = measure(RESOURCES)
    # to look and to write once for each of ten objects; the lists and watches of the operator's start come on top
    assert figures["requests"] <= 20 * RESOURCES + 40
    assert figures["megabytes"] <= 120
    # 20 ms on a quiet machine, the median of ten
    assert figures["edit"] <= 2
    assert figures["seconds"] <= 60
    assert figures["restart"] <= 60
