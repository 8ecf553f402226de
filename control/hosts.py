"""The machines that run local instances: who this one is, what there is on the others, which are away."""

import contextlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from control.database import Connection, Database
from redisgate.config import ConfigError

HOST_FILE: Final = "host-id"
"""In the state directory: who this host is, for ever."""
AWAY_SECONDS: Final = 60.0
"""A host that has not been heard of for so long counts as away."""


def host_id(state_dir: Path) -> UUID:
    """The id of this host; made and kept when it is asked for first.

    Raises:
        ConfigError: it can be neither read nor written.
    """
    path = state_dir / HOST_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            return UUID(path.read_text().strip())
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(f"{uuid4()}\n")
        # Whoever links first decides.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        new.unlink()
        return UUID(path.read_text().strip())
    except OSError as error:
        raise ConfigError(f"cannot keep this host's id in {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} does not hold the id of this host; remove it to have a new one made") from error


async def register(database: Database, host: UUID, name: str, redis_versions: list[str]) -> None:
    """Say that a host is there, and what it can run."""
    await database.execute(
        "INSERT INTO hosts (id, name, redis_versions) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE"
        " SET name = $2, redis_versions = $3, seen_at = now()",
        host,
        name,
        redis_versions,
    )


async def is_here(connection: Connection, host: UUID) -> bool:
    """Whether a host has been heard of lately."""
    found = await connection.fetchval(
        "SELECT true FROM hosts WHERE id = $1 AND seen_at > now() - $2::interval", host, timedelta(seconds=AWAY_SECONDS)
    )
    return found is True


async def redis_versions(database: Database) -> list[str]:
    """What the hosts that are here can run; empty where none is."""
    rows = await database.fetch(
        "SELECT DISTINCT version FROM hosts, unnest(redis_versions) AS version WHERE seen_at > now() - $1::interval",
        timedelta(seconds=AWAY_SECONDS),
    )
    return sorted(row["version"] for row in rows)


async def note_those_away(database: Database) -> list[UUID]:
    """Say of instances whose host is away that they are in error; ids of those that this changed.

    What was not begun there is free to be made elsewhere. When the host is back, its steward finds its instances as
    they are.
    """
    away = timedelta(seconds=AWAY_SECONDS)
    async with database.transaction() as connection:
        await connection.execute(
            "UPDATE instances SET host_id = NULL FROM hosts WHERE hosts.id = host_id AND seen_at < now() - $1::interval"
            " AND status = 'pending' AND provisioned_at IS NULL",
            away,
        )
        rows = await connection.fetch(
            "UPDATE instances SET status = 'error', status_at = now(), status_reason = 'its host, ' || hosts.name ||"
            " ', has not been heard of since ' || to_char(seen_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS \"UTC\"')"
            " FROM hosts WHERE hosts.id = host_id AND seen_at < now() - $1::interval"
            " AND desired_state <> 'deleted' AND status NOT IN ('error', 'stopped') RETURNING instances.id",
            away,
        )
    return [row["id"] for row in rows]
