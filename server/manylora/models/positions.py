"""How far a model's positions reach when its sequences share a batch."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["UNSTATED_LIMIT", "batch_limit", "position_limit", "probe_starts"]

UNSTATED_LIMIT = 2048  # the longest sequence of a model whose config names none
_LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")  # what configs call it: most, MPT's, BLOOM's
_FARTHEST = 2**20  # positions beyond are not tried: masks as wide as that are built
_MAX_STARTS = 4
# Fields of a config at whose value a model begins to compute otherwise.
_THRESHOLD = re.compile(r"window|chunk_size|original_max_position|floor|extent|local_attention$")


def position_limit(config: Any) -> int:
    """The longest sequence that a Hugging Face config allows, 0 where it names none.

    LongRoPE (Ding et al., 2024; Phi-3 with 128k) turns all positions of a batch by other frequencies as soon as one
    sequence of it is longer than the original context, so a neighbour's length would change everybody's answer. Such
    models are served up to their original context, where there is one set of frequencies.
    """
    text = config.get_text_config()
    longest = next((int(stated) for name in _LENGTHS if (stated := getattr(text, name, None))), 0)
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        original = int(rope.get("original_max_position_embeddings") or 0)
        if rope.get("rope_type") == "longrope" and original:
            longest = min(longest or original, original)
    floor = _query_scale_floor(text)
    return min(longest or floor - 1, floor - 1) if floor else longest


def _query_scale_floor(text: Any) -> int:
    """From how many tokens on Llama 4's queries grow; it counts them in the cache, where a batch has none."""
    return int(getattr(text, "floor_scale", 0) or 0) if getattr(text, "attn_temperature_tuning", False) else 0


def batch_limit(config: Any) -> int:
    """The most tokens that a step may have, 0 for any number.

    Without a cache Llama 4 takes a token's place in the batch for its position, which changes nothing up to there.
    """
    return max(_query_scale_floor(config.get_text_config()) - 1, 0)


def probe_starts(config: Any, context_length: int, count: int) -> list[int]:
    """Where `count` tokens are to be tried beside the first ones: across every threshold that the config names, as far
    as there are not too many, and at the end of the context."""
    farthest = min(context_length, _FARTHEST) - count
    named = sorted(set(_thresholds(config.get_text_config().to_dict())))
    across = [value - count // 2 for value in named if 0 < value - count // 2 < farthest]
    return [*across[-(_MAX_STARTS - 1) :], *([farthest] if farthest > 0 else [])]


def _thresholds(values: Mapping[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _thresholds(value)
        elif isinstance(value, int) and not isinstance(value, bool) and _THRESHOLD.search(name):
            yield value


def _ropes(parameters: object) -> Iterator[Mapping[str, Any]]:
    """The parameters of the rotary embedding, which some models have once for each type of layer."""
    if isinstance(parameters, Mapping):
        yield parameters
        for value in parameters.values():
            yield from _ropes(value)
