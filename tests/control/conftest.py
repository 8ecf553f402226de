"""Fixtures of the control plane's tests: one PostgreSQL per session, a database per module, an application per test."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import pytest
from starlette.applications import Starlette

from control.app import make_app, make_context
from control.database import Database, connect
from control.embedded import EmbeddedPostgres
from control.http import Context
from control.migrate import migrate
from control.provisioners.local import stop_everything
from redisgate.config import ControlSettings, Settings
from tests.control.service import Api, register
from tests.servers import Gateway, RedisServer

OWNER, APPLICATION = "redisgate_owner", "redisgate_app"
SECRET_KEY = b"tests: 3f1b6f6b2d5b4ad0a8f4b8f0f0c1d2e3"
TEMPLATE = "redisgate_template"

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Urls:
    """The addresses of one database, by role."""

    application: str
    owner: str
    superuser: str


class Server:
    """PostgreSQL with the two roles that the control plane has in production."""

    def __init__(self, directory: Path) -> None:
        self.postgres = EmbeddedPostgres(directory, durable=False)
        self.postgres.start()

    def urls(self, database: str) -> Urls:
        return Urls(
            self.postgres.url(database, APPLICATION, "app"),
            self.postgres.url(database, OWNER, "owner"),
            self.postgres.url(database),
        )

    def run(self, *statements: str, database: str = "postgres") -> None:
        """As superuser, outside a transaction."""

        async def execute() -> None:
            connection = await asyncpg.connect(self.postgres.url(database))
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        with asyncio.Runner() as runner:
            runner.run(execute())

    def create(self, *, template: str | None = None) -> str:
        """A new database; its name."""
        name = f"test_{os.getpid()}_{next(_numbers)}"
        source = f" TEMPLATE {template}" if template else ""
        self.run(f"CREATE DATABASE {name} OWNER {OWNER}{source}")
        return name

    def drop(self, name: str) -> None:
        self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running PostgreSQL without data of ours."""
    server = Server(tmp_path_factory.mktemp("postgres"))
    server.run(f"CREATE ROLE {OWNER} LOGIN PASSWORD 'owner'", f"CREATE ROLE {APPLICATION} LOGIN PASSWORD 'app'")
    yield server
    server.postgres.stop()


@pytest.fixture(scope="session")
def migrated(postgres_server: Server) -> str:
    """The name of a database with all migrations, to make others from."""
    postgres_server.run(f"CREATE DATABASE {TEMPLATE} OWNER {OWNER}")
    urls = postgres_server.urls(TEMPLATE)
    with asyncio.Runner() as runner:
        runner.run(migrate(ControlSettings(database_url=urls.application, database_migration_url=urls.owner)))
    return TEMPLATE


@pytest.fixture
def empty_database(postgres_server: Server) -> Iterator[Urls]:
    """A database without any migration, for one test."""
    name = postgres_server.create()
    yield postgres_server.urls(name)
    postgres_server.drop(name)


@pytest.fixture(scope="module")
def database_urls(postgres_server: Server, migrated: str) -> Iterator[Urls]:
    """A migrated database that the tests of one module share."""
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


@pytest.fixture(scope="module")
def settings(database_urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """For the module's database; passwords cost next to nothing."""
    return make_settings(database_urls, tmp_path_factory.mktemp("state"))


def make_settings(urls: Urls, state_dir: Path, **control: object) -> Settings:
    """Settings for a database; `control` are further settings of the control plane."""
    defaults: dict[str, object] = {
        "database_url": urls.application,
        "database_migration_url": urls.owner,
        "mode": "dev",
        "public_url": "http://redisgate.test",
        "argon2_time_cost": 1,
        "argon2_memory": 64 * 1024,
    }
    return Settings(
        state_dir=state_dir,
        secret_key=SECRET_KEY,
        secret_key_is_default=False,
        control=ControlSettings(**(defaults | control)),  # type: ignore[arg-type]
    )


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """As the application's role."""
    database = Database(settings.control.database_url, pool_size=10)
    yield database
    await database.close()


@pytest.fixture
async def owner(database_urls: Urls) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection as the role that owns the tables."""
    connection = await connect(database_urls.owner)
    yield connection
    await connection.close()


@pytest.fixture
async def context(settings: Settings) -> AsyncIterator[Context]:
    """What business functions need."""
    context = make_context(settings, name="tests")
    yield context
    await context.close()


@pytest.fixture
def app(context: Context) -> Starlette:
    """The whole control plane as an ASGI application."""
    return make_app(context)


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """A browser without cookies, connected to `app` without a network."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True, client=("203.0.113.7", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test", cookies=None) as client:
        yield client


class Service(Gateway):
    """`redisgate serve` with a control plane, and an end for the redis-servers that it would leave running."""

    def __init__(self, urls: Urls, state_dir: Path, *arguments: str, **environ: str) -> None:
        self.state_dir = state_dir
        defaults = {
            "DATABASE_URL": urls.application,
            "REDISGATE_DATABASE_MIGRATION_URL": urls.owner,
            "REDISGATE_MODE": "dev",
            "REDISGATE_SECRET_KEY": SECRET_KEY.decode(),
            "REDISGATE_STATE_DIR": str(state_dir),
            "REDISGATE_ARGON2_TIME_COST": "1",
            "REDISGATE_ARGON2_MEMORY": "64KiB",
            "REDISGATE_ALLOW_PRIVATE_ADDRESSES": "true",
        }
        super().__init__(defaults | environ, arguments)

    def kill(self) -> None:
        super().kill()
        stop_everything(self.state_dir / "instances")


@pytest.fixture(scope="module")
def service_settings() -> dict[str, str]:
    """Environment variables of the module's service, for a module to say."""
    return {}


@pytest.fixture(scope="module")
def service(
    database_urls: Urls, tmp_path_factory: pytest.TempPathFactory, service_settings: dict[str, str]
) -> Iterator[Service]:
    """Two workers and a steward over the module's database."""
    service = Service(database_urls, tmp_path_factory.mktemp("service"), "--workers", "2", **service_settings)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis that is somebody's own, to be registered as an external instance."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def owner_api(service: Service) -> Api:
    """The owner of an organization."""
    return register(service.port, "owner")


@pytest.fixture(scope="module")
def viewer_api(service: Service, owner_api: Api) -> Api:
    """Who only looks on in the owner's organization."""
    person = register(service.port, "viewer")
    invitation = owner_api.call("POST", "invitations", {"email": person.email, "role": "viewer"})
    person.call("POST", "/api/invitations/accept", {"token": invitation["token"]})
    return Api(service.port, person.token, owner_api.organization_id, person.email)
