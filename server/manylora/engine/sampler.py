"""From logits to tokens, for the whole batch at once.

Random choice needs one uniform number per token, made from the request's seed, the choice's index and the
token's place by a counter-based generator. So a seed gives the same tokens whatever else is in the batch,
and after a preemption too. The generator is asked for many places of a sequence at once: setting it up takes
far longer than its numbers do.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from manylora.engine.interface import TokenLogprob
from manylora.engine.sequence import Draws, Sequence

NUM_CANDIDATES = 256  # top-p is first tried among this many; the full sort is for flat distributions only
MIN_TEMPERATURE = 1e-30  # lower ones, which float32 would round to 0, draw the likeliest token all the same
MIN_PENALTY = 1e-30  # lower ones, which float32 would round to 0, make nothing larger than a float can be
DRAWS_AHEAD = 64  # places of a sequence whose random numbers are made together
_ROWS_AT_ONCE = 32  # log-probabilities are made of so many rows at a time: each is another [vocab] in float32
_BLOCK = 256  # tokens
_WORDS = 4  # numbers of 64 bits that the generator makes of one counter, of which the first is used


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probabilities where the sequence wants them.

    `is_finite` is False for a row whose logits hold NaN or infinity, so that its token means nothing. A logit of
    -inf is a token that the model rules out; only a row of nothing else is not finite.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    is_finite: list[bool]


Ahead = list[tuple[int, ...]]


def sample(logits: torch.Tensor, seqs: list[Sequence], ahead: Ahead | None = None) -> Sampled:
    """Choose the next token of each sequence from `logits` [len(seqs), vocab] (any float dtype; not changed).

    A sequence may have several rows: `ahead` says for each which tokens of a draft come between the sequence's last
    one and the row's place. None: no row has any.
    Order, as in vLLM: bias and penalties, temperature, top-k, top-p, min-p. Log-probabilities are those of
    the model itself, before any of it.
    """
    ahead = ahead or [()] * len(seqs)
    raw = logits
    if any(s.has_penalties or s.params.logit_bias for s in seqs):
        logits = _adjusted(logits.to(torch.float32, copy=True), seqs, ahead)
    highest, chosen = largest(logits)
    random_rows = [i for i, s in enumerate(seqs) if s.params.temperature > 0]
    if random_rows:
        rows = torch.tensor(random_rows, device=logits.device)
        uniform = [uniform_number(seqs[i], len(ahead[i])) for i in random_rows]
        chosen[rows] = _draw(logits[rows].float(), [seqs[i] for i in random_rows], uniform)
    token_ids: list[int] = chosen.tolist()
    return Sampled(token_ids, _logprobs(raw, token_ids, seqs), highest.isfinite().tolist())


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit and the first token that has it, [rows] each; NaN and its token for a row with a NaN.

    The largest of every block first: torch finds values alone six times as fast as values with their places.
    """
    vocab = logits.shape[1]
    whole = vocab // _BLOCK * _BLOCK
    blocks = logits[:, :whole].reshape(len(logits), whole // _BLOCK, _BLOCK).amax(-1)
    if whole < vocab:
        blocks = torch.cat([blocks, logits[:, whole:].amax(-1, keepdim=True)], dim=1)
    first = blocks.argmax(-1, keepdim=True) * _BLOCK
    columns = (first + torch.arange(_BLOCK, device=logits.device)).clamp(max=vocab - 1)
    values, places = logits.gather(1, columns).max(dim=-1)
    return values, columns.gather(1, places[:, None])[:, 0]


def _adjusted(logits: torch.Tensor, seqs: list[Sequence], ahead: Ahead) -> torch.Tensor:
    """Bias, repetition penalty (Keskar et al., CTRL, 2019), presence and frequency penalties, in place."""
    for row, seq, drafted in zip(logits, seqs, ahead, strict=True):
        p = seq.params
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*seq.tokens, *drafted}), device=row.device)
            values, penalty = row[seen], max(p.repetition_penalty, MIN_PENALTY)
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        output = seq.output_counts + Counter(drafted) if drafted else seq.output_counts
        if output and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(output), device=row.device)
            counts = torch.tensor(list(output.values()), dtype=row.dtype, device=row.device)
            row[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if p.logit_bias:
            ids = torch.tensor([i for i, _ in p.logit_bias], device=row.device)
            row[ids] += torch.tensor([b for _, b in p.logit_bias], dtype=row.dtype, device=row.device)
    return logits


def _draw(logits: torch.Tensor, seqs: list[Sequence], numbers: list[float]) -> torch.Tensor:
    """One draw per row of `logits` [rows, vocab], by its number in [0, 1); returns token ids [rows].

    Which way a row goes depends on the row alone: tokens of equal probability would come in another order on
    another way, and the same seed would give other tokens beside other requests.
    """
    device, vocab = logits.device, logits.shape[1]
    temperature = torch.tensor([s.params.temperature for s in seqs], device=device).clamp(min=MIN_TEMPERATURE)
    # The largest logit becomes 0, so that no temperature can push it past the largest float.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature[:, None], dim=-1)
    uniform = torch.tensor(numbers, dtype=torch.float64, device=device)
    cuts = _Cuts(
        torch.tensor([s.params.top_k or vocab for s in seqs], device=device).clamp(max=vocab),
        torch.tensor([s.params.top_p for s in seqs], device=device),
        torch.tensor([s.params.min_p for s in seqs], device=device),
    )
    is_whole = (cuts.top_k >= vocab) & (cuts.top_p >= 1) & (cuts.min_p <= 0)
    if bool(is_whole.all()):
        return _inverse_cdf(probs, uniform)
    chosen = torch.empty(len(seqs), dtype=torch.int64, device=device)
    whole = is_whole.nonzero()[:, 0]
    if whole.numel():
        chosen[whole] = _inverse_cdf(probs[whole], uniform[whole])
    rest = (~is_whole).nonzero()[:, 0]
    some = probs if rest.numel() == len(seqs) else probs[rest]
    values, ids = some.topk(min(vocab, NUM_CANDIDATES), dim=-1)
    is_enough = cuts.rows(rest).are_among(values, vocab)
    near, far = rest[is_enough], rest[~is_enough]
    chosen[near] = _draw_sorted(values[is_enough], ids[is_enough], cuts.rows(near), uniform[near], vocab)
    if far.numel():
        values, ids = probs[far].sort(dim=-1, descending=True, stable=True)
        chosen[far] = _draw_sorted(values, ids, cuts.rows(far), uniform[far], vocab)
    return chosen


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Which tokens each row may take; every tensor [rows]."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, index: torch.Tensor) -> "_Cuts":
        return _Cuts(self.top_k[index], self.top_p[index], self.min_p[index])

    def are_among(self, values: torch.Tensor, vocab: int) -> torch.Tensor:
        """Per row, whether the likeliest `values` [rows, width], sorted, hold every token that may be taken."""
        width = values.shape[1]
        is_tail_free = (values.sum(-1) >= self.top_p) & (self.top_p < 1) & (self.top_k >= vocab)
        is_cut_by_min_p = (values[:, -1] < self.min_p * values[:, 0]) & ((self.top_k >= vocab) | (self.top_p >= 1))
        return (self.top_k <= width) | is_tail_free | is_cut_by_min_p


def _draw_sorted(
    values: torch.Tensor, ids: torch.Tensor, cuts: _Cuts, uniform: torch.Tensor, vocab: int
) -> torch.Tensor:
    """One draw per row of `values` [rows, width], probabilities sorted downwards, of the tokens `ids`."""
    rank = torch.arange(values.shape[1], device=values.device)
    kept = values.masked_fill(rank >= cuts.top_k[:, None], 0)
    kept_mass = torch.where(cuts.top_k < vocab, kept.sum(-1), 1.0)
    before = kept.cumsum(-1) - kept
    # The first token is always kept: a row must never become empty by rounding.
    drop = (before >= (cuts.top_p * kept_mass)[:, None]) | (values < (cuts.min_p * values[:, 0])[:, None])
    kept = kept.masked_fill(drop & (rank > 0), 0)
    return ids.gather(1, _inverse_cdf(kept, uniform)[:, None])[:, 0]


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index drawn in proportion to `weights` [rows, n] (not normalised) by `uniform` [rows] in [0, 1)."""
    totals = weights.double().cumsum(-1)
    index = torch.searchsorted(totals, (uniform.double() * totals[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(index, (weights > 0).cumsum(-1).argmax(-1))


def uniform_number(seq: Sequence, num_ahead: int = 0) -> float:
    """The number in [0, 1) for the sequence's token `num_ahead` places behind its next: of seed, index and place only.

    The numbers are kept with the sequence and made `DRAWS_AHEAD` at a time, up to a place that depends on the seed,
    so that sequences which begin together do not all need new ones in the same step.
    """
    first = seq.num_output_tokens
    place = first + num_ahead
    draws = seq.draws
    if draws is None or not 0 <= place - draws.first < len(draws.numbers):
        count = num_ahead + DRAWS_AHEAD - (place + seq.seed) % DRAWS_AHEAD
        draws = seq.draws = Draws(first, uniform_numbers(seq.seed, seq.index, first, count))
    return draws.numbers[place - draws.first]


def uniform_numbers(seed: int, index: int, first: int, count: int) -> list[float]:
    """The numbers in [0, 1) of `count` places from `first` on (Philox 4x64, Salmon et al., SC 2011)."""
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=first).random_raw(_WORDS * count)[::_WORDS]
    numbers: list[float] = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


def _logprobs(logits: torch.Tensor, token_ids: list[int], seqs: list[Sequence]) -> list[TokenLogprob | None]:
    wanted = [i for i, s in enumerate(seqs) if s.params.logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(seqs)
    if wanted:
        rows = torch.tensor(wanted, device=logits.device)
        counts = [seqs[i].params.logprobs or 0 for i in wanted]
        entries = token_logprobs(logits[rows], [token_ids[i] for i in wanted], counts)
        for i, entry in zip(wanted, entries, strict=True):
            found[i] = entry
    return found


def token_logprobs(logits: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Log-probability of each row's token, and of the `counts[row]` likeliest; `logits` [rows, vocab], any float dtype.

    NaN where a row's logits are not finite.
    """
    found: list[TokenLogprob] = []
    for at in range(0, len(token_ids), _ROWS_AT_ONCE):
        part = slice(at, at + _ROWS_AT_ONCE)
        found += _token_logprobs(logits[part], token_ids[part], counts[part])
    return found


def _token_logprobs(logits: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprob]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    most = max(counts)
    if not most:
        return [TokenLogprob(t, p) for t, p in zip(token_ids, own, strict=True)]
    values, ids = logprobs.topk(most, dim=-1)
    tops = [
        tuple(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids.tolist(), values.tolist(), counts, strict=True)
    ]
    return [TokenLogprob(t, p, top) for t, p, top in zip(token_ids, own, tops, strict=True)]
