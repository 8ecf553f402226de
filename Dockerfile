# Two images from one file:
#
#   docker build -t redisgate .                     the whole service for a trial: with PostgreSQL and Redis of its own
#   docker run -p 127.0.0.1:3000:3000 redisgate     http://localhost:3000, demo@redisgate.dev / Demo123456!
#
# (`-p 3000:3000` would let in everybody who reaches this machine: that account administers, and its password stands above.)
#
#   docker build --target gateway -t redisgate:gateway .      the gateway and the control plane alone, for production
#   docker run --read-only --tmpfs /tmp -p 3000:3000 -e REDISGATE_REDIS_URL=redis://host:6379 -e REDISGATE_TOKEN=... redisgate:gateway

# The full image, because its compiler makes the fast form of the wheel.
FROM python:3.11-bookworm AS build
ENV REDISGATE_BUILD=compiled \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements/ requirements/
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes -r requirements/local.txt
RUN python -m venv /opt/redisgate \
 && /opt/redisgate/bin/pip install --require-hashes -r requirements/image.txt
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY resp/ resp/
COPY redisgate/ redisgate/
COPY control/ control/
COPY templates/ templates/
COPY migrations/ migrations/
RUN /opt/build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/redisgate/bin/pip install --no-index --no-deps /wheels/*.whl \
 && /opt/redisgate/bin/pip uninstall --yes pip setuptools

FROM python:3.11-slim-bookworm AS gateway
LABEL org.opencontainers.image.title="RedisGate" \
      org.opencontainers.image.description="Redis over HTTP" \
      org.opencontainers.image.licenses="MIT"
RUN groupadd --system --gid 10001 redisgate \
 && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/redisgate redisgate \
 && install -d -o redisgate -g redisgate /var/lib/redisgate
COPY --from=build /opt/redisgate /opt/redisgate
ENV PATH=/opt/redisgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    REDISGATE_HOST=0.0.0.0 \
    REDISGATE_PORT=3000 \
    REDISGATE_STATE_DIR=/var/lib/redisgate
USER 10001:10001
WORKDIR /var/lib/redisgate
VOLUME /var/lib/redisgate
EXPOSE 3000
# by the variables that `serve` has; with its flags instead of variables, give this one the same
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["redisgate", "healthcheck"]
CMD ["redisgate", "serve"]

# The trial: a redis-server from Debian, a PostgreSQL from its wheel, and an administrator whose password everybody knows.
FROM gateway AS service
USER 0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/opt/build,target=/opt/build \
    --mount=type=bind,source=requirements/embedded.txt,target=/tmp/embedded.txt \
    /opt/build/bin/pip --python /opt/redisgate/bin/python install --no-cache-dir --require-hashes -r /tmp/embedded.txt
USER 10001:10001
CMD ["redisgate", "dev", "--host", "0.0.0.0", "--port", "3000", "--data", "/var/lib/redisgate"]
