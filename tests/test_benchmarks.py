"""The benchmark: that it runs, and that it says honestly what it found."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import bars, chart
from benchmarks.bench import grid, table

ROOT = Path(__file__).parents[1]
CASES = {
    "RedisGate": {"rate": 90_000.0, "rate_low": 80_000.0, "rate_high": 95_000.0, "cpu": 10.0},
    "floor": {"rate": 120_000.0, "cpu": 7.0},
    "webdis": {"rate": 45_000.0, "cpu": 20.0},
}


def test_a_run_asks_shows_and_names_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "startup", "--seconds", "1", "--rounds", "1", "--only", "RedisGate"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert "from `redisgate serve --workers 1` to its first answer" in done.stdout
    assert "start to first answer" in done.stdout.partition("the bars")[2]


def test_a_recorded_run_needs_every_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "startup", "--only", "RedisGate", "--record", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "a recorded run needs floor, webdis, nginx+Lua, FastAPI" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bars_say_what_holds_and_leave_out_what_was_not_asked() -> None:
    rows = bars.rows({bars.GET_64: CASES})
    assert rows == [
        ["single GET, CPU per request", "≤ 1.5 × the floor", "1.43", "holds"],
        ["single GET, CPU per request", "≤ 0.55 × webdis", "0.50", "holds"],
        ["single GET, requests/s", "≥ 1.8 × webdis", "2.00", "holds"],
    ]
    slower = {**CASES, "RedisGate": {"rate": 70_000.0, "cpu": 12.0}}
    assert [row[-1] for row in bars.rows({bars.GET_64: slower})] == ["MISSED", "MISSED", "MISSED"]


def test_a_table_has_the_columns_that_were_measured() -> None:
    lines = table("title", CASES).splitlines()
    assert lines[1] == "title"
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["", "requests/s", "CPU µs/request"]
    assert "90,000 (80,000 to 95,000)" in lines[5]
    assert len({len(line) for line in lines[3:]}) == 1
    assert grid([["a"], ["b"]]).splitlines() == ["| a   |", "| --- |", "| b   |"]


def test_the_chart_is_a_picture_of_every_server() -> None:
    root = ElementTree.fromstring(chart.single_get(CASES))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert set(CASES) | {"90,000", "10.0"} <= texts
