"""Who runs when: fair shares, chunks, preemption, adapters on their way."""

import random
from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.block_manager import BlockManager
from manylora.engine.interface import FinishReason, SamplingParams
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence, SequenceStatus
from manylora.engine.turns import FIRST_TURN_STEPS, LONGEST_TURN_STEPS, TURN_STEPS
from tests.engine.plans import FakeSlots, drain, drain_noting, request, scheduler, step


def test_within_a_tenant_first_come_is_first_served() -> None:
    s = scheduler(seats=1)
    requests = [request() for _ in range(5)]
    for r in requests:
        s.add(r)
    order = []
    while s.has_work:
        order += [i.seq for i in step(s).scheduled if i.start == 0]
    assert order == requests


def test_within_a_tenant_the_lowest_priority_is_served_first_and_others_are_not_touched() -> None:
    s = scheduler(seats=1)
    mine = [request(output=1, tenant="a", priority=priority) for priority in (0, 5, -2, 0, -2, 5)]
    theirs = [request(output=1, tenant="b") for _ in range(3)]
    for r in (*mine, *theirs):
        s.add(r)
    order = []
    while s.has_work:
        order += [i.seq for i in step(s).scheduled if i.start == 0]
    assert [r for r in order if r.tenant == "a"] == [mine[i] for i in (2, 4, 0, 3, 1, 5)]
    assert [r for r in order if r.tenant == "b"] == theirs
    assert [r.tenant for r in order[:6]].count("b") == 3, "every second turn, whatever the other's priorities say"


def test_of_one_tenants_sequences_those_with_the_last_priority_make_room_and_come_back_last() -> None:
    s = scheduler(num_blocks=12, seats=4)
    requests = [request(8, 20, priority=priority) for priority in (3, 0, 3, -1)]
    for r in requests:
        s.add(r)
    ended, preempted = [], []
    while s.has_work:
        before = list(s.running)
        step(s)
        ended += [r for r in requests if r.is_finished and r not in ended]
        preempted += [r for r in before if r.status is SequenceStatus.PREEMPTED]
    assert preempted[:2] == [requests[2], requests[0]]
    assert requests[3] not in preempted
    assert [requests.index(r) for r in ended] == [3, 1, 0, 2]


def test_preempted_sequences_lose_nothing_and_come_back_in_order() -> None:
    s = scheduler(num_blocks=8, seats=4)
    requests = [request(8, 20) for _ in range(4)]
    for r in requests:
        s.add(r)
    drain(s)
    assert s.num_preemptions > 0
    assert [r.num_output_tokens for r in requests] == [20] * 4
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)


def test_single_request_is_not_delayed_by_another_tenants_500() -> None:
    s = scheduler(seats=8)
    for _ in range(500):
        s.add(request(8, 100, tenant="flood"))
    for _ in range(20):
        step(s)
    s.add(single := request(8, 4, tenant="quiet"))
    steps = 0
    while not single.num_output_tokens:
        step(s)
        steps += 1
    assert steps <= 3


@pytest.mark.parametrize(("num_hogs", "prompt", "output"), [(1, 200, 195), (2, 100, 95), (6, 40, 26)])
def test_a_tenant_within_its_share_of_blocks_gets_them_from_those_who_hold_more(
    num_hogs: int, prompt: int, output: int
) -> None:
    """However the others hold them: in one long sequence, which has its turn first, or in many."""
    s = scheduler(num_blocks=100, seats=32, budget=512)
    hogs = [request(prompt, output, tenant="hog") for _ in range(num_hogs)]
    for hog in hogs:
        s.add(hog)
    while s.blocks.num_free > 46:
        step(s)
    s.add(single := request(188, 4, tenant="quiet"))
    steps = 0
    while not single.num_output_tokens:
        step(s)
        steps += 1
    assert steps <= LONGEST_TURN_STEPS - 10
    drain(s)
    assert [hog.num_output_tokens for hog in hogs] == [output] * num_hogs


def test_who_asks_for_more_than_its_share_of_blocks_waits_for_them_to_fall_free() -> None:
    s = scheduler(num_blocks=100, seats=8, budget=512)
    for _ in range(4):
        s.add(request(90, 4, tenant="first"))
    step(s)
    s.add(request(300, 4, tenant="second"))
    drain(s)
    assert s.num_preemptions_of("first") == 0


def test_a_lone_sequence_has_its_turn_before_it_makes_room() -> None:
    """Else a stream of small requests would keep it from ever getting on."""
    s = scheduler(num_blocks=100, seats=8, budget=512)
    s.add(hog := request(370, 20, tenant="hog"))
    for _ in range(400):
        if sum(1 for _ in s.waiting) < 3:
            s.add(request(40, 4, tenant="quiet"))
        step(s)
    assert hog.is_finished
    assert s.num_preemptions_of("hog") <= 3


def test_tenants_with_equal_weights_get_equal_tokens_and_heavier_ones_more() -> None:
    s = scheduler(seats=8)
    tokens: Counter[str] = Counter()
    for tenant, weight in (("a", 1.0), ("b", 1.0), ("heavy", 2.0)):
        for _ in range(200):
            s.add(request(4, 20, tenant=tenant, weight=weight))
    for _ in range(600):
        for item in step(s).scheduled:
            tokens[item.seq.tenant] += item.num_tokens
    assert tokens["a"] == pytest.approx(tokens["b"], rel=0.1)
    assert tokens["heavy"] == pytest.approx(2 * tokens["a"], rel=0.15)


def test_lone_tenant_uses_every_seat() -> None:
    s = scheduler(seats=8, budget=64)
    for _ in range(20):
        s.add(request(4, 50, tenant="only"))
    step(s)
    assert len(step(s).scheduled) == 8


def test_pause_earns_no_credit() -> None:
    s = scheduler(seats=2)
    s.add(request(4, 4, tenant="sleeper"))
    drain(s)
    for _ in range(50):
        s.add(request(4, 20, tenant="worker"))
    for _ in range(100):
        step(s)
    for _ in range(50):
        s.add(request(4, 20, tenant="sleeper"))
    tokens: Counter[str] = Counter()
    for _ in range(200):
        for item in step(s).scheduled:
            tokens[item.seq.tenant] += item.num_tokens
    assert tokens["worker"] == pytest.approx(tokens["sleeper"], rel=0.2)


def test_sequence_waiting_for_its_adapter_holds_nobody_up() -> None:
    s = scheduler(slots=FakeSlots(4, delay=10))
    s.add(slow := request(adapter="slow"))
    s.add(quick := request())
    step(s)
    assert slow.status is SequenceStatus.LOADING_ADAPTER
    assert s.num_waiting_for_adapter == 1
    assert quick.num_output_tokens == 1
    drain(s)
    assert slow.finish_reason is FinishReason.LENGTH


def test_starving_adapter_gets_its_turn() -> None:
    s = scheduler(slots=FakeSlots(1), seats=4)
    for _ in range(4):
        s.add(request(4, 50, adapter="popular"))
    step(s)
    s.add(rare := request(4, 4, adapter="rare"))
    steps = 0
    while not rare.num_output_tokens:
        if len(s.waiting) < 4:
            s.add(request(4, 50, adapter="popular"))
        step(s)
        steps += 1
        assert steps < 4 * TURN_STEPS + 5


def test_more_adapters_than_slots_take_turns_until_all_are_done() -> None:
    s = scheduler(slots=FakeSlots(2), seats=16, num_blocks=400)
    requests = [request(4, 60, adapter=f"a{i}") for i in range(8)]
    for r in requests:
        s.add(r)
    first_token: dict[int, int] = {}
    steps = drain_noting(s, requests, first_token)
    assert max(first_token.values()) <= 8 * (FIRST_TURN_STEPS + 3), "nobody waits for another's whole answer"
    assert s.num_preemptions > 0
    assert steps <= 1.3 * 60 * 8 / 2, "and turns cost little"


def test_an_adapter_keeps_its_turn_against_others_that_have_begun() -> None:
    s = scheduler(slots=FakeSlots(1), seats=16)
    for name in ("a", "b"):
        s.add(request(4, 200, adapter=name))
    order = []
    for _ in range(200):
        order += [ref.id for i in step(s).scheduled for ref in i.seq.mix.refs]
    turns = [len(list(run)) for _, run in groupby(order)]
    assert min(turns[2:-1]) >= TURN_STEPS
    assert len(turns) > 5


def test_pinned_adapter_never_yields() -> None:
    slots = FakeSlots(1)
    slots.pinned.add("pinned")
    s = scheduler(slots=slots)
    s.add(holder := request(4, 2 * LONGEST_TURN_STEPS, adapter="pinned"))
    step(s)
    s.add(rare := request(4, 4, adapter="rare"))
    for _ in range(LONGEST_TURN_STEPS + 20):
        step(s)
    assert s.num_preemptions == 0
    assert not rare.num_output_tokens
    assert holder.status is SequenceStatus.RUNNING


def test_new_requests_beyond_the_seats_do_not_interrupt_what_has_begun() -> None:
    s = scheduler(slots=FakeSlots(2), seats=3, num_blocks=400)
    requests = [request(4, 40, adapter=f"a{i}") for i in range(20)]
    for r in requests:
        s.add(r)
    most = 0
    while s.has_work:
        step(s)
        most = max(most, sum(0 < r.num_output_tokens < 40 for r in requests))
    assert most <= 3 + 2


@pytest.mark.parametrize("delay", [0, 3])
def test_a_tenant_with_many_adapters_leaves_the_others_their_places(delay: int) -> None:
    """However many adapters of one tenant wait: another's first one comes within a turn, as if few did."""
    s = scheduler(slots=FakeSlots(4, delay=delay), seats=64, num_blocks=4000, budget=256)
    for number in range(60):
        s.add(request(4, 400, tenant="greedy", adapter=f"g{number}"))
    for _ in range(200):
        step(s)
    for number in range(2):
        s.add(single := request(4, 4, tenant="quiet", adapter=f"q{number}"))
        steps = 0
        while not single.num_output_tokens:
            step(s)
            steps += 1
        assert steps <= FIRST_TURN_STEPS + delay + 6


def test_places_are_shared_by_tenants_and_not_by_adapters() -> None:
    s = scheduler(slots=FakeSlots(4), seats=64, num_blocks=4000, budget=256)
    for number in range(40):
        s.add(request(4, 4000, tenant="greedy", adapter=f"g{number}"))
    for number in range(2):
        s.add(request(4, 4000, tenant="quiet", adapter=f"q{number}"))
    tokens: Counter[str] = Counter()
    for number in range(1500):
        for item in step(s).scheduled:
            tokens[item.seq.tenant] += number > 200
    assert tokens["quiet"] >= 0.7 * tokens["greedy"]


def test_failed_load_ends_its_sequences_only() -> None:
    slots = FakeSlots(4)
    slots.broken.add("bad")
    s = scheduler(slots=slots)
    s.add(bad := request(adapter="bad"))
    s.add(good := request(adapter="good"))
    step(s)
    assert [(seq, str(error)) for seq, error in s.take_failed()] == [(bad, "broken")]
    drain(s)
    assert bad.finish_reason is FinishReason.ERROR
    assert good.finish_reason is FinishReason.LENGTH


def scored(prompt: int) -> Sequence:
    params = SamplingParams(max_tokens=2, prompt_logprobs=1)
    return Sequence("scored", [random.randrange(1000) for _ in range(prompt)], params, tenant="t")


def test_a_step_makes_no_more_logits_of_prompts_than_there_is_memory_for() -> None:
    s = Scheduler(BlockManager(200, 4), FakeSlots(8), max_num_seqs=8, max_num_batched_tokens=64, max_prompt_logits=10)
    requests = [scored(25), request(60, 2), scored(9), scored(40), request(3, 30)]
    for r in requests:
        s.add(r)
    most = 0
    while s.has_work:
        asked = {r for r in requests if r.scores_prompt}
        plan = step(s)
        rows = sum(item.num_tokens for item in plan.scheduled if item.seq in asked)
        assert rows <= 10
        assert all(item.num_tokens > 0 for item in plan.scheduled)
        most = max(most, rows)
    assert most == 10
    assert all(r.finish_reason is FinishReason.LENGTH for r in requests)


def test_a_prompt_is_scored_even_with_memory_for_the_logits_of_one_token() -> None:
    s = Scheduler(BlockManager(200, 4), FakeSlots(8), max_num_seqs=8, max_num_batched_tokens=64, max_prompt_logits=1)
    s.add(first := scored(7))
    s.add(second := scored(5))
    assert drain(s) <= 7 + 5 + 2
    assert first.num_output_tokens == second.num_output_tokens == 2


def test_inputs_that_run_whole_do_so_after_plans_that_were_interrupted() -> None:
    """As many were begun then as do not fit into one step."""
    slots = FakeSlots(8)
    planner = Scheduler(BlockManager(100, 4), slots, max_num_seqs=8, max_num_batched_tokens=32, runs_whole=True)
    inputs = [request(prompt=20, output=0, tenant=f"t{n}") for n in range(3)]
    broken = request(prompt=2, output=0, tenant="u", adapter="broken")
    slots.faults["broken"] = RuntimeError()
    for each in (*inputs[:2], broken):
        planner.add(each)
    for each in inputs[:2]:
        with pytest.raises(RuntimeError):
            planner.plan({each, broken})
    assert planner.running == inputs[:2]
    slots.faults.clear()
    planner.add(inputs[2])
    ended: list[Sequence] = []
    while planner.has_work:
        for item in planner.plan().scheduled:
            assert (item.start, item.num_tokens) == (0, item.seq.num_tokens)
            planner.commit(item)
            planner.finish(item.seq, FinishReason.STOP)
            ended.append(item.seq)
    assert len(ended) == 4
    assert ended[0] is inputs[0]


def test_finishing_twice_changes_nothing() -> None:
    s = scheduler()
    s.add(r := request())
    step(s)
    s.finish(r, FinishReason.ABORTED)
    s.finish(r, FinishReason.STOP)
    assert r.finish_reason is FinishReason.ABORTED
    s.check_integrity()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_traffic_keeps_the_books_and_finishes(data: st.DataObject) -> None:
    slots = FakeSlots(data.draw(st.integers(1, 4)), delay=data.draw(st.integers(0, 3)))
    s = scheduler(
        slots=slots,
        num_blocks=data.draw(st.integers(12, 30)),
        seats=data.draw(st.integers(1, 6)),
        budget=data.draw(st.integers(4, 40)),
    )
    live: list[Sequence] = []
    for _ in range(40):
        action = data.draw(st.sampled_from(["add", "step", "step", "abort"]))
        if action == "add":
            adapter = data.draw(st.sampled_from([None, "a", "b", "c", "d", "e"]))
            tenant = data.draw(st.sampled_from(["x", "y", "z"]))
            seq = request(data.draw(st.integers(1, 24)), data.draw(st.integers(1, 20)), tenant, adapter)
            seq.priority = data.draw(st.integers(-1, 1))
            if data.draw(st.booleans()):
                seq.followers = [request(1, 3, tenant, adapter)]
                seq.followers[0].tokens = list(seq.tokens)
                seq.followers[0].num_prompt_tokens = seq.num_prompt_tokens
            live.append(seq)
            s.add(seq)
        elif action == "abort" and live:
            s.finish(live.pop(data.draw(st.integers(0, len(live) - 1))), FinishReason.ABORTED)
        else:
            step(s)
        s.check_integrity()
    drain(s)
    assert s.blocks.num_used == 0
    assert not +slots.users
    assert all(seq.is_finished for seq in live)
