"""What RedisGate is compared with. Each is started from a package; what is not installed is named as missing."""

import importlib.util
import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trustme

from benchmarks.processes import Server, cores, free_port, http_answers

TOKEN = "0123456789abcdef0123456789abcdef"
AUTHORIZATION = f"Authorization: Bearer {TOKEN}"
REQUIRED = ("RedisGate", "floor", "webdis", "nginx+Lua", "FastAPI")
"""A recorded run needs these."""


class Missing(Exception):
    """A peer that is not installed, and how to install it."""


@dataclass
class Peer:
    """A running server and how to ask it."""

    name: str
    server: Server
    port: int
    get: str
    """Path of a GET of `key:{n}`; `%s` is the key."""
    set: str
    """Path of a SET; `%s` is the key."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _program(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Missing(f"{name} is not installed; Debian, Ubuntu: apt-get install {package}")
    return found


def _redis_answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(b"PING\r\n")
        return sock.recv(16).startswith(b"+PONG")


def start_redis(*arguments: str) -> tuple[Server, int]:
    """A Redis without persistence, and its TCP port."""
    directory = tempfile.mkdtemp(prefix="rgbench")
    port = free_port()
    command = [_program("redis-server", "redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--save", "", "--appendonly", "no", "--dir", directory, "--loglevel", "warning"]
    command += ["--maxclients", "20000", *arguments]
    return Server(command, cores()[1]).wait_until(lambda: _redis_answers(port)), port


def start_redis_tls() -> tuple[Server, str]:
    """A Redis that speaks TLS too, and the configuration of a gateway in front of it."""
    directory = Path(tempfile.mkdtemp(prefix="rgbench"))
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    for name, file in (("cert", "cert.pem"), ("key", "key.pem"), ("ca-cert", "ca.pem")):
        tls += [f"--tls-{name}-file", str(directory / file)]
    server, plain_port = start_redis(*tls)
    with socket.create_connection(("127.0.0.1", plain_port), timeout=5) as sock:
        sock.sendall(b"SET key:1 0123456789\r\n")
        sock.recv(16)
    config = f"""
        [[instances]]
        id = "tls"
        url = "rediss://127.0.0.1:{port}"
        tls_ca_file = "{directory / "ca.pem"}"
        [[tokens]]
        token = "{TOKEN}"
        name = "tls"
    """
    return server, config


def start_redisgate(
    redis_port: int,
    *,
    workers: int = 1,
    affinity: set[int] | None = None,
    arguments: Sequence[str] = (),
    config: str | None = None,
    name: str = "RedisGate",
) -> Peer:
    """The gateway as a user gets it: authentication, limits, ordering, all on. `config` replaces the one instance."""
    port = free_port()
    command = [sys.executable, "-m", "redisgate", "serve", "--port", str(port), "--workers", str(workers), *arguments]
    state = tempfile.mkdtemp(prefix="rgbench")
    environ = {"REDISGATE_STATE_DIR": state}
    if config is None:
        environ |= {"REDISGATE_REDIS_URL": f"redis://127.0.0.1:{redis_port}", "REDISGATE_TOKEN": TOKEN}
    else:
        path = Path(state) / "redisgate.toml"
        path.write_text(config)
        command += ["--config", str(path)]
    server = Server(command, affinity or cores()[0], environ)
    server.wait_until(http_answers(port, "/health/ready"))
    return Peer(name, server, port, "/get/%s", "/set/%s/0123456789")


def start_floor(redis_port: int) -> Peer:
    port = free_port()
    server = Server([sys.executable, "-m", "benchmarks.floor", str(port)], cores()[0])
    server.wait_until(http_answers(port, "/"))
    return Peer("floor", server, port, "/get/%s", "/set/%s/0123456789")


def start_webdis(redis_port: int) -> Peer:
    program = _program("webdis", "webdis")
    port = free_port()
    path = Path(tempfile.mkdtemp(prefix="rgbench")) / "webdis.json"
    settings = {
        "redis_host": "127.0.0.1",
        "redis_port": redis_port,
        "http_host": "127.0.0.1",
        "http_port": port,
        "threads": 1,
        "pool_size": 20,
        "daemonize": False,
        "database": 0,
        "verbosity": 1,
        "logfile": str(path.with_suffix(".log")),
        "http_max_request_size": 256 << 20,
    }
    path.write_text(json.dumps(settings))
    server = Server([program, path], cores()[0], directory=path.parent)  # it writes webdis.log where it starts
    server.wait_until(http_answers(port, "/PING"))
    return Peer("webdis", server, port, "/GET/%s", "/SET/%s/0123456789")


_NGINX = """
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log error;
{modules}
events {{ worker_connections 16384; }}
http {{
  access_log off;
  default_type application/octet-stream;
  keepalive_requests 100000000;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  lua_package_path "/usr/share/lua/5.1/?.lua;;";
  init_by_lua_block {{ redis = require "nginx.redis" }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    root {directory};
    location /file/ {{ sendfile on; }}
    location ~ ^/(get|set)/([^/]+)(?:/(.+))?$ {{
      default_type application/json;
      content_by_lua_block {{
        if ngx.var.http_authorization ~= "Bearer {token}" then return ngx.exit(401) end
        local client = redis:new()
        client:set_timeout(10000)
        local ok, problem = client:connect("127.0.0.1", {redis_port})
        if not ok then ngx.status = 502; ngx.say(problem); return end
        local value
        if ngx.var[1] == "get" then value = client:get(ngx.var[2]) else value = client:set(ngx.var[2], ngx.var[3]) end
        client:set_keepalive(60000, 256)
        if value == ngx.null then ngx.print('{{"result":null}}') else ngx.print('{{"result":"', value, '"}}') end
      }}
    }}
  }}
}}
"""


def start_nginx_lua(redis_port: int) -> Peer:
    program = _program("nginx", "nginx")
    modules = ""
    for module in ("ndk_http_module.so", "ngx_http_lua_module.so"):
        path = Path("/usr/lib/nginx/modules") / module
        if not path.exists():
            raise Missing("nginx's Lua module is not installed; Debian, Ubuntu: apt-get install libnginx-mod-http-lua")
        modules += f"load_module {path};\n"
    if not Path("/usr/share/lua/5.1/nginx/redis.lua").exists():
        raise Missing("Lua's Redis module is not installed; Debian, Ubuntu: apt-get install lua-nginx-redis")
    directory = Path(tempfile.mkdtemp(prefix="rgbench"))
    directory.chmod(0o755)
    (directory / "file").mkdir()
    (directory / "file" / "100KiB").write_bytes(b"x" * 102_400)
    port = free_port()
    path = directory / "nginx.conf"
    path.write_text(_NGINX.format(directory=directory, modules=modules, port=port, redis_port=redis_port, token=TOKEN))
    server = Server([program, "-c", path, "-p", directory, "-e", directory / "error.log"], cores()[0])
    server.wait_until(http_answers(port, "/get/none", AUTHORIZATION + "\r\n"))
    return Peer("nginx+Lua", server, port, "/get/%s", "/set/%s/0123456789")


def start_fastapi(redis_port: int) -> Peer:
    for module in ("fastapi", "uvicorn", "redis"):
        if importlib.util.find_spec(module) is None:
            raise Missing(f"{module} is not installed; `make bench` installs it")
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.fastapi_app:app", "--port", str(port), "--no-access-log"]
    command += ["--loop", "uvloop", "--http", "httptools", "--log-level", "warning", "--workers", "1"]
    environ = {"PEER_REDIS_URL": f"redis://127.0.0.1:{redis_port}", "PEER_TOKEN": TOKEN}
    server = Server(command, cores()[0], environ)
    server.wait_until(http_answers(port, "/get/none", AUTHORIZATION + "\r\n"))
    return Peer("FastAPI", server, port, "/get/%s", "/set/%s/0123456789")


STARTERS = {
    "RedisGate": start_redisgate,
    "floor": start_floor,
    "webdis": start_webdis,
    "nginx+Lua": start_nginx_lua,
    "FastAPI": start_fastapi,
}
