"""The OpenAPI document, the page for people, and the service held against its own description."""

import re
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from control.http import ENDPOINTS
from control.openapi import docs_page, document, routes_table
from tests.control.conftest import Service
from tests.http import Client

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_every_endpoint_is_described() -> None:
    described = {(path, method.upper()) for path, methods in document()["paths"].items() for method in methods}
    assert described == set(ENDPOINTS)
    names = [operation["operationId"] for methods in document()["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    for entry in ENDPOINTS.values():
        assert entry.summary, entry
        assert entry.tags, entry
        assert entry.description, entry


def test_every_reference_leads_somewhere() -> None:
    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                found.add(value["$ref"])
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document())
    assert found
    assert found <= {f"#/components/schemas/{name}" for name in document()["components"]["schemas"]}


def test_the_list_of_routes_in_the_docs_is_current() -> None:
    text = (Path(__file__).parents[2] / "docs" / "API.md").read_text()
    assert text.endswith(routes_table()), "python -m control.openapi makes the last section of docs/API.md"


def test_administrators_have_one_section_and_figures_that_are_described() -> None:
    schemas = document()["components"]["schemas"]
    assert {entry.tags for (path, _), entry in ENDPOINTS.items() if path.startswith("/api/admin/")} == {("Platform",)}
    for name, one in schemas["GatewayStatus"]["properties"].items():
        assert one.get("type") != "object", f"{name}: of what?"
    assert "requests_per_second" in schemas["Totals"]["properties"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = docs_page()
    assert "<script" not in text
    assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", text)
    assert "@import" not in text
    assert "url(" not in text
    for path, method in ENDPOINTS:
        assert f"{method}</span>{path}" in text


@pytest.fixture(scope="module")
def credentials(service: Service) -> dict[str, str]:
    """Of an organization's owner who is an administrator of the platform; with the organization's id."""
    person = {"email": "owner@example.com", "username": "owner", "password": "A-long-password-1"}
    with Client(service.port, token=None) as client:
        assert client.post("/auth/register", person).status == 201
        data = client.post("/auth/login", person).json()["data"]
    organization = f"/api/organizations/{data['organization_id']}"
    with Client(service.port, token=data["token"]) as client:
        instance = client.post(f"{organization}/redis-instances", {"name": "one", "max_memory": 1 << 20}).json()["data"]
        key = client.post(f"{organization}/api-keys", {"name": "one"}).json()["data"]["api_key"]
    ids = {"org_id": data["organization_id"], "instance_id": instance["id"], "key_id": key["id"]}
    return {"token": data["token"], **ids}


# They end the session that the others need, or the organization; streams do not end at all (test_console has them).
ENDING = re.compile(r"/auth/(logout|refresh|sessions|password)|/leave$|^DELETE .*org_id}$|/(monitor|subscribe)$")
OPERATIONS = {
    f"{operation.method.upper()} {operation.path}": operation
    for operation in (found.ok() for found in schemathesis.openapi.from_dict(document()).get_all_operations())
}


def _cases() -> list[Any]:
    """Each operation with input that fits its description, and with input that does not."""
    found = []
    for name, operation in OPERATIONS.items():
        if ENDING.search(name):
            continue
        described = operation.definition.raw
        modes = list(GenerationMode) if {"parameters", "requestBody"} & set(described) else [GenerationMode.POSITIVE]
        found += [pytest.param(name, mode, id=f"{name} {mode.value}") for mode in modes]
    return found


@pytest.mark.parametrize(("name", "mode"), _cases())
def test_answers_are_as_described(
    name: str, mode: GenerationMode, service: Service, credentials: dict[str, str]
) -> None:
    @seed(1)
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=OPERATIONS[name].as_strategy(generation_mode=mode))
    def answers(case: schemathesis.Case) -> None:
        for parameter in case.path_parameters or {}:
            if parameter in credentials and (parameter == "org_id" or mode is GenerationMode.POSITIVE):
                case.path_parameters[parameter] = credentials[parameter]
        headers = {"Authorization": f"Bearer {credentials['token']}"}
        response = case.call(base_url=service.url, headers=headers)
        case.validate_response(response, checks=CHECKS)

    answers()
