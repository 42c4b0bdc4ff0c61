"""Proof at start that the wrapped model computes what the untouched one did.

An architecture with a twist that the wrapping does not know of (an odd position encoding, a cache shared
between layers) would otherwise be served wrongly without a word.
"""

import torch

from manylora.errors import ModelUnusable
from manylora.models.batch import Batch
from manylora.models.kv_cache import KVCache
from manylora.models.wrapping import PROBE_LENGTH, WrappedModel

_CHUNK = 7  # the probe runs as one chunk of this length and then token by token

# Root mean square of the difference, as a share of the logits' own spread. In bfloat16 two correct orders of
# summation differ by some hundredths after thirty layers; a wrong layer differs by tenths.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
# Against the unrounded base: the probe's tokens are random, and random text is what rounding hurts most.
INT8_TOLERANCE = 3e-1


def check(wrapped: WrappedModel, cache: KVCache, *, tolerance: float | None = None) -> None:
    """Run the survey's tokens through the paged model, in chunks. Raises ModelUnusable when the logits differ."""
    expected = wrapped.survey.logits
    device = expected.device
    found: list[torch.Tensor] = []
    spans = [(0, _CHUNK), *((i, i + 1) for i in range(_CHUNK, PROBE_LENGTH))]
    with torch.inference_mode():
        for start, end in spans:
            wrapped.context.batch = single_sequence(wrapped.survey.token_ids[start:end].to(device), start, cache)
            try:
                output = wrapped.model(
                    input_ids=wrapped.context.batch.token_ids[None],
                    position_ids=wrapped.context.batch.positions[None],
                    use_cache=False,
                    logits_to_keep=wrapped.context.batch.logit_rows,
                )
            finally:
                wrapped.context.batch = None
            found.append(output.logits[0].float())
    difference = float((torch.cat(found) - expected).square().mean().sqrt() / expected.std().clamp(min=1e-6))
    allowed = TOLERANCE[wrapped.model.dtype] if tolerance is None else tolerance
    if not difference <= allowed:
        raise ModelUnusable(
            f"{type(wrapped.model).__name__} computes something that this server does not reproduce "
            f"(logits differ by {difference:.3g} of their spread, {allowed:.3g} is allowed)."
        )


def single_sequence(token_ids: torch.Tensor, start: int, cache: KVCache) -> Batch:
    """A batch of one sequence's tokens from position `start` on, in blocks 0, 1, 2… of the cache."""
    count = token_ids.shape[0]
    device = token_ids.device
    positions = torch.arange(start, start + count, device=device)
    num_blocks = -(-(start + count) // cache.block_size)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        kv_slots=positions,
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([start + count], dtype=torch.int32, device=device),
        num_decode=int(count == 1),
        starts=(0, count),
        lens=(start + count,),
        logit_rows=torch.arange(count, device=device),
    )
