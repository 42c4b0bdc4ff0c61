"""How far a model's positions reach when its sequences share a batch."""

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["position_limit"]


def position_limit(config: Any) -> int:
    """The longest sequence that a Hugging Face config allows, 0 where it names none.

    LongRoPE (Ding et al., 2024; Phi-3 with 128k) turns all positions of a batch by other frequencies as soon as one
    sequence of it is longer than the original context, so a neighbour's length would change everybody's answer. Such
    models are served up to their original context, where there is one set of frequencies.
    """
    text = config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", 0) or 0)
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        original = int(rope.get("original_max_position_embeddings") or 0)
        if rope.get("rope_type") == "longrope" and original:
            longest = min(longest or original, original)
    return longest


def _ropes(parameters: object) -> Iterator[Mapping[str, Any]]:
    """The parameters of the rotary embedding, which some models have once for each type of layer."""
    if isinstance(parameters, Mapping):
        yield parameters
        for value in parameters.values():
            yield from _ropes(value)
