"""What is wrong with a body is told once, whatever it is: a list of strangers costs one error and not one for each."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import manylora.api
from manylora.api.strict import Strict
from manylora.errors import InvalidRequest

# Of each container that pydantic goes on in after an error, where the schemas of what is in it are.
INSIDE = {
    **dict.fromkeys(("list", "set", "frozenset", "tuple"), ("items_schema",)),
    "dict": ("keys_schema", "values_schema"),
    **dict.fromkeys(("model-fields", "typed-dict", "dataclass-args"), ("extras_schema", "extras_keys_schema")),
}


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
        inside = {name: schema.get(name, {"type": "any"}) for name in INSIDE.get(kind, ())}
        if any(not takes_all(each, is_key=name == "keys_schema") for name, each in inside.items()):
            yield path
    for name, each in schema.items():
        if name not in ("metadata", "serialization", "json_schema_input_schema"):
            yield from patient(each, f"{path}.{name}")


def takes_all(schema: Any, *, is_key: bool) -> bool:
    """Whether nothing that JSON has in this place can be wrong."""
    if isinstance(schema, list | tuple):
        return False
    is_plain_text = schema["type"] == "str" and not set(schema) & {"pattern", "max_length", "min_length"}
    return schema["type"] == "any" or (is_key and is_plain_text)


HOSTILE: dict[str, Any] = {
    "numbers": list(range(300)),
    "nulls": [None] * 300,
    "objects": [{"stranger": number} for number in range(300)],
    "lists": [[{}, "a", None]] * 300,
    "object of numbers": {f"k{number}": number for number in range(300)},
    "object of objects": {f"k{number}": {"stranger": number} for number in range(300)},
    "object of lists": {f"k{number}": [number, {}] for number in range(300)},
    "text": "x" * 100_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_field_full_of_strangers_is_a_few_errors_whatever_checks_it(kind: str) -> None:
    """Also where a check is a function of ours, or one shape of several, which the walk above does not see into."""
    told = {
        f"{schema.__qualname__}.{name}": messages(schema, field.alias or name, HOSTILE[kind])
        for schema in schemas()
        for name, field in schema.model_fields.items()
    }
    assert sum(map(bool, told.values())) > 100
    assert {name: len(found) for name, found in told.items() if len(found) > 8} == {}
    assert {name: found for name, found in told.items() if len("".join(found)) > 4000} == {}


def messages(schema: type[BaseModel], key: str, value: Any) -> list[str]:
    """What is said of one field."""
    try:
        schema.model_validate({key: value})
    except InvalidRequest as error:
        return [error.message]
    except ValidationError as error:
        return [each["msg"] for each in error.errors(include_url=False, include_input=False) if each["loc"][0] == key]
    return []


def test_every_container_of_a_body_ends_at_the_first_thing_wrong() -> None:
    found = {each.__qualname__: paths for each in schemas() if (paths := list(patient(each.__pydantic_core_schema__)))}

    assert found == {}
    assert len(schemas()) > 50


def test_every_schema_of_a_body_tells_of_one_unknown_field() -> None:
    assert [each.__qualname__ for each in schemas() if not issubclass(each, Strict)] == []


def test_the_guard_finds_what_goes_on() -> None:
    class Part(Strict):
        names: list[str] = Field(fail_fast=True)

    class Held(BaseModel):
        model_config = ConfigDict(extra="allow")
        __pydantic_extra__: dict[str, int]

    class Patient(Strict):
        anything: list[Any]
        objects: dict[str, Any]
        parts: list[Part] | None
        texts: Annotated[dict[str, str], Field(max_length=3)]
        checked: list[str]
        keyed: dict[Annotated[str, Field(max_length=3)], Any]
        more: Held

        _check = field_validator("checked", mode="plain")(lambda value: value)

    assert list(patient(Part.__pydantic_core_schema__)) == []
    found = list(patient(Patient.__pydantic_core_schema__))
    for path, field in zip(found, (".parts", ".texts", ".keyed", ".more"), strict=True):
        assert field in path


def test_a_thousand_unknown_fields_are_one_error() -> None:
    class Part(Strict):
        name: str = Field(default="", alias="as")

    many: dict[str, Any] = {f"x{number}": 0 for number in range(1000)}
    with pytest.raises(ValidationError) as caught:
        Part.model_validate({"as": 1} | many)
    assert [each["loc"] for each in caught.value.errors()] == [("as",), ("x0",)]
