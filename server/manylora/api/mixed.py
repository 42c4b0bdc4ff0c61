"""Several adapters on one request, as bodies name them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field

from manylora.api.strict import Strict
from manylora.errors import InvalidRequest
from manylora.identity import MAX_MIX_WEIGHT

__all__ = ["LoraScale", "Mixed", "MixedAdapter"]


class MixedAdapter(Strict):
    """One of `adapters`."""

    name: str = Field(description="An adapter, or a version of it as `name@version`.")
    weight: float = Field(default=1.0, ge=-MAX_MIX_WEIGHT, le=MAX_MIX_WEIGHT)


class LoraScale(Strict):
    """One of `lora`, as llama.cpp's server has it."""

    id: str | int = Field(description="An adapter's name: there are no numbers here.")
    scale: float = Field(default=1.0, ge=-MAX_MIX_WEIGHT, le=MAX_MIX_WEIGHT)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Names with a weight each, and which field they came by."""

    parts: tuple[tuple[str, float], ...]
    field: str

    @classmethod
    def of(cls, adapters: Sequence[MixedAdapter], lora: Sequence[LoraScale]) -> Self:
        """Of a body's two fields. Raises InvalidRequest."""
        if adapters and lora:
            raise InvalidRequest("'adapters' and 'lora' both name adapters. Send one.", param="lora")
        for number, each in enumerate(lora):
            if not isinstance(each.id, str):
                raise InvalidRequest(
                    f"'lora[{number}].id' is {each.id}. Adapters have names here, and no numbers: send one. "
                    "GET /v1/models lists them.",
                    param=f"lora[{number}].id",
                )
        if lora:
            return cls(tuple((str(each.id), each.scale) for each in lora), "lora")
        return cls(tuple((each.name, each.weight) for each in adapters), "adapters")

    def param(self, number: int) -> str:
        """Where the name of one is."""
        return f"{self.field}[{number}].{'id' if self.field == 'lora' else 'name'}"
