"""What tokens cost, so that usage can be told in money: for a bill or a look, never for a decision of the server's."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Protocol

__all__ = ["Prices"]

_PER: Final = 1000  # tokens
_DIGITS: Final = 6  # after the point, in what is told


class _Counts(Protocol):
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def training_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of 1,000 tokens each, in `currency`. Prompt tokens from the prefix cache cost `cached` alone."""

    currency: str
    prompt: Decimal
    cached: Decimal
    completion: Decimal
    training: Decimal

    @classmethod
    def of(
        cls,
        currency: str,
        *,
        prompt: float | None,
        cached: float | None,
        completion: float | None,
        training: float | None,
    ) -> "Prices | None":
        """Prices of which some are set: the others are 0, cached tokens' that of prompt tokens. None if none is set."""
        given = (prompt, prompt if cached is None else cached, completion, training)
        if all(price is None for price in given):
            return None
        return cls(currency, *(Decimal(str(price or 0)) for price in given))

    def cost(self, used: _Counts) -> float:
        """What these tokens cost, in `currency`, exact to a millionth."""
        priced = (
            (used.prompt_tokens - used.cached_tokens, self.prompt),
            (used.cached_tokens, self.cached),
            (used.completion_tokens, self.completion),
            (used.training_tokens, self.training),
        )
        return round(float(sum((count * price for count, price in priced), Decimal(0)) / _PER), _DIGITS)

    def as_dict(self) -> dict[str, Any]:
        """For 1,000 tokens each, as `GET /v1/usage` tells them."""
        each = ("prompt", "cached", "completion", "training")
        return {"currency": self.currency, "per_tokens": _PER, **{name: float(getattr(self, name)) for name in each}}
