"""Every field of SamplingParams against a plain numpy reading of it, and draws that depend on nothing else."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine import sampler
from manylora.engine.interface import SamplingParams
from manylora.engine.model_runner import DRAWS_AHEAD, sampling_input, uniform_number, uniform_numbers
from manylora.engine.sampler import NUM_CANDIDATES, largest, token_logprobs
from manylora.engine.sequence import Sequence
from manylora.engine.step_input import Allowed, Sampled

VOCAB = 50
HUGE = 1200


def seq(prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), index: int = 0, **params: Any) -> Sequence:
    made = Sequence("r", list(prompt), SamplingParams(**{"max_tokens": 10, "seed": 7, **params}), index=index)
    for token_id in output:
        made.append(token_id)
    return made


def sample(logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
    """A token of each row, through the arrays that the host part makes."""
    return sampler.sample(logits, sampling_input(seqs, [()] * len(seqs), range(len(seqs)), []))


def random_logits(rows: int, vocab: int = VOCAB, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """What one row may become, in float64: temperature, then top-k, top-p, min-p, typical-p, each of what is left."""
    z = logits.double().numpy() / params.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[1:]] = np.where(before[1:] >= params.top_p, 0, p[order[1:]])
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    if params.typical_p < 1:
        surprise = -np.log(p, where=p > 0, out=np.full_like(p, -np.inf))
        distance = np.where(p > 0, np.abs(surprise - (p[p > 0] * surprise[p > 0]).sum()), np.inf)
        order = np.argsort(distance, kind="stable")
        reached = min((np.cumsum(p[order]) < params.typical_p).sum(), len(p) - 1)
        p[distance > distance[order[reached]]] = 0
    return np.asarray(p / p.sum())


def draw_many(row: torch.Tensor, count: int, **params: Any) -> list[int]:
    seqs = [seq(seed=i, **params) for i in range(count)]
    return sample(row.expand(count, -1), seqs).token_ids


def chi_square_per_degree(found: list[int], expected: np.ndarray) -> float:
    """Pearson's statistic by its degrees of freedom: about 1 for draws of `expected`; rare tokens are pooled."""
    counts = np.bincount(found, minlength=len(expected)).astype(float)
    wanted = expected * len(found)
    common = wanted >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(wanted[common], wanted[~common].sum())
    if wanted[-1] == 0:
        assert observed[-1] == 0
        observed, wanted = observed[:-1], wanted[:-1]
    return float(((observed - wanted) ** 2 / wanted).sum() / max(1, len(wanted) - 1))


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"top_k": 10, "top_p": 0.8},
    {"top_k": 10, "typical_p": 0.5},
    {"temperature": 1.5, "top_p": 0.9, "typical_p": 0.6},
    {"top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


def test_greedy_is_the_largest_logit() -> None:
    logits = random_logits(20)
    found = sample(logits, [seq(temperature=0.0) for _ in range(20)]).token_ids
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1000, 1024])
def test_the_largest_is_torchs_and_the_first_of_equals(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randint(-4, 5, (64, vocab), generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[1] = -torch.inf
    logits[2] = -torch.inf
    logits[2, -1] = -1e30
    logits[3, vocab // 2] = torch.nan
    logits[4, -1] = torch.inf
    values, ids = largest(logits)
    expected, first = logits.float().max(dim=-1)
    assert torch.equal(values.float().nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))
    assert torch.equal(ids, first)


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [VOCAB, HUGE])
def test_draws_follow_the_distribution(params: dict[str, Any], vocab: int) -> None:
    row = random_logits(1, vocab, seed=3)
    expected = distribution(row[0], seq(**params).params)
    found = draw_many(row, 4000, **params)
    assert set(found) <= set(np.flatnonzero(expected).tolist())
    # Fixed seeds: the statistic is one number for ever, so this cannot come out differently by chance.
    assert chi_square_per_degree(found, expected) < 1.6


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_every_allowed_token_is_reached_and_no_other(params: dict[str, Any]) -> None:
    row = torch.linspace(0.0, 3.0, 8)[torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])][None]
    expected = distribution(row[0], seq(**params).params)
    assert set(draw_many(row, 3000, **params)) == set(np.flatnonzero(expected).tolist())


PROCESSORS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
    "typical_p": transformers.TypicalLogitsWarper,
}


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "others", [{}, {"temperature": 1.7}, {"top_k": 12}, {"top_p": 0.8}, {"top_k": 30, "min_p": 0.1}]
)
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_typical_p_leaves_what_that_of_transformers_leaves(mass: float, others: dict[str, Any], spread: float) -> None:
    params = {**others, "typical_p": mass}
    rows = random_logits(3, HUGE, spread=spread, seed=6)
    warp = transformers.LogitsProcessorList(PROCESSORS[name](value) for name, value in params.items())
    expected = torch.softmax(warp(None, rows.double()), dim=-1).numpy()

    for row, left in zip(rows, expected, strict=True):
        np.testing.assert_allclose(distribution(row, seq(**params).params), left, atol=1e-12)
        # In float32 the last token's place can come out one further.
        most = distribution(row, seq(**{**params, "typical_p": mass + 1e-4}).params)
        assert set(draw_many(row[None], 50, **params)) <= set(np.flatnonzero(most).tolist())


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.999},
        {"top_k": NUM_CANDIDATES + 50},
        {"top_k": NUM_CANDIDATES + 50, "top_p": 0.9},
        {"top_k": NUM_CANDIDATES + 50, "min_p": 0.5},
        {"min_p": 0.3},
    ],
    ids=str,
)
def test_flat_distributions_over_a_large_vocabulary_are_cut_exactly(params: dict[str, Any]) -> None:
    """More tokens than the candidates looked at first may be taken here."""
    row = random_logits(1, HUGE, spread=0.3, seed=4)
    expected = distribution(row[0], seq(**params).params)
    assert (expected > 0).sum() > NUM_CANDIDATES or "min_p" in params
    found = draw_many(row, 2000, **params)
    assert set(found) <= set(np.flatnonzero(expected).tolist())
    assert len(set(found)) > 0.6 * min((expected > 0).sum(), 1500)


def test_the_tail_beyond_the_candidates_is_reached_without_cuts() -> None:
    row = torch.zeros(1, HUGE)
    found = draw_many(row, 1000)
    assert max(found) > HUGE * 0.99
    assert len(set(found)) > 500


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-300])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(5, spread=30.0)
    assert sample(logits, [seq(temperature=temperature) for _ in range(5)]).token_ids == logits.argmax(-1).tolist()


def test_forbidden_tokens_are_never_drawn() -> None:
    row = torch.full((1, VOCAB), -math.inf)
    row[0, [4, 9]] = torch.tensor([0.0, 1.0])
    for params in SETTINGS:
        assert set(draw_many(row, 200, **params)) <= {4, 9}


# seeds


def test_a_seed_gives_the_same_token_whatever_else_is_in_the_batch() -> None:
    # Rounded, as bfloat16 logits are: ties must not be broken by the company either.
    row = (random_logits(1, HUGE, seed=5) * 4).round() / 4
    flat = torch.zeros(1, HUGE)
    companies: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 5}, {"min_p": 0.1}]
    for params in SETTINGS + companies:
        watched = seq(**params, seed=99)
        alone = sample(row, [watched]).token_ids[0]
        for company in companies:
            for other in (row, flat):
                logits = torch.cat([other, row, other])
                found = sample(logits, [seq(**company), watched, seq(temperature=0.0)])
                assert found.token_ids[1] == alone, (params, company)


def test_a_seed_gives_the_same_token_after_a_preemption() -> None:
    """A preempted sequence comes back with its tokens; how often it was computed does not count."""
    row = random_logits(1)
    first = seq((1, 2), (3, 4), seed=5)
    again = seq((1, 2), (3, 4), seed=5)
    again.num_computed = 3
    assert sample(row, [first]).token_ids == sample(row, [again]).token_ids


def test_places_choices_and_seeds_draw_from_streams_of_their_own() -> None:
    row = torch.zeros(1, HUGE)
    draws = [
        sample(row, [seq(output=(1,) * place, index=index, seed=seed)]).token_ids[0]
        for place in range(5)
        for index in range(5)
        for seed in (0, 1, -1, 2**63, 2**64 - 2)
    ]
    assert len(set(draws)) > 0.9 * len(draws)


def test_uniform_numbers_are_uniform() -> None:
    numbers = np.array([uniform_numbers(seed, index, 0, 50) for seed in range(20) for index in range(5)]).ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers * 20).astype(int), minlength=20)
    assert ((counts - 250) ** 2 / 250).sum() < 40


SEEDS = (0, 1, -1, 63, 2**63 - 1, -(2**63))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_number_is_that_of_numpys_own_generator_at_the_tokens_place(seed: int) -> None:
    """One generator for each token, keyed by seed and index and counting places, is what the numbers stand for."""
    for index in (0, 3):
        watched = seq(seed=seed, index=index)
        for place in range(3 * DRAWS_AHEAD):
            key = np.array([seed % 2**64, index], dtype=np.uint64)
            expected = np.random.Generator(np.random.Philox(key=key, counter=place)).random()
            assert uniform_number(watched) == expected
            watched.append(1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(0, 4), st.lists(st.integers(0, 4 * DRAWS_AHEAD), min_size=1, max_size=12))
def test_numbers_do_not_depend_on_which_were_asked_for_before(seed: int, index: int, places: list[int]) -> None:
    """A sequence may go back, or come anew with its tokens: place decides, not the way there."""
    watched = seq(seed=seed, index=index)
    for place in places:
        watched.tokens = [1] * (1 + place)
        assert uniform_number(watched) == uniform_number(seq(seed=seed, index=index, output=(1,) * place))


def test_the_generator_is_set_up_rarely_and_not_for_all_sequences_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def counted(*args: int) -> list[float]:
        made.append(args)
        return uniform_numbers(*args)

    monkeypatch.setattr("manylora.engine.model_runner.uniform_numbers", counted)
    watched = [seq(seed=1000 + 7 * i) for i in range(64)]
    per_step = []
    for _ in range(1 + 2 * DRAWS_AHEAD):
        made.clear()
        for each in watched:
            uniform_number(each)
            each.append(1)
        per_step.append(len(made))
    assert per_step[0] == len(watched)
    assert sum(per_step) <= len(watched) * 4
    assert max(per_step[1:]) <= 4


def test_requests_without_a_seed_differ() -> None:
    row = torch.zeros(1, HUGE)
    assert len(set(sample(row.expand(50, -1), [seq(seed=None) for _ in range(50)]).token_ids)) > 25


# penalties and bias


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12).map(tuple),
    st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple),
    st.floats(0.5, 2.0),
)
def test_repetition_penalty_is_hugging_faces(prompt: tuple[int, ...], output: tuple[int, ...], penalty: float) -> None:
    logits = random_logits(1, seed=len(prompt))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[*prompt, *output]]), logits.clone()
    )
    watched = seq(prompt, output, temperature=0.0, repetition_penalty=penalty)
    assert sample(logits, [watched]).token_ids == expected.argmax(-1).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=30).map(tuple), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0), st.integers(0, 99)
)
def test_presence_and_frequency_penalties_are_openais(
    output: tuple[int, ...], presence: float, frequency: float, seed: int
) -> None:
    """mu[j] -= c[j] * frequency + (c[j] > 0) * presence, c counting the output's tokens and not the prompt's."""
    logits = random_logits(1, 12, seed=seed)
    counts = np.bincount(output, minlength=12)
    expected = logits[0].numpy() - counts * frequency - (counts > 0) * presence
    watched = seq((0, 1, 2), output, temperature=0.0, presence_penalty=presence, frequency_penalty=frequency)
    token = sample(logits, [watched]).token_ids[0]
    assert expected[token] >= expected.max() - 1e-5


def test_logit_bias_moves_the_choice_and_bans() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    assert sample(logits, [seq(temperature=0.0, logit_bias=((best, -100.0),))]).token_ids[0] != best
    assert sample(logits, [seq(temperature=0.0, logit_bias=((17, 100.0), (3, 1.0)))]).token_ids == [17]
    assert set(draw_many(logits, 300, logit_bias=((17, 100.0),))) == {17}


def test_bias_and_penalties_shape_the_drawn_distribution_too() -> None:
    row = random_logits(1, 8, spread=1.0)
    shaped = row.clone()
    shaped[0, 2] += 1.5
    shaped[0, 5] -= 2 * 0.5 + 0.7
    expected = distribution(shaped[0], seq().params)
    found = draw_many(row, 4000, output=(5, 5), logit_bias=((2, 1.5),), frequency_penalty=0.5, presence_penalty=0.7)
    assert chi_square_per_degree(found, expected) < 1.6


def test_one_rows_penalties_leave_the_others_and_the_input_alone() -> None:
    logits = random_logits(2)
    kept = logits.clone()
    punished = seq((1,), (3, 3), temperature=0.0, repetition_penalty=5.0, logit_bias=((1, 100.0),))
    found = sample(logits, [punished, seq(temperature=0.0)])
    assert found.token_ids == [1, int(kept[1].argmax())]
    assert torch.equal(logits, kept)


# log-probabilities


@pytest.mark.parametrize("held_rows", [(0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.4}, {"logit_bias": ((5, 50.0),)}]
)
def test_a_row_that_is_held_takes_what_is_allowed_and_moves_no_other_row(
    params: dict[str, Any], dtype: torch.dtype, held_rows: tuple[int, ...]
) -> None:
    logits = random_logits(4).to(dtype)
    kept = logits.clone()
    seqs = [seq(seed=i, logprobs=2, **params) for i in range(4)]
    free = sample(logits, seqs)
    some = {row: sorted({3, 40 + row, 49}) for row in held_rows}
    bits = np.zeros((len(held_rows), 2), dtype=np.uint32)
    for i, row in enumerate(held_rows):
        for token_id in some[row]:
            bits[i, token_id // 32] |= np.uint32(1 << token_id % 32)
    wanted = sampling_input(seqs, [()] * 4, range(4), [])
    held = sampler.sample(logits, replace(wanted, allowed=Allowed(np.array(held_rows), bits)))
    for row in range(4):
        if row not in held_rows:
            assert held.token_ids[row] == free.token_ids[row]
            continue
        assert held.token_ids[row] in some[row]
        if params.get("temperature") == 0.0:
            assert held.token_ids[row] == max(some[row], key=lambda i: float(kept[row, i]))
        own, before = held.logprobs[row], torch.log_softmax(kept[row].float(), -1)
        assert own is not None
        assert own.logprob == pytest.approx(float(before[held.token_ids[row]]))  # the model's, not of what is allowed
        assert own.top[0][0] == int(kept[row].argmax())
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_the_models_own_log_softmax(dtype: torch.dtype) -> None:
    logits = random_logits(4).to(dtype)
    expected = torch.log_softmax(logits.float(), -1)
    seqs = [
        seq(temperature=0.7, top_k=3, logprobs=5),
        seq(temperature=0.0, logprobs=0, logit_bias=((4, 50.0),)),
        seq(temperature=0.0),
        seq(temperature=1.0, logprobs=20, frequency_penalty=1.0, output=(3,)),
    ]
    found = sample(logits, seqs)
    assert found.logprobs[2] is None
    for i, wanted in ((0, 5), (1, 0), (3, 20)):
        entry = found.logprobs[i]
        assert entry is not None
        assert entry.token_id == found.token_ids[i]
        assert entry.logprob == pytest.approx(float(expected[i, entry.token_id]), abs=1e-5)
        values, ids = expected[i].topk(wanted)
        assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert Counter(t for t, _ in entry.top) == Counter(ids.tolist())


def test_token_logprobs_of_a_prompt_are_those_of_the_tokens_that_follow() -> None:
    logits = random_logits(3)
    expected = torch.log_softmax(logits, -1)
    found = token_logprobs(logits, [5, 6, 7], [0, 2, 1])
    assert [e.token_id for e in found] == [5, 6, 7]
    assert [e.logprob for e in found] == pytest.approx([float(expected[i, 5 + i]) for i in range(3)], abs=1e-6)
    assert [len(e.top) for e in found] == [0, 2, 1]


def test_log_probabilities_of_many_rows_are_those_of_each_alone_and_made_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = random_logits(150).bfloat16()
    token_ids, counts = [i % VOCAB for i in range(150)], [i % 4 for i in range(150)]
    alone = [token_logprobs(logits[i : i + 1], token_ids[i : i + 1], counts[i : i + 1])[0] for i in range(150)]
    made: list[int] = []
    log_softmax = torch.log_softmax

    def noted(rows: torch.Tensor, dim: int) -> torch.Tensor:
        made.append(rows.shape[0])
        return log_softmax(rows, dim)

    monkeypatch.setattr(torch, "log_softmax", noted)
    assert token_logprobs(logits, token_ids, counts) == alone
    assert sum(made) == 150
    assert max(made) <= 32


# rows that are no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, *SETTINGS], ids=str)
@pytest.mark.parametrize("vocab", [VOCAB, HUGE])
def test_a_spoiled_row_gets_some_token_and_moves_no_other_row(value: float, params: dict[str, Any], vocab: int) -> None:
    good = random_logits(2, vocab)
    bad = torch.full((1, vocab), value)
    seqs = [seq(seed=1, **params, logprobs=3), seq(seed=2, **params, logprobs=3), seq(seed=3, **params, logprobs=3)]
    clean = sample(good, [seqs[0], seqs[2]])
    found = sample(torch.cat([good[:1], bad, good[1:]]), seqs)
    assert 0 <= found.token_ids[1] < vocab
    assert found.is_finite == [True, False, True]
    assert [found.token_ids[0], found.token_ids[2]] == clean.token_ids
    assert [found.logprobs[0], found.logprobs[2]] == clean.logprobs


def test_one_spoiled_logit_is_survived() -> None:
    row = random_logits(1)
    row[0, 3] = math.nan
    for params in SETTINGS:
        assert all(0 <= t < VOCAB for t in draw_many(row, 20, **params))


@pytest.mark.parametrize(("value", "is_finite"), [(math.nan, False), (math.inf, False), (-math.inf, True)])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"repetition_penalty": 2.0}, {"logit_bias": ((3, -100.0),)}])
def test_one_logit_that_is_no_number_is_told_and_a_forbidden_token_is_none(
    value: float, is_finite: bool, params: dict[str, Any]
) -> None:
    row = random_logits(1)
    row[0, 3] = value
    assert sample(row, [seq((1, 3), **params)]).is_finite == [is_finite]


@pytest.mark.parametrize("penalty", [1e-300, 1e-38, 1e-10, 100.0])
def test_no_penalty_makes_a_row_that_is_no_number(penalty: float) -> None:
    row = torch.cat([torch.zeros(1, 10), random_logits(1, VOCAB - 10, spread=1e4)], dim=1)
    for temperature in (0.0, 1.0):
        watched = seq(tuple(range(VOCAB)), (3, 3), repetition_penalty=penalty, temperature=temperature)
        found = sample(row, [watched])
        assert found.is_finite == [True]
        assert found.token_ids == [int(row.argmax())]
