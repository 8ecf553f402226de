"""The variables and the tokens file of serverless-redis-http, understood as they are.

https://github.com/hiett/serverless-redis-http. Its users switch by changing
an image name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redisgate.config import InstanceConfig, TokenConfig

DEFAULT_FILE = Path("srh-config") / "tokens.json"
DEFAULT_PORT = 80
DEFAULT_MAX_CONNECTIONS = 3


@dataclass(frozen=True)
class SrhSettings:
    """What they say, in our terms."""

    instances: "list[InstanceConfig]"
    tokens: "list[TokenConfig]"
    port: int
    host: str


def is_set(environ: Mapping[str, str]) -> bool:
    """Whether the variables describe a gateway."""
    return "SRH_MODE" in environ or "SRH_CONNECTION_STRING" in environ


def load(environ: Mapping[str, str], cwd: Path, file: str | None) -> SrhSettings | None:
    """The settings that the variables and the file describe; None if there are none.

    Raises:
        redisgate.config.ConfigError: they are wrong.
    """
    from redisgate.config import ConfigError

    mode = environ.get("SRH_MODE", "env" if "SRH_CONNECTION_STRING" in environ else "file")
    if mode not in ("env", "file"):
        raise ConfigError(f"SRH_MODE: expected env or file, not {mode!r}")
    if mode == "env" and file is None:
        missing = [name for name in ("SRH_TOKEN", "SRH_CONNECTION_STRING") if not environ.get(name)]
        if missing:
            raise ConfigError(f"{missing[0]} is not set; SRH_MODE=env needs SRH_TOKEN and SRH_CONNECTION_STRING")
        entries = {
            environ["SRH_TOKEN"]: {
                "srh_id": "env_config_connection",
                "connection_string": environ["SRH_CONNECTION_STRING"],
                "max_connections": environ.get("SRH_MAX_CONNECTIONS", DEFAULT_MAX_CONNECTIONS),
            }
        }
        where = "SRH_CONNECTION_STRING"
    else:
        path = cwd / (file or DEFAULT_FILE)
        if file is None and "SRH_MODE" not in environ and not path.exists():
            return None
        where = str(path)
        try:
            entries = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, dict) or not entries:
            raise ConfigError(f"{path}: expected an object of tokens, each with srh_id and connection_string")
    instances: list[InstanceConfig] = []
    tokens: list[TokenConfig] = []
    for index, (token, entry) in enumerate(entries.items()):
        _add(instances, tokens, token, entry, index, where)
    port = environ.get("SRH_PORT", str(DEFAULT_PORT))
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError("SRH_PORT: expected a port number")
    ipv6 = environ.get("SRH_IPV6", "").lower() in ("1", "true")
    return SrhSettings(instances, tokens, int(port), "::" if ipv6 else "0.0.0.0")


def _add(
    instances: "list[InstanceConfig]", tokens: "list[TokenConfig]", token: str, entry: Any, index: int, where: str
) -> None:
    from redisgate.config import ConfigError, InstanceConfig, TokenConfig
    from resp.address import parse_url

    place = f"{where}: entry {index + 1}"
    if not token or not isinstance(entry, dict) or not isinstance(entry.get("connection_string"), str):
        raise ConfigError(f"{place} needs a token, and an object with srh_id and connection_string")
    name = str(entry.get("srh_id") or f"srh-{index + 1}")
    try:
        address = parse_url(entry["connection_string"])
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    size = str(entry.get("max_connections", DEFAULT_MAX_CONNECTIONS))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", size):
        raise ConfigError(f"{place}: max_connections is not a number above zero")
    known = next((instance for instance in instances if instance.id == name), None)
    if known is None:
        # One connection more than one is the least that keeps slow commands out of the others' way.
        instances.append(InstanceConfig(id=name, slug=name, address=address, pool_size=max(2, int(size))))
    elif known.address != address:
        raise ConfigError(f"{place}: srh_id {name!r} is used for two connection strings")
    tokens.append(TokenConfig(token=token, instance=name, name=f"{name}-{index + 1}"))
