"""What an upload does to the base: which texts are run to find out, and what their answers say."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from manylora.engine.interface import AdapterRef, Effect, ModelInfo, SamplingParams, TextCodec
from manylora.errors import InvalidAdapter, Problem
from manylora.images.picture import Picture
from manylora.lora.format.spec import Adapter

__all__ = ["PROBE_TEXT", "effect_of", "probe_prompt", "probed", "probes_of", "vector_effect_of"]

MAX_PROBED_TOKENS: Final = 16  # of those that an adapter trains
PROBE_TEXT: Final = "The quick brown fox jumps over the lazy dog. Question: what is the capital of France? Answer:"


def probe_prompt(
    codec: TextCodec, model: ModelInfo, ref: AdapterRef, adapter: Adapter, picture: Picture | None
) -> list[int]:
    """The prompt that an adapter is tried on; of a model of images the places of `picture`. Raises InvalidAdapter."""
    # An adapter of some tokens does nothing where they do not come, and one that is invoked nothing before that.
    room = model.most_prompt_tokens - ref.num_virtual_tokens
    if room < 1:
        fault = f"Its virtual tokens leave no room in the model's context of {model.context_length}."
        raise InvalidAdapter([Problem("unsupported_feature", "adapter_config.json: num_virtual_tokens", fault)])
    if picture is not None:
        return list(picture.ids)
    text = [i for i in codec.encode(PROBE_TEXT) if i < model.vocab_size]
    return [*ref.invocation, *adapter.token_ids[:MAX_PROBED_TOKENS], *text][:room]


def probed(picture: Picture | None, adapter: Adapter) -> tuple[Picture | None, Picture | None]:
    """What the two runs see: the same, or of a head, which must tell them apart, two pictures."""
    return picture, picture.upside_down() if picture is not None and adapter.head is not None else picture


def probes_of(
    model: ModelInfo, prompt: Sequence[int], ref: AdapterRef, adapter: Adapter
) -> list[tuple[list[int], SamplingParams, AdapterRef | None]]:
    """The two runs whose answers must differ: a prompt without the adapter and with it, or of a head two texts."""
    ids = list(prompt)
    if adapter.head is not None:
        params = SamplingParams(max_tokens=0, reads_head=True)
        # What invokes the adapter and its virtual tokens' places stay where they are.
        first = len(ref.invocation)
        return [(ids, params, ref), ([*ids[:first], *reversed(ids[first:])], params, ref)]
    params = SamplingParams(max_tokens=0, pooling="mean" if model.kind == "pool" else None)
    bare = [each if each < model.vocab_size else 0 for each in ids]  # the base has none of the adapter's own tokens
    return [(bare, params, None), (ids, params, ref)]


def effect_of(without: np.ndarray, with_it: np.ndarray) -> Effect:
    """What an adapter changes, from a prompt's logits [positions, vocab] without it and with it."""
    both = min(without.shape[1], with_it.shape[1])
    a, b = torch.from_numpy(without[:, :both]), torch.from_numpy(with_it[:, :both])
    kl = torch.nn.functional.kl_div(
        torch.log_softmax(b[-1], -1), torch.log_softmax(a[-1], -1), reduction="sum", log_target=True
    )
    return Effect(len(a), float((a - b).abs().max()), float(kl))


def vector_effect_of(num_tokens: int, first: np.ndarray | None, second: np.ndarray | None) -> Effect:
    """How far two vectors are apart, or the scores of two texts' first tokens. They have no probabilities."""
    assert first is not None
    assert second is not None
    a, b = (each[0] if each.ndim > 1 else each for each in (first, second))
    return Effect(num_tokens, float(np.abs(a - b).max()), 0.0)
