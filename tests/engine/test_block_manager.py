"""Blocks are handed out, shared and taken back without losing or mixing any."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.block_manager import BlockManager
from manylora.engine.interface import AdapterRef, SamplingParams
from manylora.engine.sequence import Sequence

PARAMS = SamplingParams(max_tokens=4)


def sequence(
    tokens: list[int],
    adapter: str | None = None,
    request_id: str = "r",
    *,
    tenant: str = "t",
    owner: str = "public",
    salt: str | None = None,
) -> Sequence:
    ref = AdapterRef(adapter, owner, "a", 1, "d") if adapter else None
    return Sequence(request_id, list(tokens), PARAMS, adapter=ref, tenant=tenant, cache_salt=salt)


def run(blocks: BlockManager, seq: Sequence) -> int:
    """Take, allocate and compute all of a sequence; returns how many tokens came from the cache."""
    cached = blocks.take_prefix(seq)
    assert blocks.allocate(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    blocks.mark_computed(seq)
    return cached


def test_second_request_takes_the_full_blocks_of_the_first() -> None:
    blocks = BlockManager(16, 4)
    first, second = sequence(list(range(10))), sequence([*range(8), 99, 98, 97])
    assert run(blocks, first) == 0
    assert run(blocks, second) == 8
    assert first.block_table[:2] == second.block_table[:2]
    blocks.check_integrity([first, second])


def test_one_token_is_always_left_to_run() -> None:
    blocks = BlockManager(16, 4)
    run(blocks, sequence(list(range(8))))
    assert run(blocks, sequence(list(range(8)))) == 4


def test_freed_blocks_answer_until_they_are_handed_out_again() -> None:
    blocks = BlockManager(4, 4)
    first = sequence(list(range(9)))
    run(blocks, first)
    blocks.free(first)
    assert blocks.num_used == 0
    again = sequence(list(range(9)))
    assert run(blocks, again) == 8
    blocks.free(again)
    run(blocks, filler := sequence(list(range(100, 116))))
    blocks.free(filler)
    assert blocks.take_prefix(sequence(list(range(9)))) == 0


def test_other_adapter_and_base_share_nothing() -> None:
    blocks = BlockManager(16, 4)
    run(blocks, sequence(list(range(9)), adapter="one"))
    assert run(blocks, sequence(list(range(9)), adapter="two")) == 0
    assert run(blocks, sequence(list(range(9)))) == 0
    assert run(blocks, sequence(list(range(9)), adapter="one")) == 8


def test_without_prefix_cache_only_the_same_request_shares() -> None:
    blocks = BlockManager(16, 4, share_prefixes=False)
    run(blocks, sequence(list(range(9)), request_id="a"))
    assert run(blocks, sequence(list(range(9)), request_id="b")) == 0
    assert run(blocks, sequence(list(range(9)), request_id="a")) == 8


PROMPT = list(range(9))


@pytest.mark.parametrize("adapter", [None, "one"])
@pytest.mark.parametrize("share_public", [False, True])
def test_another_tenant_finds_nothing_unless_the_public_is_shared(adapter: str | None, share_public: bool) -> None:
    blocks = BlockManager(16, 4, share_public=share_public)
    run(blocks, sequence(PROMPT, adapter, tenant="acme"))
    assert run(blocks, sequence(PROMPT, adapter, tenant="rival")) == (8 if share_public else 0)
    assert run(blocks, sequence(PROMPT, adapter, tenant="acme")) == 8


def test_prefixes_of_a_tenants_own_adapter_are_never_everybodys() -> None:
    blocks = BlockManager(16, 4, share_public=True)
    run(blocks, sequence(PROMPT, "one", tenant="acme", owner="acme"))
    assert run(blocks, sequence(PROMPT, "one", tenant="rival", owner="acme")) == 0


def test_a_salt_names_those_who_share() -> None:
    blocks = BlockManager(32, 4)
    run(blocks, sequence(PROMPT, tenant="acme", salt="x"))
    assert run(blocks, sequence(PROMPT, tenant="acme")) == 0, "nor does its own tenant without the salt"
    assert run(blocks, sequence(PROMPT, tenant="rival", salt="y")) == 0
    assert run(blocks, sequence(PROMPT, tenant="rival", salt="x")) == 8
    assert run(blocks, sequence(PROMPT, "one", tenant="rival", salt="x")) == 0


NAMES = st.sampled_from(["", "t", "tt", "t1:", "1:t", "tenant", "salt", "everybody", "request"])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_blocks_are_found_by_those_who_may_share_them_and_nobody_else(
    data: st.DataObject, share_prefixes: bool, share_public: bool
) -> None:
    """Names that could run into each other where they are joined, in every role."""
    blocks = BlockManager(64, 4, share_prefixes=share_prefixes, share_public=share_public)

    def drawn() -> tuple[Sequence, tuple[object, ...]]:
        adapter, tenant, request = data.draw(NAMES), data.draw(NAMES), data.draw(NAMES)
        owner, salt = data.draw(st.sampled_from(["public", "t"])), data.draw(st.none() | NAMES)
        seq = sequence(PROMPT, adapter or None, request, tenant=tenant, owner=owner, salt=salt)
        is_public = not adapter or owner == "public"
        if not share_prefixes:
            return seq, (adapter, "request", request)
        if salt is not None:
            return seq, (adapter, "salt", salt)
        return seq, (adapter, "everybody") if share_public and is_public else (adapter, "tenant", tenant)

    first, its_group = drawn()
    second, other_group = drawn()
    run(blocks, first)
    assert run(blocks, second) == (8 if its_group == other_group else 0)


def test_allocation_that_does_not_fit_changes_nothing() -> None:
    blocks = BlockManager(2, 4)
    seq = sequence(list(range(9)))
    assert not blocks.allocate(seq, 9)
    assert seq.block_table == []
    assert blocks.num_free == 2


def test_request_for_prompt_logits_takes_nothing_from_the_cache() -> None:
    blocks = BlockManager(16, 4)
    run(blocks, sequence(list(range(9))))
    seq = Sequence("p", list(range(9)), SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert blocks.take_prefix(seq) == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_lives_of_sequences_keep_the_books(data: st.DataObject) -> None:
    blocks = BlockManager(data.draw(st.integers(2, 12)), data.draw(st.sampled_from([1, 2, 4])))
    live: list[Sequence] = []
    for _ in range(60):
        action = data.draw(st.sampled_from(["new", "grow", "free"]))
        if action == "new":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=16))
            seq = sequence(tokens, adapter=data.draw(st.sampled_from([None, "a"])))
            blocks.take_prefix(seq)
            if blocks.allocate(seq, seq.num_tokens):
                seq.num_computed = seq.num_tokens
                blocks.mark_computed(seq)
                live.append(seq)
            else:
                blocks.free(seq)
        elif live:
            seq = live[data.draw(st.integers(0, len(live) - 1))]
            if action == "grow" and blocks.allocate(seq, seq.num_tokens + 1):
                seq.append(data.draw(st.integers(0, 1)))
                seq.num_computed = seq.num_tokens
                blocks.mark_computed(seq)
            elif action == "free":
                blocks.free(seq)
                live.remove(seq)
        blocks.check_integrity(live)
    for seq in live:
        blocks.free(seq)
    blocks.check_integrity([])
    assert blocks.num_free == blocks.num_blocks
