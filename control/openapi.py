"""The API described: the OpenAPI 3.1 document and a page for people, both made from the registry of endpoints.

What every endpoint has in common is said here once: the envelope, lists, the errors that follow from the permission,
the parameters and the body.
"""

import functools
import html
import typing
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

import msgspec

import redisgate
from control.http import ENDPOINTS, MAX_PAGE, MAX_PAGE_LIMIT, Endpoint

_COMPONENT = "#/components/schemas/{name}"
_ERRORS: Final = {
    400: "Some field or parameter is wrong: `data.fields` names each and says what is wrong with it.",
    401: "Nobody known asks: no credential, or one that is not valid any more.",
    403: "The role, or the API key's scopes, do not allow it; or a quota is used up, then `data` has the numbers.",
    404: "It does not exist, or not for who asks.",
    409: "It cannot be, because of what there is already.",
    413: "The body is too large.",
    429: "Too often; `Retry-After` says when to try again.",
    503: "Something that is needed is away, or too much is under way; `Retry-After` says when to try again.",
}
_INTRODUCTION: Final = """\
RedisGate's control plane: accounts, organizations, API keys, quotas, instances.

Every answer is an object with `success`, `data`, `message` and `timestamp`. When `success` is false, `message` says \
what to do about it. Lists are pages: `data` has `items`, `total_count`, `page`, `limit` and `total_pages`.

Sign in with `POST /auth/login` and send the token as `Authorization: Bearer …`; programs send an API key that has \
scopes for managing in the same way. What a role may do in its organization is a table in docs/security.md. Another \
organization's resources are answered 404, as if they did not exist."""


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    endpoints = _all()
    types = [kind for entry in endpoints for kind in (entry.body, entry.response) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, schema_hook=_schema_of_other, ref_template=_COMPONENT)
    by_type = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for entry in endpoints:
        paths[entry.path][entry.method.lower()] = _operation(entry, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RedisGate",
            "version": redisgate.__version__,
            "description": _INTRODUCTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in _tags(endpoints)],
        "paths": dict(paths),
        "components": {
            "schemas": components | {"Error": _ERROR},
            "securitySchemes": {
                "session": {"type": "http", "scheme": "bearer", "description": "the token of POST /auth/login"},
                "apiKey": {"type": "http", "scheme": "bearer", "description": "an API key with scopes for managing"},
            },
        },
    }


def _schema_of_other(kind: type) -> dict[str, Any]:
    if kind is object:
        return {"description": "any value"}  # msgspec takes an empty schema for none
    raise NotImplementedError


_ERROR: Final = {
    "type": "object",
    "properties": {
        "success": {"const": False},
        "data": {
            "type": ["object", "null"],
            "properties": {"fields": {"type": "object", "additionalProperties": {"type": "string"}}},
        },
        "message": {"type": "string"},
        "timestamp": {"type": "string", "format": "date-time"},
    },
    "required": ["success", "data", "message", "timestamp"],
}


def _all() -> list[Endpoint]:
    """In an order that does not depend on which module was imported first."""
    from control.app import ROUTE_MODULES, load_endpoints

    load_endpoints()
    order = {f"control.routes.{name}": index for index, name in enumerate(ROUTE_MODULES)}
    return sorted(ENDPOINTS.values(), key=lambda entry: order[entry.handler.__module__])


def _tags(endpoints: Iterable[Endpoint]) -> list[str]:
    return list(dict.fromkeys(tag for entry in endpoints for tag in entry.tags))


def _operation(entry: Endpoint, schemas: dict[int, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": entry.name,
        "summary": entry.summary,
        "description": _described(entry),
        "tags": list(entry.tags),
        "responses": _responses(entry, schemas),
        "x-permission": entry.permission,
    }
    parameters = _parameters(entry)
    if parameters:
        operation["parameters"] = parameters
    if entry.body is not None:
        operation["requestBody"] = {
            "required": any(field.required for field in msgspec.structs.fields(entry.body)),
            "content": {"application/json": {"schema": schemas[id(entry.body)]}},
        }
    if entry.takes:
        content = {entry.takes: {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    if entry.permission in ("session", "admin"):
        operation["security"] = [{"session": []}]
    elif entry.permission != "public":
        operation["security"] = [{"session": []}, {"apiKey": []}]
    else:
        operation["security"] = []
    return operation


def _described(entry: Endpoint) -> str:
    needs = {
        "public": "Open to all.",
        "session": "For anybody who is signed in.",
        "admin": "For administrators of the platform.",
    }.get(entry.permission, f"Needs the permission `{entry.permission}` in the organization.")
    return f"{entry.description} {needs}".strip()


def _parameters(entry: Endpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in entry.parameters:
        schema = {"type": "string", "format": "uuid"} if name.endswith("_id") else {"type": "string", "minLength": 1}
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if entry.query is not None:
        (schema,), components = msgspec.json.schema_components(
            [entry.query], schema_hook=_schema_of_other, ref_template=_COMPONENT
        )
        described = components[entry.query.__name__]
        for name, schema in described["properties"].items():
            required = name in described.get("required", ())
            found.append({"name": name, "in": "query", "required": required, "schema": schema})
    if entry.listing:
        known = {parameter["name"] for parameter in found}
        for name, high, default in (("page", MAX_PAGE, 1), ("limit", MAX_PAGE_LIMIT, 20)):
            if name not in known:
                schema = {"type": "integer", "minimum": 1, "maximum": high, "default": default}
                found.append({"name": name, "in": "query", "required": False, "schema": schema})
    return found


def _responses(entry: Endpoint, schemas: dict[int, Any]) -> dict[str, Any]:
    if not entry.enveloped:
        content: dict[str, Any] = {entry.content_type: {"schema": {}}}
        success: dict[str, Any] = {"description": entry.summary, "content": content}
    elif entry.status == 204:
        success = {"description": entry.summary}
    else:
        data = {} if entry.response is None else schemas[id(entry.response)]
        if entry.listing:
            data = _listing(data)
        success = {"description": entry.summary, "content": {"application/json": {"schema": _enveloped(data)}}}
    codes = [503]
    if entry.permission != "public":
        codes += [401, 403]
    if entry.body is not None or entry.takes:
        codes += [400, 409, 413]
    if entry.query is not None or entry.listing:
        codes.append(400)
    if entry.parameters or entry.method != "GET":
        codes.append(404)
    if entry.method != "GET":
        codes += [409, 429]
    if entry.permission == "public" and entry.method != "GET":
        codes += [401, 403]
    error = {"application/json": {"schema": {"$ref": _COMPONENT.format(name="Error")}}}
    responses = {str(code): {"description": _ERRORS[code], "content": error} for code in sorted(set(codes))}
    return {str(entry.status): success} | responses


def _enveloped(data: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "success": {"const": True},
            "data": data,
            "message": {"type": "string"},
            "timestamp": {"type": "string", "format": "date-time"},
        },
        "required": ["success", "data", "message", "timestamp"],
    }


def _listing(item: Any) -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0}
    return {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": item},
            "total_count": number,
            "page": number,
            "limit": number,
            "total_pages": number,
        },
        "required": ["items", "total_count", "page", "limit", "total_pages"],
    }


# The page for people, and docs/API.md


def field_rows(kind: type[msgspec.Struct]) -> list[tuple[str, str, bool, str]]:
    """Of each field of a body or query: name, type, whether it is required, its default."""
    rows = []
    for field in msgspec.structs.fields(kind):
        default = (
            "" if field.default in (msgspec.NODEFAULT, msgspec.UNSET) else msgspec.json.encode(field.default).decode()
        )
        if field.default_factory is not msgspec.NODEFAULT:
            default = msgspec.json.encode(field.default_factory()).decode()
        rows.append((field.encode_name, type_text(field.type), field.required, default))
    return rows


def type_text(kind: Any) -> str:
    """A type as people read it: `text of 8 to 128 characters`, `UUID or null`."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        base, *extras = typing.get_args(kind)
        metas = [extra for extra in extras if isinstance(extra, msgspec.Meta)]
        return type_text(base) + "".join(_meta_text(meta) for meta in metas)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    arguments = [argument for argument in typing.get_args(kind) if argument is not msgspec.UnsetType]
    if origin is list or origin is tuple or origin is set:
        return f"list of {type_text(arguments[0])}" if arguments else "list"
    if origin is dict:
        return "object"
    if arguments:
        return " or ".join(type_text(argument) for argument in arguments)
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if kind in plain:
        return plain[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind.__name__
    return {"UUID": "UUID", "datetime": "time"}.get(getattr(kind, "__name__", ""), str(getattr(kind, "__name__", kind)))


def _meta_text(meta: msgspec.Meta) -> str:
    low, high = meta.min_length, meta.max_length
    if low is not None and high is not None:
        return f" of {low} to {high}"
    if low is not None or high is not None:
        return f" of at least {low}" if low is not None else f" of at most {high}"
    low, high = meta.ge, meta.le  # type: ignore[assignment]
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None or high is not None:
        return f" from {low}" if low is not None else f" up to {high}"
    return ""


def routes_table() -> str:
    """Every route with who may call it: the last section of docs/API.md (`python -m control.openapi`)."""
    lines = ["| route | | needs |", "| --- | --- | --- |"]
    needs = {"public": "nothing", "session": "a session", "admin": "an administrator of the platform"}
    for entry in _all():
        permission = needs.get(entry.permission, f"`{entry.permission}`")
        lines.append(f"| `{entry.method} {entry.path}` | {entry.summary} | {permission} |")
    return "\n".join(lines) + "\n"


_STYLE: Final = """\
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1rem 1.5rem 4rem}
h1{margin-bottom:0}h2{margin-top:3rem;border-bottom:1px solid #8886}
details{border:1px solid #8885;border-radius:6px;margin:.5rem 0;padding:0 .8rem}
summary{cursor:pointer;padding:.5rem 0;overflow-wrap:anywhere}
code{font:.9em ui-monospace,monospace}
.m{display:inline-block;min-width:4.5rem;font-weight:700}
.s{opacity:.75}nav a{margin-right:1rem}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1rem}
td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8883}"""


@functools.cache
def docs_page() -> str:
    """A page that needs nothing but itself."""
    endpoints = _all()
    tags = _tags(endpoints)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>RedisGate API</title><style>{_STYLE}</style>",
        f"<h1>RedisGate API</h1><p class=s>{html.escape(redisgate.__version__)} · ",
        "<a href=/openapi.json>openapi.json</a></p>",
        *(f"<p>{_inline(paragraph)}</p>" for paragraph in _INTRODUCTION.split("\n\n")),
        "<nav>" + "".join(f"<a href='#{_anchor(tag)}'>{html.escape(tag)}</a>" for tag in tags) + "</nav>",
    ]
    for tag in tags:
        parts.append(f"<h2 id='{_anchor(tag)}'>{html.escape(tag)}</h2>")
        parts += [_described_html(entry) for entry in endpoints if tag in entry.tags]
    return "".join(parts) + "</html>"


def _anchor(tag: str) -> str:
    return html.escape(tag.lower().replace(" ", "-"), quote=True)


def _inline(text: str) -> str:
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def _described_html(entry: Endpoint) -> str:
    parts = [
        f"<details id='{entry.name}'><summary><code><span class=m>{entry.method}</span>{html.escape(entry.path)}</code>"
        f" <span class=s>{html.escape(entry.summary)}</span></summary><p>{_inline(_described(entry))}</p>"
    ]
    for title, kind in (("Query", entry.query), ("Body", entry.body)):
        if kind is not None:
            parts.append(f"<table><tr><th>{title}<th>type<th>default")
            for name, text, required, default in field_rows(kind):
                mark = " <b title=required>*</b>" if required else ""
                parts.append(
                    f"<tr><td><code>{html.escape(name)}</code>{mark}<td>{html.escape(text)}"
                    f"<td>{f'<code>{html.escape(default)}</code>' if default else ''}"
                )
            parts.append("</table>")
    if isinstance(entry.response, type) and issubclass(entry.response, msgspec.Struct):
        parts.append(f"<table><tr><th>{'Each item' if entry.listing else 'Data'}<th>type")
        for name, text, _, _ in field_rows(entry.response):
            parts.append(f"<tr><td><code>{html.escape(name)}</code><td>{html.escape(text)}")
        parts.append("</table>")
    parts.append("<table><tr><th>Answer<th>")
    parts += [f"<tr><td>{code}<td>{_inline(text)}" for code, text in _responses_text(entry)]
    return "".join(parts) + "</table></details>"


def _responses_text(entry: Endpoint) -> list[tuple[str, str]]:
    schemas: defaultdict[int, Any] = defaultdict(dict)
    return [(code, response["description"]) for code, response in _responses(entry, schemas).items()]


if __name__ == "__main__":
    print(routes_table(), end="")
