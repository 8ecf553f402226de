"""The FastAPI peer: the few lines that one would write instead, with redis-py. `uvicorn benchmarks.fastapi_app:app`."""

import os

import redis.asyncio
from fastapi import FastAPI, Header, HTTPException

# Blocking: the default pool fails requests beyond its hundred connections.
pool = redis.asyncio.BlockingConnectionPool.from_url(
    os.environ["PEER_REDIS_URL"], max_connections=100, timeout=30, decode_responses=True
)
client = redis.asyncio.Redis(connection_pool=pool)
app = FastAPI()


def authorize(authorization: str | None) -> None:
    if authorization != "Bearer " + os.environ["PEER_TOKEN"]:
        raise HTTPException(401)


@app.get("/get/{key}")
async def get(key: str, authorization: str | None = Header(None)) -> dict[str, str | None]:
    authorize(authorization)
    return {"result": await client.get(key)}


@app.get("/set/{key}/{value}")
async def set_value(key: str, value: str, authorization: str | None = Header(None)) -> dict[str, str]:
    authorize(authorization)
    await client.set(key, value)
    return {"result": "OK"}
