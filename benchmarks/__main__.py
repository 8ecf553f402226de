"""`python -m benchmarks`, which is `make bench`: asks the questions, shows and keeps the answers."""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import redisgate
from benchmarks import bars, chart
from benchmarks.bench import Bench, grid, table
from benchmarks.load import machine
from benchmarks.peers import REQUIRED, STARTERS, Missing
from benchmarks.questions import QUESTIONS

START_OF_RESULTS = "<!-- results:"
END_OF_RESULTS = "<!-- end of results -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="How fast RedisGate is, beside what else there is.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--seconds", type=int, default=3, help="of load per case and turn; whole ones (3)")
    parser.add_argument("--rounds", type=int, default=5, help="turns (5)")
    parser.add_argument("--only", default=",".join(STARTERS), help=f"of the servers {','.join(STARTERS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="write into benchmarks.md, .json and .svg here; needs every server"
    )
    options = parser.parse_args()
    unknown = [name for name in options.questions if name not in QUESTIONS]
    if unknown:
        parser.error(f"there is no question {unknown[0]!r}; choose from {', '.join(QUESTIONS)}")
    asked = options.questions or list(QUESTIONS)
    form = redisgate.build_form()
    about = {"date": datetime.date.today().isoformat(), "form": form, **machine()}
    print(f"RedisGate ({form}) on {about['cores']} cores, {about['cpu']}, Python {about['python']}")
    try:
        bench = Bench(options.seconds, options.rounds, tuple(options.only.split(",")))
    except Missing as reason:
        print(f"MISSING: {reason}", file=sys.stderr)
        return 1
    try:
        lacking = [name for name in REQUIRED if bench.peer(name) is None]
        if options.record is not None and lacking:
            print(f"a recorded run needs {', '.join(lacking)}", file=sys.stderr)
            return 1
        for number, name in enumerate(asked, 1):
            bench.step = f"[{number}/{len(asked)}]"
            try:
                QUESTIONS[name].run(bench)
            except Missing as reason:
                bench.missing[name] = str(reason)
                bench.say(f"MISSING: {name} was not asked: {reason}")
                if options.record is not None:
                    return 1
    except KeyboardInterrupt:
        bench.say("interrupted")
        return 130
    finally:
        bench.close()
    if options.record is not None:
        bench.results = {**_recorded(options.record, about), **bench.results}
    lines = bars.rows(bench.results)
    if lines:
        print("\nthe bars\n\n" + grid([["question", "bar", "measured", ""], *lines]))
    for name, reason in bench.missing.items():
        print(f"MISSING: {name}: {reason}")
    document: dict[str, Any] = {"about": about, "results": bench.results, "missing": bench.missing}
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.record is not None:
        _record(options.record, document, lines)
    return 0


def _recorded(directory: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What other questions found on this machine with this form before; so one question can be asked again alone."""
    path = directory / "benchmarks.json"
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    same = all(document["about"].get(name) == about[name] for name in ("form", "cpu", "cores", "python", "kernel"))
    return dict(document["results"]) if same else {}


def _record(directory: Path, document: dict[str, Any], lines: list[list[str]]) -> None:
    """Write the figures, the chart, and the part of the page that shows them."""
    (directory / "benchmarks.json").write_text(json.dumps(document, indent=1) + "\n")
    about, results = document["about"], document["results"]
    parts = [
        f"## Last measured\n\n{about['date']}, {about['cores']} cores of {about['cpu']}, Linux {about['kernel']}, "
    ]
    parts.append(f"Python {about['python']}, RedisGate {about['form']}.\n")
    if bars.GET_64 in results:
        (directory / "benchmarks.svg").write_text(chart.single_get(results[bars.GET_64]))
        parts.append("\n![Single GET: requests per second and CPU per request](benchmarks.svg)\n")
    parts.append("\n" + grid([["question", "bar", "measured", ""], *lines]) + "\n")
    parts.append("\n<details><summary>All figures</summary>\n")
    parts += [table(f"**{question}**", cases) + "\n" for question, cases in results.items()]
    parts.append("\n</details>\n")
    page = directory / "benchmarks.md"
    head, marker, rest = page.read_text().partition(START_OF_RESULTS)
    _, end, tail = rest.partition(END_OF_RESULTS)
    if not marker or not end:
        raise SystemExit(f"{page} lacks the lines {START_OF_RESULTS} … {END_OF_RESULTS}")
    first_line = rest.partition("\n")[0]
    page.write_text(f"{head}{marker}{first_line}\n\n{''.join(parts)}\n{end}{tail}")


if __name__ == "__main__":
    sys.exit(main())
