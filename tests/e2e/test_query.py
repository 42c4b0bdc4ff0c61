"""No route takes a query parameter and ignores it."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .conftest import Server

pytestmark = pytest.mark.slow
PATHS_WITHOUT_SCHEMA = ("/dashboard", "/docs")


def operations(server: Server) -> Iterator[tuple[str, str, list[str]]]:
    """Method, path and declared query parameters of everything that the server says it has."""
    schema: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            names = [each["name"] for each in operation.get("parameters", []) if each["in"] == "query"]
            yield method.upper(), re.sub(r"{\w+}", "x", path), names


def refusal(server: Server, method: str, path: str, query: str) -> tuple[int, str, str]:
    answer = httpx.request(method, f"{server.url}{path}?{query}")
    error = answer.json().get("error", {})
    if path.startswith("/v1/messages"):
        error = error["message"]
    if isinstance(error, str):  # as TGI, Ollama and Anthropic word it, which have neither code nor place
        name = query.partition("=")[0]
        return (
            answer.status_code,
            "unsupported_field" if "no query parameter" in error else error,
            name * (name in error),
        )
    return answer.status_code, error.get("code"), error.get("param")


def test_every_route_refuses_what_it_does_not_know(server: Server) -> None:
    seen = list(operations(server))
    assert {"/health", "/v1/stats", "/v1/usage", "/v1/models/x", "/v1/completions"} <= {path for _, path, _ in seen}
    for method, path, _ in seen:
        for query in ("nonsense=1", "nonsense", "nonsense=1&nonsense=2", "tenants=x", "Tenant=x"):
            name = query.partition("=")[0]
            assert refusal(server, method, path, query) == (400, "unsupported_field", name), (method, path)


def test_nothing_may_be_said_twice(server: Server) -> None:
    declared = [(method, path, name) for method, path, names in operations(server) for name in names]
    assert len(declared) > 8
    for method, path, name in declared:
        assert refusal(server, method, path, f"{name}=1&{name}=1")[::2] == (400, name), (method, path)


@pytest.mark.parametrize("path", PATHS_WITHOUT_SCHEMA)
def test_pages_for_people_take_any_link(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}?utm_source=mail").status_code == 200


def test_a_long_name_is_cut_in_the_answer(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health?{'x' * 5000}=1")
    assert (answer.status_code, len(answer.content) < 1000) == (400, True)
