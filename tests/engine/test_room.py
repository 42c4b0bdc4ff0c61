"""How much of prompts a step takes on, and whose."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.engine.block_manager import BlockManager
from manylora.engine.room import Pace, PromptCost
from manylora.engine.scheduler import Scheduler
from tests.engine.plans import FakeSlots, request, scheduler, step


def test_long_prompt_is_chunked_beside_decodes() -> None:
    s = scheduler(budget=16)
    s.add(decoding := request(4, 50))
    step(s)
    s.add(long := request(40, 2))
    counts = []
    while not long.num_output_tokens:
        plan = step(s)
        assert plan.num_tokens <= 16
        assert plan.scheduled[0].seq is decoding
        assert plan.scheduled[0].num_tokens == 1
        counts.append(sum(i.num_tokens for i in plan.scheduled if i.seq is long))
    assert counts == [4] * 10, "a quarter of a step, since a stream waits for it"


@pytest.mark.parametrize(("num_streams", "share"), [(1, 0.25), (8, 0.25), (12, 0.375), (16, 0.5), (60, 0.5)])
def test_beside_more_streams_prompts_take_more(num_streams: int, share: float) -> None:
    s = scheduler(budget=512, num_blocks=2000, seats=64)
    for _ in range(num_streams):
        s.add(request(2, 50))
    step(s)
    s.add(request(1000, 1))
    assert step(s).num_tokens - num_streams == int(512 * share)


@pytest.mark.parametrize(
    ("seconds", "num_tokens"),
    [(0.0002, [128] * 6), (0.001, [128, 80, 80]), (0.004, [128, 32, 32]), (0.0, [128, 128])],
)
def test_a_step_that_streams_wait_for_takes_as_much_of_prompts_as_the_last_ones_have_in_time(
    seconds: float, num_tokens: list[int]
) -> None:
    """`seconds` a token of a prompt, beside 20 ms that the step takes anyway."""
    s = scheduler(budget=512, num_blocks=2000, pace=Pace())
    for _ in range(4):
        s.add(request(2, 50))
    step(s)
    plan = step(s)
    assert plan.effort == 0
    s.ran(plan, 0.02)
    s.add(request(1000, 1))
    found = []
    for _ in num_tokens:
        plan = step(s)
        found.append(plan.num_tokens - 4)
        assert plan.effort == pytest.approx(found[-1])
        s.ran(plan, 0.02 + seconds * found[-1])
    assert found == num_tokens


def test_prompts_may_take_as_long_as_a_slow_models_step_takes_anyway() -> None:
    pace = Pace()
    for _ in range(3):
        pace.saw(0, 0.5)
        pace.saw(100, 0.5 + 100 * 0.005)
    assert pace.most_effort == pytest.approx(100)
    pace.saw(3, 9.0)  # of so little it says nothing
    assert pace.most_effort == pytest.approx(100)


@pytest.mark.parametrize("num_streams", [0, 16])
def test_how_long_steps_take_changes_nothing_beside_nobody_and_beside_many(num_streams: int) -> None:
    s = scheduler(budget=512, num_blocks=2000, seats=64, pace=Pace())
    for _ in range(num_streams):
        s.add(request(2, 50))
    step(s)
    s.add(request(2000, 1))
    plan = step(s)
    assert plan.effort is None
    s.ran(plan, 5.0)
    assert step(s).num_tokens == plan.num_tokens


@pytest.mark.parametrize(("num_prompts", "num_tokens"), [(3, 32), (4, 32), (5, 128)])
def test_while_more_wait_for_a_first_token_than_for_the_next_prompts_have_their_whole_share(
    num_prompts: int, num_tokens: int
) -> None:
    s = scheduler(budget=512, num_blocks=2000, seats=64, pace=(pace := Pace()))
    for _ in range(4):
        s.add(request(2, 50))
    step(s)
    pace.saw(0, 0.02)
    pace.saw(100, 0.02 + 100 * 0.004)
    for _ in range(num_prompts):
        s.add(request(1000, 1))
    assert step(s).num_tokens - 4 == num_tokens


def test_a_prompt_alone_takes_all_of_a_step() -> None:
    s = scheduler(budget=16)
    s.add(request(40, 1))
    assert [step(s).num_tokens for _ in range(3)] == [16, 16, 8]


@pytest.mark.parametrize("tenant", ["long", "short"])
def test_a_long_prompt_keeps_nobody_from_a_first_token(tenant: str) -> None:
    """Neither another tenant nor its own, and it has half of each step all the same."""
    s = scheduler(budget=16, num_blocks=1000, seats=64)
    s.add(long := request(800, 1, tenant="long"))
    step(s)
    num_steps, computed = 0, long.num_computed
    while not long.num_output_tokens:
        s.add(short := request(6, 1, tenant=tenant))
        step(s)
        assert short.is_finished
        num_steps += 1
    assert num_steps <= -(-(800 - computed) // 8)


@given(st.lists(st.tuples(st.integers(2, 90), st.integers(1, 6)), min_size=1, max_size=30), st.integers(16, 64))
@settings(max_examples=60, deadline=None)
def test_prompts_of_any_lengths_all_get_their_tokens(requests: list[tuple[int, int]], budget: int) -> None:
    s = scheduler(budget=budget, num_blocks=300, seats=12)
    made = [request(prompt, output, tenant=f"t{number % 3}") for number, (prompt, output) in enumerate(requests)]
    for each in made:
        s.add(each)
    while s.has_work:
        assert 0 < step(s).num_tokens <= budget
    assert [r.num_output_tokens for r in made] == [output for _, output in requests]


def test_deep_in_a_long_prompt_a_step_takes_fewer_tokens() -> None:
    cost = PromptCost(positions=100, windows=(0,))
    s = Scheduler(BlockManager(400, 4), FakeSlots(8), max_num_seqs=8, max_num_batched_tokens=100, prompt_cost=cost)
    s.add(request(2, 500))
    step(s)
    s.add(long := request(1000, 1))
    counts, efforts = [], []
    while not long.num_output_tokens:
        at = long.num_computed
        counts.append(step(s).num_tokens - 1)
        efforts.append(sum(cost.at(position) for position in range(at, at + counts[-1])))
    assert counts[0] > 3 * counts[-2] > 0
    assert max(efforts) <= 30
    assert min(efforts[:-1]) >= 15


def test_a_window_bounds_what_a_token_costs() -> None:
    assert PromptCost(100, (0,)).at(1000) == 11
    assert PromptCost(100, (50, 0)).at(1000) == 1 + (50 + 1000) / 2 / 100
    assert PromptCost().at(10**9) == 1
