"""The base of every schema that a body, or a part of one, is read by."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Strict"]


class Strict(BaseModel):
    """Unknown fields are refused, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, value: Any) -> Any:
        """Of fields that nobody knows one is told of, and each costs an error of its own: the first is enough."""
        fields = cls.model_fields
        if not isinstance(value, dict) or len(value) <= len(fields) + 1:
            return value
        known = {*fields, *(field.alias for field in fields.values())}
        kept = {name: each for name, each in value.items() if name in known}
        unknown = next((name for name in value if name not in known), None)
        return kept if unknown is None else {**kept, unknown: value[unknown]}
