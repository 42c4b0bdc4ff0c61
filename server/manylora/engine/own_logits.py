"""Logits of a step in which some rows' adapters have another number of tokens than the base: sampled width by width.

Rows of all others are sampled as they are without these, to the last bit.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from manylora.engine.interface import TokenLogprob
from manylora.engine.sampler import sample
from manylora.engine.step_input import Allowed, Draw, Sampled, SamplingInput, ScoredRows
from manylora.engine.token_rules import widened

__all__ = ["OwnLogits", "sample_by_width"]


@dataclass(frozen=True, slots=True)
class OwnLogits:
    """`logits` [L, vocab] of the base's tokens; `widths` int64 [L]: for how many tokens each row has logits.

    `own`: by row, those of tokens behind the base's.
    """

    logits: torch.Tensor
    widths: np.ndarray
    own: dict[int, torch.Tensor]

    def rows(self, numbers: np.ndarray, width: int) -> torch.Tensor:
        """Of rows that all have this width: [n, width]."""
        found = self.logits[torch.from_numpy(numbers).to(self.logits.device)]
        if width <= found.shape[1]:
            return found[:, :width]
        own = torch.stack([self.own[number] for number in numbers.tolist()])
        return torch.cat([found, own.to(found.dtype)], dim=1)


def sample_by_width(logits: OwnLogits, wanted: SamplingInput) -> Sampled:
    """What `sampler.sample` finds, of the rows of each width by themselves."""
    count = len(wanted.rows)
    token_ids, is_finite = [0] * count, [True] * count
    logprobs: list[TokenLogprob | None] = [None] * count
    scored: list[ScoredRows | None] = [None] * len(wanted.scored)
    for width in np.unique(logits.widths).tolist():
        mine = np.flatnonzero(logits.widths[wanted.rows] == width)
        asked = [number for number, each in enumerate(wanted.scored) if logits.widths[each.first] == width]
        scores = [wanted.scored[number] for number in asked]
        rows = [wanted.rows[mine], *(np.arange(each.first, each.first + each.num_rows) for each in scores)]
        numbers = np.concatenate(rows).astype(np.int64)
        if not numbers.size:
            continue
        found = sample(logits.rows(numbers, width), _part(wanted, mine, asked, width))
        for place, number in enumerate(mine.tolist()):
            token_ids[number], is_finite[number] = found.token_ids[place], found.is_finite[place]
            logprobs[number] = found.logprobs[place]
        for number, each in zip(asked, found.scored, strict=True):
            scored[number] = each
    return Sampled(token_ids, logprobs, is_finite, [each for each in scored if each is not None])


def _part(wanted: SamplingInput, mine: np.ndarray, asked: Iterable[int], width: int) -> SamplingInput:
    """What is wanted of the sampled rows `mine`, and of some scored ones that stand behind them."""
    place_of = {number: place for place, number in enumerate(mine.tolist())}
    scored, first = [], len(mine)
    for number in asked:
        scored.append(replace(wanted.scored[number], first=first))
        first += wanted.scored[number].num_rows
    return SamplingInput(
        rows=np.arange(len(mine)),
        top=[wanted.top[number] for number in mine.tolist()],
        adjustments=[replace(each, row=place_of[each.row]) for each in wanted.adjustments if each.row in place_of],
        allowed=_allowed(wanted.allowed, place_of, width),
        draw=_draw(wanted.draw, place_of),
        scored=scored,
    )


def _allowed(allowed: Allowed | None, place_of: dict[int, int], width: int) -> Allowed | None:
    kept = [] if allowed is None else [at for at, row in enumerate(allowed.rows.tolist()) if row in place_of]
    if allowed is None or not kept:
        return None
    bits = np.stack([widened(allowed.bits[at], -(-width // 32)) for at in kept])
    return Allowed(np.array([place_of[allowed.rows[at]] for at in kept], dtype=np.int64), bits)


def _draw(draw: Draw | None, place_of: dict[int, int]) -> Draw | None:
    kept = [] if draw is None else [at for at, row in enumerate(draw.rows.tolist()) if row in place_of]
    if draw is None or not kept:
        return None
    rows = np.array([place_of[draw.rows[at]] for at in kept], dtype=np.int64)
    return Draw(
        rows,
        draw.temperature[kept],
        draw.top_k[kept],
        draw.top_p[kept],
        draw.min_p[kept],
        draw.typical_p[kept],
        draw.uniform[kept],
    )
