# The gateway alone: about the size of Python's slim image. Redis is elsewhere:
#   docker build -t redisgate .
#   docker run -p 3000:3000 -e REDISGATE_REDIS_URL=redis://host:6379 -e REDISGATE_TOKEN=... redisgate
# the full image, because its compiler makes the fast form of the wheel
FROM python:3.11 AS build
ENV REDISGATE_BUILD=compiled
WORKDIR /src
COPY requirements/runtime.txt requirements/local.txt requirements/
RUN python -m venv /opt/redisgate \
 && /opt/redisgate/bin/pip install --no-cache-dir --require-hashes -r requirements/runtime.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements/local.txt
COPY . .
RUN /opt/build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/redisgate/bin/pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

FROM python:3.11-slim
LABEL org.opencontainers.image.title="RedisGate" \
      org.opencontainers.image.description="Redis over HTTP" \
      org.opencontainers.image.licenses="MIT"
RUN useradd --system --uid 10001 --no-create-home redisgate \
 && install -d -o redisgate -g redisgate /var/lib/redisgate
COPY --from=build /opt/redisgate /opt/redisgate
ENV PATH=/opt/redisgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    REDISGATE_HOST=0.0.0.0 \
    REDISGATE_STATE_DIR=/var/lib/redisgate
USER 10001
VOLUME /var/lib/redisgate
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["python", "-c", \
  "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health/ready' % os.environ.get('REDISGATE_PORT', '3000'), timeout=2)"]
CMD ["redisgate", "serve"]
