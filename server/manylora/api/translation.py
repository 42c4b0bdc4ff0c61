"""What translators of other APIs' chats have in common: fields that go on as they are, and how the others are read."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from manylora.api.errors import invalid_from
from manylora.api.fields import Unsupported, wanted
from manylora.api.schemas import ChatRequest
from manylora.errors import InvalidRequest

__all__ = ["EXTENSIONS", "documents", "parted", "valid"]

T = TypeVar("T", bound=BaseModel)

EXTENSIONS: Final = (
    "adapter_id",
    "adapters",
    "lora",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "add_special_tokens",
    "priority",
    "cache_salt",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_whitespace_pattern",
    "chat_template_kwargs",
    "documents",
    "include_reasoning",
)
"""Fields of this server's own chats that other APIs' chats take too, under the same names and to the same effect."""


def parted(
    raw: Any, schema: type[BaseModel], unsupported: Unsupported, passed: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a body that are the schema's own, and those that go on to a chat under their names.

    Raises InvalidRequest for a body that is no object, and for a field that is not supported.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    kept = wanted(raw, {*schema.model_fields, *passed}, unsupported)
    own = {name: value for name, value in kept.items() if name in schema.model_fields}
    # null is told apart from absent: it names the base, where no model does.
    named = {"adapter_id": None} if "adapter_id" in raw else {}
    return own, named | {name: value for name, value in kept.items() if name not in own}


def valid(schema: type[T], raw: Mapping[str, Any], *where: int | str) -> T:
    """The checked value of what stands at a place of the body. Raises InvalidRequest, whose `param` has the place."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_input=False), *where) from None


def documents(*names: str) -> ConfigDict:
    """The configuration of a schema whose description has these fields of a chat's as well."""

    def add(schema: dict[str, Any]) -> None:
        properties = schema.setdefault("properties", {})
        properties.update({name: _properties()[name] for name in names})

    return ConfigDict(json_schema_extra=add)


@lru_cache(1)
def _properties() -> dict[str, Any]:
    """A chat's fields as the OpenAPI document describes them."""
    described = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    found: dict[str, Any] = described["properties"]
    return found
