"""Compiles the straight line of a request by mypyc; everything else stands in setup.cfg.

The modules stay plain Python, which is the reference: the same tests pass in
both forms, and the pure one runs where nothing can be compiled. `REDISGATE_BUILD`
says what is wanted: `auto` (compile where there is a C compiler), `compiled`
(fail without one) or `pure`. `redisgate version` says which form is installed.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# All classes that know each other on the straight line, so that they call each other directly.
COMPILED = [
    "resp/connection.py",
    "resp/encoder.py",
    "resp/errors.py",
    "resp/pool.py",
    "resp/scanner.py",
    "redisgate/access.py",
    "redisgate/access_log.py",
    "redisgate/asgi.py",
    "redisgate/counters.py",
    "redisgate/exchange.py",
    "redisgate/gateway.py",
    "redisgate/http_head.py",
    "redisgate/http_protocol.py",
    "redisgate/http_response.py",
    "redisgate/limits.py",
    "redisgate/metering.py",
    "redisgate/policy.py",
    "redisgate/replies.py",
    "redisgate/requests.py",
    "redisgate/streams.py",
]


def missing() -> str | None:
    """What it would take to compile, if anything."""
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"the C compiler {compiler} (Debian, Ubuntu: apt-get install gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (Debian, Ubuntu: apt-get install python3-dev)"
    try:
        import mypyc.build  # noqa: F401
    except ImportError:
        return "mypy (pip install mypy)"
    return None


def extensions() -> list:
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return []  # only metadata is asked for
    wanted = os.environ.get("REDISGATE_BUILD", "auto")
    if wanted not in ("auto", "compiled", "pure"):
        sys.exit(f"REDISGATE_BUILD is {wanted!r}; expected auto, compiled or pure")
    if wanted == "pure":
        return []
    lacking = missing()
    if lacking is not None:
        if wanted == "compiled":
            sys.exit(f"REDISGATE_BUILD=compiled needs {lacking}")
        print(f"RedisGate is built as pure Python, which serves fewer requests: missing is {lacking}", file=sys.stderr)
        return []
    from mypyc.build import mypycify

    # Types are checked by `make lint`. Here the libraries may be absent: pip builds in an environment without them.
    options = ["--config-file=", "--ignore-missing-imports", "--no-warn-return-any"]
    return mypycify([*options, *COMPILED], group_name="redisgate", opt_level="3", debug_level="0")


setup(ext_modules=extensions())
