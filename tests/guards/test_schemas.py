"""What is wrong with a body is told once, whatever it is: a list of strangers costs one error and not one for each."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

import manylora.api
from manylora.api.strict import Strict

# Of each container that pydantic goes on in after an error, where the schemas of what is in it are.
INSIDE = {**dict.fromkeys(("list", "set", "frozenset", "tuple"), ("items_schema",)), "dict": ("values_schema",)}


def schemas() -> list[type[BaseModel]]:
    """Every schema of the API's modules."""
    for module in pkgutil.iter_modules(manylora.api.__path__, "manylora.api."):
        importlib.import_module(module.name)
    return sorted(
        {each for each in below(BaseModel) if each.__module__.startswith("manylora.api.")},
        key=lambda each: (each.__module__, each.__qualname__),
    )


def below(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in kind.__subclasses__():
        yield each
        yield from below(each)


def patient(schema: Any, path: str = "") -> Iterator[str]:
    """Where a schema goes on after the first thing wrong in a container. Whatever comes is right where all may come."""
    if isinstance(schema, list | tuple):
        for number, each in enumerate(schema):
            yield from patient(each, f"{path}[{number}]")
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if isinstance(kind, str) and not schema.get("fail_fast"):
        inside = (schema.get(name, {"type": "any"}) for name in INSIDE.get(kind, ()))
        if any(isinstance(each, list | tuple) or each["type"] != "any" for each in inside):
            yield path
    for name, each in schema.items():
        if name not in ("metadata", "serialization", "json_schema_input_schema"):
            yield from patient(each, f"{path}.{name}")


def test_every_container_of_a_body_ends_at_the_first_thing_wrong() -> None:
    found = {each.__qualname__: paths for each in schemas() if (paths := list(patient(each.__pydantic_core_schema__)))}

    assert found == {}
    assert len(schemas()) > 50


def test_every_schema_of_a_body_tells_of_one_unknown_field() -> None:
    assert [each.__qualname__ for each in schemas() if not issubclass(each, Strict)] == []


def test_the_guard_finds_what_goes_on() -> None:
    class Part(Strict):
        names: list[str] = Field(fail_fast=True)

    class Patient(Strict):
        anything: list[Any]
        objects: dict[str, Any]
        parts: list[Part] | None
        texts: Annotated[dict[str, str], Field(max_length=3)]
        checked: list[str]

        _check = field_validator("checked", mode="plain")(lambda value: value)

    assert list(patient(Part.__pydantic_core_schema__)) == []
    found = list(patient(Patient.__pydantic_core_schema__))
    assert len(found) == 2
    assert ".parts" in found[0]
    assert ".texts" in found[1]


def test_a_thousand_unknown_fields_are_one_error() -> None:
    class Part(Strict):
        name: str = Field(default="", alias="as")

    many: dict[str, Any] = {f"x{number}": 0 for number in range(1000)}
    with pytest.raises(ValidationError) as caught:
        Part.model_validate({"as": 1} | many)
    assert [each["loc"] for each in caught.value.errors()] == [("as",), ("x0",)]
