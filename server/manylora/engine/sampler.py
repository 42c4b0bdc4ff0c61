"""From logits to tokens, for the whole batch at once: the device part, which knows no sequence."""

from dataclasses import dataclass

import numpy as np
import torch

from manylora.engine.interface import TokenLogprob
from manylora.engine.step_input import Adjustment, Allowed, Draw, Sampled, SamplingInput, Scored, ScoredRows, Weighed

NUM_CANDIDATES = 256  # top-p is first tried among this many; the full sort is for flat distributions only
MIN_TEMPERATURE = 1e-30  # lower ones, which float32 would round to 0, draw the likeliest token all the same
MIN_PENALTY = 1e-30  # lower ones, which float32 would round to 0, make nothing larger than a float can be
_ROWS_AT_ONCE = 32  # log-probabilities are made of so many rows at a time: each is another [vocab] in float32
_BLOCK = 256  # tokens
# For each byte of bits [256, 8]: 0 where a bit is set, -inf where it is not.
_FORBIDDING = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)


def sample(logits: torch.Tensor, wanted: SamplingInput) -> Sampled:
    """Choose a token of each wanted row of `logits` [L, vocab] (any float dtype; not changed), and score the others.

    Order, as in vLLM: bias and penalties, what is allowed, temperature, top-k, top-p, min-p; then typical-p.
    Log-probabilities are those of the model itself, before any of it.
    """
    scored = [_score(logits[each.first : each.first + each.num_rows], each) for each in wanted.scored]
    if not wanted.rows.size:
        return Sampled([], [], [], scored)
    if len(wanted.rows) != logits.shape[0]:
        logits = logits[_on(wanted.rows, logits)]
    raw = logits
    if wanted.adjustments:
        logits = logits.to(torch.float32, copy=True)
        for each in wanted.adjustments:
            _adjust(logits[each.row], each)
    if wanted.allowed is not None:
        logits = _held(logits, wanted.allowed)
    if wanted.weighed is not None:
        logits = _weighed(logits, wanted.weighed)
    highest, chosen = largest(logits)
    if wanted.draw is not None:
        rows = _on(wanted.draw.rows, logits)
        chosen[rows] = _draw(logits[rows].float(), wanted.draw)
    token_ids: list[int] = chosen.tolist()
    return Sampled(token_ids, _logprobs(raw, token_ids, wanted.top), highest.isfinite().tolist(), scored)


def _on(values: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(logits.device)


def _score(logits: torch.Tensor, wanted: Scored) -> ScoredRows:
    is_finite = not wanted.checks_last or bool(logits[-1].amax().isfinite())
    if wanted.captures:
        return ScoredRows([], logits.to(torch.float32, copy=True).cpu().numpy(), is_finite)
    following = wanted.following
    counts = [wanted.num_top] * len(following)
    entries = token_logprobs(logits[: len(following)], following, counts, has_ranks=wanted.has_ranks)
    has_nan = any(entry.logprob != entry.logprob for entry in entries)
    return ScoredRows(entries, None, is_finite and not has_nan)


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


def _adjust(row: torch.Tensor, by: Adjustment) -> None:
    """Repetition penalty (Keskar et al., CTRL, 2019), the other two and bias, on `row` [vocab], in place."""
    if by.seen.size:
        seen, penalty = _on(by.seen, row), max(by.repetition_penalty, MIN_PENALTY)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if by.output.size:
        row[_on(by.output, row)] -= by.presence_penalty + by.frequency_penalty * _on(by.counts, row)
    if by.biased.size:
        row[_on(by.biased, row)] += _on(by.bias, row)


def _held(logits: torch.Tensor, to: Allowed) -> torch.Tensor:
    """The logits with -inf for what their rows are not allowed.

    A byte of bits becomes eight numbers to add, by a table: on a CPU an eighth of the time that `masked_fill` takes.
    """
    eighths = _on(to.bits.view(np.uint8).astype(np.int32), logits)
    forbidding = torch.nn.functional.embedding(eighths, _on(_FORBIDDING, logits).to(logits.dtype))
    forbidding = forbidding.flatten(1)[:, : logits.shape[1]]
    if len(to.rows) == len(logits):
        return logits + forbidding
    return logits.index_add(0, _on(to.rows, logits), forbidding)


def _weighed(logits: torch.Tensor, by: Weighed) -> torch.Tensor:
    """The logits with -inf before `by.first` in those rows where all from there on are likelier than any before."""
    rows = _on(by.rows, logits)
    mine = logits[rows].float()
    is_beyond = mine[:, by.first :].logsumexp(-1) > mine[:, : by.first].amax(-1)
    changed = logits.clone()
    changed[rows[is_beyond], : by.first] = -torch.inf
    return changed


def _draw(logits: torch.Tensor, how: Draw) -> torch.Tensor:
    """One draw per row of `logits` [rows, vocab]; returns token ids [rows].

    Which way a row goes depends on the row alone: tokens of equal probability would come in another order on
    another way, and the same seed would give other tokens beside other requests.
    """
    device, vocab = logits.device, logits.shape[1]
    temperature = _on(how.temperature, logits).clamp(min=MIN_TEMPERATURE)
    # The largest logit becomes 0, so that no temperature can push it past the largest float.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature[:, None], dim=-1)
    uniform = _on(how.uniform, logits)
    cuts = _Cuts(
        _on(np.where(how.top_k == 0, vocab, how.top_k), logits).clamp(max=vocab),
        _on(how.top_p, logits),
        _on(how.min_p, logits),
        _on(how.typical_p, logits),
    )
    is_whole = (cuts.top_k >= vocab) & (cuts.top_p >= 1) & (cuts.min_p <= 0) & (cuts.typical_p >= 1)
    if bool(is_whole.all()):
        return _inverse_cdf(probs, uniform)
    chosen = torch.empty(len(uniform), dtype=torch.int64, device=device)
    whole = is_whole.nonzero()[:, 0]
    if whole.numel():
        chosen[whole] = _inverse_cdf(probs[whole], uniform[whole])
    rest = (~is_whole).nonzero()[:, 0]
    some = probs if rest.numel() == len(uniform) else probs[rest]
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
    typical_p: torch.Tensor

    def rows(self, index: torch.Tensor) -> "_Cuts":
        return _Cuts(self.top_k[index], self.top_p[index], self.min_p[index], self.typical_p[index])

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
    typical = (cuts.typical_p < 1).nonzero()[:, 0]
    if typical.numel():
        kept[typical] = _typical(kept[typical], cuts.typical_p[typical])
    return ids.gather(1, _inverse_cdf(kept, uniform)[:, None])[:, 0]


def _typical(kept: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al., TACL 2023), of what the other cuts have left.

    Of each row of `kept` [rows, width] (not normalised; 0 for what is out already) only those tokens stay whose
    surprise is nearest to the expected one, as many as it takes to `mass` [rows], and those as near as the last.
    """
    probs = kept / kept.sum(-1, keepdim=True)
    surprise = -probs.log()
    entropy = torch.where(probs > 0, probs * surprise, 0).sum(-1, keepdim=True)
    distance = (surprise - entropy).abs()
    nearest, order = distance.sort(dim=-1, stable=True)
    reached = (probs.gather(1, order).cumsum(-1) < mass[:, None]).sum(-1, keepdim=True)
    farthest = nearest.gather(1, reached.clamp(max=kept.shape[1] - 1))
    return kept.masked_fill(distance > farthest, 0)


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index drawn in proportion to `weights` [rows, n] (not normalised) by `uniform` [rows] in [0, 1)."""
    totals = weights.double().cumsum(-1)
    index = torch.searchsorted(totals, (uniform.double() * totals[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(index, (weights > 0).cumsum(-1).argmax(-1))


def _logprobs(logits: torch.Tensor, token_ids: list[int], top: list[int | None]) -> list[TokenLogprob | None]:
    wanted = {i: num_top for i, num_top in enumerate(top) if num_top is not None}
    found: list[TokenLogprob | None] = [None] * len(top)
    if wanted:
        rows = torch.tensor(list(wanted), device=logits.device)
        entries = token_logprobs(logits[rows], [token_ids[i] for i in wanted], list(wanted.values()))
        for i, entry in zip(wanted, entries, strict=True):
            found[i] = entry
    return found


def token_logprobs(
    logits: torch.Tensor, token_ids: list[int], counts: list[int], *, has_ranks: bool = False
) -> list[TokenLogprob]:
    """Log-probability of each row's token, and of the `counts[row]` likeliest; `logits` [rows, vocab], any float dtype.

    NaN where a row's logits are not finite. With `has_ranks`, the rank of each row's token too.
    """
    found: list[TokenLogprob] = []
    for at in range(0, len(token_ids), _ROWS_AT_ONCE):
        part = slice(at, at + _ROWS_AT_ONCE)
        found += _token_logprobs(logits[part], token_ids[part], counts[part], has_ranks)
    return found


def _token_logprobs(
    logits: torch.Tensor, token_ids: list[int], counts: list[int], has_ranks: bool
) -> list[TokenLogprob]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs >= own).sum(-1).tolist() if has_ranks else [None] * len(token_ids)
    most = max(counts)
    if not most:
        return [TokenLogprob(t, p, (), r) for t, p, r in zip(token_ids, own[:, 0].tolist(), ranks, strict=True)]
    values, ids = logprobs.topk(most, dim=-1)
    tops = [
        tuple(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids.tolist(), values.tolist(), counts, strict=True)
    ]
    return [TokenLogprob(*each) for each in zip(token_ids, own[:, 0].tolist(), tops, ranks, strict=True)]
