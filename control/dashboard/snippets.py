"""Code that reaches an instance, to be pasted as it is: tests run what can be run here."""

from dataclasses import dataclass
from typing import Final

PLACEHOLDER: Final = "YOUR_TOKEN"
"""Stands where the token belongs, until it is shown."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """`name` is the word of the catalogue and of ids; `title` what people call it."""

    name: str
    title: str
    language: str
    code: str


_SDK = 'const redis = new Redis({{\n  url: "{url}",\n  token: "{token}",\n}})\n'

_SNIPPETS: Final = (
    Snippet(
        "curl",
        "curl",
        "shell",
        'curl "{url}/set/hello/world" -H "Authorization: Bearer {token}"\n'
        'curl "{url}/get/hello" -H "Authorization: Bearer {token}"\n',
    ),
    Snippet(
        "javascript",
        "JavaScript",
        "javascript",
        '// npm install @upstash/redis\nimport {{ Redis }} from "@upstash/redis"\n\n'
        + _SDK
        + '\nawait redis.set("hello", "world")\nconsole.log(await redis.get("hello"))\n',
    ),
    Snippet(
        "python",
        "Python",
        "python",
        "# pip install upstash-redis\nfrom upstash_redis import Redis\n\n"
        'redis = Redis(url="{url}", token="{token}")\n\n'
        'redis.set("hello", "world")\nprint(redis.get("hello"))\n',
    ),
    Snippet(
        "cloudflare",
        "Cloudflare Workers",
        "javascript",
        '// src/index.js; npm install @upstash/redis\nimport {{ Redis }} from "@upstash/redis/cloudflare"\n\n'
        + _SDK
        + "\nexport default {{\n  async fetch(request) {{\n"
        + '    const visits = await redis.incr("visits")\n'
        + "    return new Response(`Visit number ${{visits}}`)\n  }},\n}}\n",
    ),
    Snippet(
        "vercel",
        "Vercel Edge",
        "javascript",
        '// app/api/visits/route.js; npm install @upstash/redis\nimport {{ Redis }} from "@upstash/redis"\n\n'
        'export const runtime = "edge"\n\n'
        + _SDK
        + '\nexport async function GET() {{\n  return Response.json({{ visits: await redis.incr("visits") }})\n}}\n',
    ),
    Snippet(
        "deno",
        "Deno",
        "javascript",
        '// deno run --allow-net --allow-env main.ts\nimport {{ Redis }} from "npm:@upstash/redis"\n\n'
        + _SDK
        + '\nDeno.serve(async () => new Response(`Visit number ${{await redis.incr("visits")}}`))\n',
    ),
    Snippet(
        "fetch",
        "fetch",
        "javascript",
        'const response = await fetch("{url}", {{\n  method: "POST",\n'
        '  headers: {{ Authorization: "Bearer {token}" }},\n'
        '  body: JSON.stringify(["SET", "hello", "world", "EX", 60]),\n}})\n'
        "console.log(await response.json())\n",
    ),
)


def snippets(url: str, token: str | None, redis_cli: str | None) -> list[Snippet]:
    """For an instance at `url`; `redis_cli` are the arguments by which redis-cli reaches it, None: it does not."""
    found = [
        Snippet(one.name, one.title, one.language, one.code.format(url=url, token=token or PLACEHOLDER))
        for one in _SNIPPETS
    ]
    if redis_cli is not None:
        code = f"redis-cli {redis_cli} SET hello world\n"
        found.append(Snippet("redis_cli", "redis-cli", "shell", code))
    return found
