"""The documentation: every command in it is run, every link leads somewhere, the site builds without the internet.

A page's blocks of `sh` run one after the other, as a reader would type them, with `redisgate dev` at port 3000 and
the variables that it prints. Comments before a block say what else there is to it:

    <!-- not run: the reason -->            needs what is not at hand here
    <!-- server: http://…/health/ready -->  goes on until the page ends; the next block waits for this address
    <!-- fails: 1 -->                       ends with this status, as the text says
    <!-- errors: what is shown -->          the answers are errors, which everywhere else fail the test

Blocks of `js` and `python` run with the official clients.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from redisgate.command_reference import commands_page
from tests.redisgate.test_dev import Dev
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CLIENTS = ROOT / "tests" / "clients" / "js"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
BLOCK_SECONDS = 60
_FENCE = re.compile(
    r"(?:<!-- (?P<how>not run|server|fails|errors): (?P<detail>[^\n]*?) -->\n\n?)?"
    r"(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)\n(?P=indent)```",
    re.DOTALL,
)
_RUNNABLE = ("sh", "js", "python")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    code: str
    how: str | None
    detail: str


def blocks(page: Path) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page.read_text()):
        code = re.sub(rf"(?m)^{match['indent']}", "", match["code"])
        found.append(Block(match["language"], code, match["how"], match["detail"] or ""))
    return found


RUN = [page for page in PAGES if any(one.language in _RUNNABLE and one.how != "not run" for one in blocks(page))]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a reader has after `make run`."""
    folder = tmp_path_factory.mktemp("dev")
    started = Dev(folder, "--port", "0", "--data", str(folder / "data")).ready()
    try:
        yield {
            "URL": f"http://127.0.0.1:{started.port}",
            "PORT": str(started.port),
            "TOKEN": started.token(),
            "READONLY_TOKEN": started.token("Read-only token"),
            "API_KEY": started.token("API key"),
            "ORG_ID": started.token("Organization"),
            "INSTANCE_ID": re.search(r"Instance +(\S+)", started.text())[1],  # type: ignore[index]
        }
    finally:
        started.end(signal.SIGTERM)
        started.output.close()


def script(page: Path, port: int, folder: Path) -> str:
    """The page's blocks as one script for bash."""
    parts = ["set -euo pipefail", "servers=()"]
    parts.append("trap 'status=$?; ((${#servers[@]})) && kill \"${servers[@]}\"; wait; exit $status' EXIT")
    parts.append('curl() { command curl --fail-with-body "$@"; }')
    for number, block in enumerate(blocks(page)):
        if block.language not in _RUNNABLE or block.how == "not run":
            continue
        code = re.sub(r"(127\.0\.0\.1|localhost):3000\b", rf"\1:{port}", block.code).replace(
            "--port 3000", f"--port {port}"
        )
        parts.append(f"echo '== block {number}' >&2")
        if block.language == "js":
            file = folder / f"block{number}.mjs"
            file.write_text(code)
            parts.append(f"node {file}")
        elif block.language == "python":
            file = folder / f"block{number}.py"
            file.write_text(code)
            parts.append(f"python {file}")
        elif block.how == "server":
            address = re.sub(r":3000\b", f":{port}", block.detail)
            parts.append(f"( {code.strip()} ) & servers+=($!)")
            parts.append(
                "command curl -sf -o /dev/null --retry 100 --retry-delay 0 --retry-all-errors --retry-max-time 30"
                f" {address}"
            )
        elif block.how == "fails":
            parts.append(f"( {code.strip()}\n) && exit 99 || test $? = {block.detail}")
        elif block.how == "errors":
            parts.append(f"( unset -f curl\n{code.strip()}\n)")
        else:
            parts.append(code)
    return "\n".join(parts) + "\n"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", RUN, ids=[page.relative_to(ROOT).as_posix() for page in RUN])
def test_the_commands_of_a_page_work(page: Path, dev: dict[str, str], tmp_path: Path) -> None:
    own_server = any(block.how == "server" for block in blocks(page))
    port = free_port() if own_server else int(dev["PORT"])
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, target in (
        ("redisgate", f'exec "{sys.executable}" -m redisgate "$@"'),
        ("python", f'exec "{sys.executable}" "$@"'),
    ):
        (binaries / name).write_text(f"#!/bin/sh\n{target}\n")
        (binaries / name).chmod(0o755)
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "SRH_", "DATABASE_"))
    }
    environ = (
        kept
        | dev
        | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "URL": f"http://127.0.0.1:{port}",
            "UPSTASH_REDIS_REST_URL": f"http://127.0.0.1:{port}",
            "UPSTASH_REDIS_REST_TOKEN": dev["TOKEN"],
            "REDISGATE_STATE_DIR": str(tmp_path / "state"),
            "HOME": str(tmp_path),
        }
    )
    for name in ("docs", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = script(page, port, tmp_path)
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=BLOCK_SECONDS * 2
    )
    assert done.returncode == 0, f"{text}\n--- output\n{done.stdout}\n{done.stderr}"


def test_blocks_that_are_not_run_say_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.how == "not run":
                assert len(block.detail) > 10, (page, block)


def test_every_metric_that_is_spoken_of_is_described() -> None:
    described = set(re.findall(r"`(redisgate_[a-z_]+)`", (DOCS / "observability.md").read_text()))
    for page in (DOCS / "capacity.md", DOCS / "runbooks.md", DOCS / "TROUBLESHOOTING.md"):
        for name in re.findall(r"\bredisgate_[a-z_]+", page.read_text()):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in described, f"{page.name}: {name}"


def test_nobody_is_told_to_open_the_trial_to_the_network() -> None:
    for page in (*PAGES, ROOT / "Dockerfile"):
        for line in page.read_text().splitlines():
            if "docker run" in line and "redisgate:gateway" not in line:
                assert not re.search(r"-p \d+:", line), f"{page.name}: {line}"


def test_shell_blocks_are_marked_as_sh() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language not in ("bash", "shell", "console", "javascript", "py"), (page, block.code[:80])


def test_the_page_of_commands_is_what_the_gateway_does() -> None:
    assert (DOCS / "commands.md").read_text() == commands_page(), (
        "python -m redisgate.command_reference > docs/commands.md"
    )


def test_links_between_files_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.timeout(120)
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).parent / "mkdocs"
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path / "site"],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "true"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    pages_in_nav = re.findall(r"(?m)^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    assert len(pages_in_nav) == len(set(pages_in_nav))
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for tag in re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text()):
            if 'rel="canonical"' not in tag and 'rel="next"' not in tag and 'rel="prev"' not in tag:
                assert not re.search(r'(?:src|href)="https?:', tag), (page, tag)
    shutil.rmtree(tmp_path / "site")
