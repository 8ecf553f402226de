"""What `kubectl get` shows: the Table that a server makes, with the printer columns of a custom resource."""

import datetime
import re
from typing import Any

Object = dict[str, Any]

NAME = {"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}
AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}


def wanted(accept: str) -> bool:
    return "as=Table" in accept


def table(items: list[Object], columns: list[Object], metadata: Object) -> Object:
    """`columns` are additionalPrinterColumns; without any, the age."""
    columns = columns or [AGE]
    shown = [
        {"description": "", "format": "", "priority": 0} | {k: v for k, v in column.items() if k != "jsonPath"}
        for column in columns
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": [NAME, *shown],
        "rows": [
            {
                "cells": [item["metadata"]["name"], *(_cell(item, column) for column in columns)],
                "object": {
                    "kind": "PartialObjectMetadata",
                    "apiVersion": "meta.k8s.io/v1",
                    "metadata": item["metadata"],
                },
            }
            for item in items
        ],
    }


def _cell(item: Object, column: Object) -> object:
    value = json_path(item, column["jsonPath"])
    if column["type"] == "date":
        return "<unknown>" if value is None else _age(str(value))
    return value


def json_path(item: Any, path: str) -> Any:
    """Of `.spec.mode` and `.status.conditions[?(@.type=="Ready")].status`; None for what is not there."""
    for name, key, value in re.findall(r'\.([A-Za-z0-9_-]+)(?:\[\?\(@\.(\w+)=="([^"]*)"\)\])?', path):
        item = item.get(name) if isinstance(item, dict) else None
        if key:
            item = next((entry for entry in item or () if entry.get(key) == value), None)
    return item


def _age(time: str) -> str:
    since = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time.replace("Z", "+00:00"))
    seconds = max(int(since.total_seconds()), 0)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
