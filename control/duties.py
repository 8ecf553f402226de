"""Work that is done once per deployment, whatever the number of hosts: the list that stewards run from.

A module that has such work decorates it, and is named in `control/steward.py` so that it is imported there:

    @duty("usage roll-up", every=60)
    async def roll_up(context: Context) -> None: ...

A duty runs on the host that holds the deployment's advisory lock, never beside itself. The lock is lost with its
connection, so two hosts may for a moment run the same duty: what must not happen twice needs a condition in its SQL.
What it raises is logged; it is tried again after `every` seconds.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Duty:
    """`work` gets the steward's `Context`; `every` in seconds."""

    name: str
    every: float
    work: Work


DUTIES: dict[str, Duty] = {}


def duty(name: str, *, every: float) -> Callable[[Work], Work]:
    """Have the decorated function run every `every` seconds, once per deployment."""

    def register(work: Work) -> Work:
        if name in DUTIES:
            raise ValueError(f"two duties are called {name!r}")
        DUTIES[name] = Duty(name, every, work)
        return work

    return register
