"""What a CustomResourceDefinition says of its objects: pruning, defaults, the structural schema and the rules in CEL.

The words of the messages are those of the API server, and each begins with the field.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any

import celpy
import celpy.celtypes

Object = dict[str, Any]
MISSING = object()

SUFFIXES = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "P": Decimal(10) ** 15,
    "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10,
    "Mi": Decimal(2) ** 20,
    "Gi": Decimal(2) ** 30,
    "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50,
    "Ei": Decimal(2) ** 60,
}
QUANTITY = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)(?:([eE][+-]?[0-9]+)|([numkMGTPE]|[KMGTPE]i))?")
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def quantity(text: str) -> Decimal:
    """Of 1Gi, 500m, 1e3. Raises ValueError."""
    match = QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity")
    number = Decimal(match[1] + (match[2] or ""))
    return number * SUFFIXES[match[3] or ""]


def unknown_fields(value: object, schema: Object, path: str = "") -> Iterator[str]:
    """What strict decoding complains of."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or not schema:
        return
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for name, inner in value.items():
            yield from unknown_fields(inner, schema["additionalProperties"], f"{path}.{name}")
    elif isinstance(value, dict) and schema.get("type") == "object":
        for name, inner in value.items():
            if not path and name in {"apiVersion", "kind", "metadata"}:
                continue
            at = f"{path}.{name}".lstrip(".")
            known = schema.get("properties", {}).get(name)
            if known is None:
                yield at
            else:
                yield from unknown_fields(inner, known, at)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unknown_fields(inner, schema.get("items", {}), f"{path}[{index}]")


def pruned(value: Any, schema: Object, root: bool = False) -> Any:
    """Without what the schema does not know, and with its defaults."""
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        keep = schema.get("x-kubernetes-preserve-unknown-fields") or extra is True
        result: Object = {}
        for name, inner in value.items():
            if root and name in {"apiVersion", "kind", "metadata"}:
                result[name] = inner
            elif name in properties:
                if inner is None and not properties[name].get("nullable"):
                    continue
                result[name] = pruned(inner, properties[name])
            elif isinstance(extra, dict):
                result[name] = pruned(inner, extra)
            elif keep:
                result[name] = inner
        for name, its_schema in properties.items():
            if name not in result and "default" in its_schema:
                result[name] = pruned(copy.deepcopy(its_schema["default"]), its_schema)
        return result
    if isinstance(value, list):
        return [pruned(inner, schema.get("items", {})) for inner in value]
    return value


def violations(value: Any, schema: Object, old: Any = MISSING) -> list[str]:
    """`field: what is wrong with it`. What has not changed is not held against anybody, and the rules in CEL are asked
    only about what has the right structure."""
    found = _each(_structural, value, schema, old, "")
    return list(found) or list(_each(_rules, value, schema, old, ""))


def _each(check: Callable[..., Iterable[str]], value: Any, schema: Object, old: Any, path: str) -> Iterator[str]:
    if old is not MISSING and old == value:
        return
    yield from check(value, schema, old, path)
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            before = old.get(name, MISSING) if isinstance(old, dict) else MISSING
            if name in properties:
                yield from _each(check, inner, properties[name], before, f"{path}.{name}".lstrip("."))
            elif isinstance(extra, dict):
                yield from _each(check, inner, extra, before, f"{path}[{name}]")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _each(check, inner, schema.get("items", {}), MISSING, f"{path}[{index}]")


def _rules(value: Any, schema: Object, old: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if re.search(r"\boldSelf\b", rule["rule"]) and old is MISSING:
            continue
        if problem := _broken(rule, value, old):
            at = (path + rule.get("fieldPath", "")).lstrip(".") or "<nil>"
            shown = f'"{_type_name(value)}"' if isinstance(value, dict | list) else _shown(value)
            yield f"{at}: Invalid value: {shown}: {problem}"


def _type_name(value: object) -> str:
    return next(name for name, kind in reversed(TYPES.items()) if isinstance(value, kind))


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _structural(value: Any, schema: Object, old: Any, path: str) -> Iterator[str]:
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str) or isinstance(value, bool):
            yield f'{path}: Invalid value: "{_type_name(value)}": {path} in body must be of type integer,string'
            return
    if kind is not None:
        wrong = not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
        if wrong:
            name = "null" if value is None else _type_name(value)
            yield f'{path}: Invalid value: "{name}": {path} in body must be of type {kind}: "{name}"'
            return
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(_shown(choice) for choice in schema["enum"])
        yield f"{path}: Unsupported value: {_shown(value)}: supported values: {supported}"
    body = f"{path} in body should"
    if isinstance(value, str):
        if len(value.encode()) > schema.get("maxLength", 1 << 30):
            yield f"{path}: Too long: may not be more than {schema['maxLength']} bytes"
        if len(value) < schema.get("minLength", 0):
            yield f'{path}: Invalid value: "{value}": {body} be at least {schema["minLength"]} chars long'
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{path}: Invalid value: \"{value}\": {body} match '{schema['pattern']}'"
        if schema.get("format") == "date-time" and not re.fullmatch(r"\d{4}-\d\d-\d\dT.+(Z|[+-]\d\d:\d\d)", value):
            yield f'{path}: Invalid value: "{value}": {path} in body must be of type date-time: "{value}"'
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            yield f"{path}: Invalid value: {value}: {body} be greater than or equal to {schema['minimum']}"
        if value > schema.get("maximum", value):
            yield f"{path}: Invalid value: {value}: {body} be less than or equal to {schema['maximum']}"
    elif isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            yield f"{path}: Too many: {len(value)}: must have at most {schema['maxItems']} items"
        keys = schema.get("x-kubernetes-list-map-keys")
        seen: list[object] = []
        for index, item in enumerate(value):
            mark = [item.get(key) for key in keys] if keys and isinstance(item, dict) else item
            if mark in seen and schema.get("x-kubernetes-list-type") in {"set", "map"}:
                yield f"{path}[{index}]: Duplicate value: {_shown(item)}"
            seen.append(mark)
    elif isinstance(value, dict):
        if len(value) > schema.get("maxProperties", len(value)):
            yield f"{path}: Too many: {len(value)}: must have at most {schema['maxProperties']} items"
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{path}.{name}".lstrip(".") + ": Required value"


# CEL


def _broken(rule: Object, value: Any, old: Any) -> str:
    """Why `rule` does not hold, "" if it does."""
    names = {"self": celpy.json_to_cel(value)}
    if old is not MISSING:
        names["oldSelf"] = celpy.json_to_cel(old)
    try:
        holds = evaluate(rule["rule"], names)
    except (celpy.CELEvalError, ValueError) as error:
        return f"rule evaluation error: {error}"
    return "" if holds else str(rule.get("message") or f"failed rule: {rule['rule']}")


def evaluate(expression: str, names: dict[str, Any]) -> Any:
    """The value of an expression of CEL, with Kubernetes' quantities."""
    return _program(expression).evaluate(names)


@functools.cache
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    # `in` and `all` are macros; duration() of the standard is Go's
    functions = {
        "isQuantity": _is_quantity,
        "quantity": _quantity,
        "compareTo": lambda a, b: celpy.celtypes.IntType((a > b) - (a < b)),
        "isGreaterThan": lambda a, b: celpy.celtypes.BoolType(a > b),
        "isLessThan": lambda a, b: celpy.celtypes.BoolType(a < b),
        "sum": lambda items: sum(items, start=celpy.celtypes.IntType(0)),
    }
    return environment.program(environment.compile(expression), functions=functions)


def _is_quantity(text: Any) -> Any:
    return celpy.celtypes.BoolType(QUANTITY.fullmatch(str(text)) is not None)


class _Quantity(Decimal):
    """A value that cel-python passes through as it is."""


def _quantity(text: Any) -> Any:
    return _Quantity(quantity(str(text)))
