#!/usr/bin/env bash
# The service over the PostgreSQL at DATABASE_URL and the Redis at REDIS_URL: an account, an instance, a value.
# REDISGATE: the command, by default .venv/bin/redisgate.
set -euo pipefail
cd "$(dirname "$0")/../.."
redisgate=${REDISGATE:-.venv/bin/redisgate}
port=${PORT:-3900}
url=http://127.0.0.1:$port
state=$(mktemp -d)
export REDISGATE_STATE_DIR=$state REDISGATE_HOST=127.0.0.1 REDISGATE_PORT=$port REDISGATE_WORKERS=1

$redisgate serve &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -rf "$state"' EXIT

field() { python3 -c 'import json, sys; value = json.load(sys.stdin)
for name in sys.argv[1].split("."): value = value[name]
print(value)' "$1"; }
call() { curl --silent --show-error --fail-with-body --max-time 30 --header 'Content-Type: application/json' "$@"; }

curl --silent --fail --output /dev/null --retry 60 --retry-delay 1 --retry-all-errors "$url/health/ready"
name=services$$
call "$url/auth/register" --data "{\"email\": \"$name@example.com\", \"username\": \"$name\", \"password\": \"SecurePass123!\"}" >/dev/null
session=$(call "$url/auth/login" --data "{\"email\": \"$name@example.com\", \"password\": \"SecurePass123!\"}")
organization=$(field data.organization_id <<<"$session")
token=$(field data.token <<<"$session")
instance=$(call "$url/api/organizations/$organization/redis-instances" --header "Authorization: Bearer $token" \
  --data "{\"name\": \"There already\", \"slug\": \"there\", \"max_memory\": 1048576, \"external_url\": \"$REDIS_URL\"}")
test "$(field data.status <<<"$instance")" = running
rest=$(field data.rest_token <<<"$instance")
test "$(call "$url/set/$name/world" --header "Authorization: Bearer $rest" | field result)" = OK
test "$(call "$url/get/$name" --header "Authorization: Bearer $rest" | field result)" = world
call "$url/del/$name" --header "Authorization: Bearer $rest" >/dev/null
echo "the service works over $(call "$url/info/server" --header "Authorization: Bearer $rest" | grep -oE '(redis|valkey)_version:[0-9.]+' | tail -1)"
