"""From logits to tokens, for the whole batch at once.

Random choice needs one uniform number per token, made from the request's seed, the choice's index and the
token's place by a counter-based generator. So a seed gives the same tokens whatever else is in the batch,
and after a preemption too.
"""

from dataclasses import dataclass

import numpy as np
import torch

from manylora.engine.interface import TokenLogprob
from manylora.engine.sequence import Sequence

NUM_CANDIDATES = 256  # top-p is first tried among this many; the full sort is for flat distributions only


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probabilities where the sequence wants them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def sample(logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
    """Choose the next token of each sequence from `logits` [len(seqs), vocab] (any float dtype; not changed).

    Order, as in vLLM: bias and penalties, temperature, top-k, top-p, min-p. Log-probabilities are those of
    the model itself, before any of it.
    """
    logits = logits.float()
    raw = logits
    if any(s.has_penalties or s.params.logit_bias for s in seqs):
        logits = _adjusted(logits.clone(), seqs)
    chosen = logits.argmax(dim=-1)
    random_rows = [i for i, s in enumerate(seqs) if s.params.temperature > 0]
    if random_rows:
        rows = torch.tensor(random_rows, device=logits.device)
        chosen[rows] = _draw(logits[rows], [seqs[i] for i in random_rows])
    token_ids: list[int] = chosen.tolist()
    return Sampled(token_ids, _logprobs(raw, token_ids, seqs))


def _adjusted(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Bias, repetition penalty (Keskar et al., CTRL, 2019), presence and frequency penalties, in place."""
    for row, seq in zip(logits, seqs, strict=True):
        p = seq.params
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(seq.tokens)), device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if seq.output_counts and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(seq.output_counts), device=row.device)
            counts = torch.tensor(list(seq.output_counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if p.logit_bias:
            ids = torch.tensor([i for i, _ in p.logit_bias], device=row.device)
            row[ids] += torch.tensor([b for _, b in p.logit_bias], dtype=row.dtype, device=row.device)
    return logits


def _draw(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """One draw per row of `logits` [rows, vocab]; returns token ids [rows]."""
    device, vocab = logits.device, logits.shape[1]
    temperature = torch.tensor([s.params.temperature for s in seqs], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    uniform = torch.tensor([uniform_number(s.seed, s.index, s.num_output_tokens) for s in seqs], device=device)
    top_k = torch.tensor([s.params.top_k or vocab for s in seqs], device=device).clamp(max=vocab)
    top_p = torch.tensor([s.params.top_p for s in seqs], device=device)
    min_p = torch.tensor([s.params.min_p for s in seqs], device=device)
    if bool(((top_k >= vocab) & (top_p >= 1) & (min_p <= 0)).all()):
        return _inverse_cdf(probs, uniform)
    width = min(vocab, NUM_CANDIDATES)
    values, ids = probs.topk(width, dim=-1)
    is_tail_free = (values.sum(-1) >= top_p) & (top_p < 1) & (top_k >= vocab)
    is_cut_by_min_p = (values[:, -1] < min_p * values[:, 0]) & ((top_k >= vocab) | (top_p >= 1))
    enough = (top_k <= width) | is_tail_free | is_cut_by_min_p
    if width < vocab and not bool(enough.all()):
        values, ids = probs.sort(dim=-1, descending=True)
    rank = torch.arange(values.shape[1], device=device)
    kept = values.masked_fill(rank >= top_k[:, None], 0)
    kept_mass = torch.where(top_k < vocab, kept.sum(-1), 1.0)
    before = kept.cumsum(-1) - kept
    # The first token is always kept: a row must never become empty by rounding.
    drop = (before >= (top_p * kept_mass)[:, None]) | (values < (min_p * values[:, 0])[:, None])
    kept = kept.masked_fill(drop & (rank > 0), 0)
    return ids.gather(1, _inverse_cdf(kept, uniform)[:, None])[:, 0]


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index drawn in proportion to `weights` [rows, n] (not normalised) by `uniform` [rows] in [0, 1)."""
    totals = weights.double().cumsum(-1)
    index = torch.searchsorted(totals, (uniform.double() * totals[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(index, (weights > 0).cumsum(-1).argmax(-1))


def uniform_number(seed: int, index: int, counter: int) -> float:
    """A number in [0, 1) that depends on its arguments only (Philox 4x64, Salmon et al., SC 2011)."""
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


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
    """Log-probability of each row's token, and of the `counts[row]` likeliest; `logits` [rows, vocab] float32."""
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
