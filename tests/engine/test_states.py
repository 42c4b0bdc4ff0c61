"""Layers that keep a state of each sequence: its numbers are its own whatever else runs, and steps can be run again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from manylora.engine.block_manager import BlockManager
from manylora.engine.build import EngineBuilder
from manylora.engine.interface import FinishReason
from manylora.engine.model_runner import _state
from manylora.engine.pieces import Pieces
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Scheduled, Sequence
from manylora.errors import InvalidAdapter, NotEnoughMemory
from manylora.lora.format.reader import read
from manylora.models.loading import load_base
from manylora.models.wrapping import wrap
from tests.engine.faults import Faults
from tests.engine.harness import PIECE_SIZE, TORCH, Rig, available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.engine.plans import FakeSlots, pretend_to_run, request, step
from tests.models.front_door import prompts, settings_for, start
from tests.models.zoo import make_zoo_model
from tests.tiny_adapters import make_adapter

# A state beside attention, one that takes single tokens only behind a sequence's first ones, a convolution.
TYPES = {
    "qwen3_5_text": ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj", "down_proj"],
    "mamba": ["in_proj", "x_proj"],
    "lfm2": ["in_proj", "out_proj", "v_proj"],
}
LENGTHS = (3, 60, 9, 33, 1, 17, 8, 24)
LAYERS: dict[str, dict[str, Any]] = {"lfm2": {"layer_types": ["conv", "full_attention"]}}
Made = tuple[Path, Path]


@pytest.fixture(scope="module", params=TYPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base and an adapter of it."""
    kind = str(request.param)
    root = tmp_path_factory.mktemp(kind)
    folder = make_zoo_model(kind, root / "base", **LAYERS.get(kind, {}))
    return folder, make_adapter(folder, root / "tuned", rank=4, seed=1, targets=TYPES[kind])


@pytest.fixture
def rig(made: Made, kernel: str) -> Iterator[Rig]:
    folder, adapter = made
    built = build_rig(load(folder), {"tuned": adapter}, kernel=kernel)
    yield built
    built.close()


@pytest.fixture(params=available_kernels)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def numbers(rig: Rig, request_id: str) -> list[object]:
    """Every log-probability that a request was told."""
    return [
        (each.token_id, each.logprob, each.top)
        for output in rig.outputs[f"{request_id}/0"]
        for each in (*output.delta.prompt_logprobs, *output.delta.logprobs)
    ]


def is_exact(rig: Rig) -> bool:
    """Not where the model's own code multiplies the rows of a batch by the head (Mamba's)."""
    return rig.is_exact and not rig.wrapped.survey.kept & rig.wrapped.survey.on_logit_rows


def name_of(number: int) -> str | None:
    return "tuned" if number % 2 else None


def test_each_sequence_of_a_batch_gets_what_it_gets_alone(rig: Rig, made: Made) -> None:
    folder, adapter = made
    asked = prompts(lengths=LENGTHS)
    for i, prompt in enumerate(asked):
        rig.add(f"r{i}", prompt, name_of(i), logprobs=3, max_tokens=6)
    rig.run()
    for i, prompt in enumerate(asked):
        check_greedy(with_adapter(folder, adapter if i % 2 else None), prompt, rig.tokens(f"r{i}"))
        if is_exact(rig):
            rig.add(f"alone{i}", prompt, name_of(i), logprobs=3, max_tokens=6)
            rig.run()
            assert numbers(rig, f"alone{i}") == numbers(rig, f"r{i}")


def test_a_scored_prompt_gets_what_it_gets_alone_where_a_step_has_room_for_a_part_of_its_logits(made: Made) -> None:
    rig = build_rig(load(made[0]), kernel=available_kernels[-1], max_prompt_logits=3 * PIECE_SIZE + 3)
    asked = prompts(lengths=(60, 33, 9, 47))
    for i, prompt in enumerate(asked):
        rig.add(f"r{i}", prompt, prompt_logprobs=3, max_tokens=2)
    rig.run()
    for i, prompt in enumerate(asked):
        rig.add(f"alone{i}", prompt, prompt_logprobs=3, max_tokens=2)
        rig.run()
        assert len(numbers(rig, f"r{i}")) == len(prompt)
        if is_exact(rig):
            assert numbers(rig, f"alone{i}") == numbers(rig, f"r{i}")
    rig.close()


def test_a_preempted_sequence_goes_on_exactly(made: Made) -> None:
    folder, adapter = made
    asked = prompts(lengths=LENGTHS)
    found = []
    for num_blocks in (200, 22):
        rig = build_rig(load(folder), {"tuned": adapter}, kernel=available_kernels[-1], num_blocks=num_blocks)
        for i, prompt in enumerate(asked):
            rig.add(f"r{i}", prompt, name_of(i), logprobs=1, max_tokens=14)
        rig.run()
        rig.close()
        assert (rig.scheduler.num_preemptions > 0) == (num_blocks == 22)
        found.append([rig.tokens(f"r{i}") for i in range(len(asked))])
        if is_exact(rig):
            found[-1] = [numbers(rig, f"r{i}") for i in range(len(asked))]  # type: ignore[misc]
    assert found[0] == found[1]


def test_a_step_that_is_run_again_begins_with_the_same_states(rig: Rig) -> None:
    asked = prompts(lengths=LENGTHS[:4])

    def run(name: str) -> list[list[int]]:
        for i, prompt in enumerate(asked):
            rig.add(f"{name}{i}", prompt, name_of(i))
        rig.run()
        return [rig.tokens(f"{name}{i}") for i in range(len(asked))]

    expected = run("calm")
    faults = Faults(rig).install()
    faults.after("forward", 2, 7, 13)
    faults.after("sample", 4, 10)
    assert run("shaken") == expected
    assert faults.counted


def test_several_choices_and_a_second_request_find_no_state_of_others(rig: Rig) -> None:
    prompt = prompts(lengths=(40,))[0]
    rig.add("n", prompt, "tuned", n=3, temperature=1.0, seed=7)
    rig.run()
    rig.add("again", prompt, "tuned", n=3, temperature=1.0, seed=7)
    rig.run()
    for index in range(3):
        assert rig.tokens("n", index) == rig.tokens("again", index)
    assert len({tuple(rig.tokens("n", index)) for index in range(3)}) > 1


def run_alone(rig: Rig, request_id: str, prompt: list[int], adapter: str | None) -> int:
    """Run a request; how many of its tokens were found in the cache."""
    seq = rig.add(request_id, prompt, adapter, logprobs=3, max_tokens=6)
    rig.run()
    return seq.num_cached_tokens


def test_a_prompt_whose_beginning_is_known_gets_what_it_gets_without(rig: Rig, made: Made) -> None:
    """At a known prompt's last border at once; where prompts part, from the third of them on."""
    folder, adapter = made
    whole, rest = prompts(lengths=(60, 20))
    asked = {"first": whole, "same": whole, "parting": whole[:45] + rest, "third": whole[:45] + rest[:9]}
    longer = whole + rest
    fresh = build_rig(load(folder), {"tuned": adapter}, kernel=available_kernels[-1], num_snapshots=0)
    for name in (None, "tuned"):
        found = {key: run_alone(rig, f"{key}-{name}", prompt, name) for key, prompt in asked.items()}
        assert found == {"first": 0, "same": 56, "parting": 0, "third": 40}
        assert run_alone(rig, f"longer-{name}", longer, name) == 56
        for key, prompt in {**asked, "longer": longer}.items():
            assert run_alone(fresh, f"{key}-{name}", prompt, name) == 0
            if rig.is_exact and is_exact(fresh):
                assert numbers(rig, f"{key}-{name}") == numbers(fresh, f"{key}-{name}")
            else:
                check_greedy(with_adapter(folder, adapter if name else None), prompt, rig.tokens(f"{key}-{name}"))
    fresh.close()
    assert (rig.scheduler.blocks.snapshots.num_hits, fresh.scheduler.blocks.snapshots.num_hits) == (6, 0)


@pytest.mark.parametrize("kind", ["qwen3_5_text"])
def test_32_sequences_of_other_lengths_get_what_each_gets_alone(kind: str, tmp_path: Path) -> None:
    folder = make_zoo_model(kind, tmp_path / "base")
    rig = build_rig(load(folder), kernel=available_kernels[-1], num_blocks=500)
    asked = prompts(lengths=tuple(1 + 7 * i % 61 for i in range(32)))
    for i, prompt in enumerate(asked):
        rig.add(f"r{i}", prompt, logprobs=3, max_tokens=6)
    rig.run()
    for i, prompt in enumerate(asked):
        run_alone(rig, f"alone{i}", prompt, None)
        assert rig.tokens(f"alone{i}") == rig.tokens(f"r{i}")
        if is_exact(rig):
            assert numbers(rig, f"alone{i}") == numbers(rig, f"r{i}")
    rig.close()


def test_virtual_tokens_are_refused_where_a_state_has_seen_none(made: Made, tmp_path: Path) -> None:
    base, _ = made
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "virtual")
    with pytest.raises(InvalidAdapter, match="something else than keys and values"):
        read(tmp_path / "virtual", wrap(load(base), TORCH).modules, max_rank=8, max_size=2**24)


def test_states_that_take_more_than_the_cache_are_refused(tmp_path: Path) -> None:
    settings = settings_for(make_zoo_model("mamba2", tmp_path / "base"), kv_cache_memory=2**16)
    with pytest.raises(NotEnoughMemory, match="lower --max-num-seqs or raise --kv-cache-memory"):
        EngineBuilder(settings, load_base(settings))._cache()


def test_pieces_are_no_longer_than_there_is_memory_for_the_logits_of(tmp_path: Path) -> None:
    settings = settings_for(make_zoo_model("mamba2", tmp_path / "base"))
    builder = EngineBuilder(settings, load_base(settings))

    def size(num_logits: int) -> int:
        memory = num_logits * builder.wrapped.vocab_size * 4
        builder.settings = settings.model_copy(update={"prompt_logits_memory": memory})
        pieces = builder._pieces()
        assert pieces is not None
        return pieces.size

    assert size(1000) > size(6) == 4


# copies of states


@settings(max_examples=60)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 12), st.integers(0, 8)), min_size=2, max_size=9
    ),
    num_snapshots=st.integers(0, 3),
    num_blocks=st.sampled_from([16, 24, 60]),
    spoiling=st.sets(st.integers(1, 20), max_size=2),
    continues=st.booleans(),
)
def test_whoever_begins_with_a_copy_begins_with_its_own_tokens(
    asked: list[tuple[int, int, int, int]], num_snapshots: int, num_blocks: int, spoiling: set[int], continues: bool
) -> None:
    """Over prompts that part early and late, with blocks, rooms and seats that run out, and with blocks gone bad."""
    pieces = Pieces(8, continues)
    blocks = BlockManager(num_blocks, 4, num_states=3, border=8, num_snapshots=num_snapshots)
    scheduler = Scheduler(blocks, FakeSlots(8), max_num_seqs=3, max_num_batched_tokens=24, pieces=pieces)
    to_come = []
    for same, other, output, at in asked:
        seq = request(output=output)
        seq.tokens = [1] * same + [2] * other
        seq.num_prompt_tokens = len(seq.tokens)
        to_come.append((at, seq))
    rooms: dict[int, list[int]] = {}
    made_by: dict[int, Sequence] = {}
    for number in range(500):
        for at, seq in to_come:
            if at == number:
                scheduler.add(seq)
        if number > 8 and not scheduler.has_work:
            return
        plan = scheduler.plan()
        for item in plan.scheduled:
            given, seq = _state(item, pieces), item.seq
            assert given.begins_with < 0 or rooms[given.begins_with] == seq.tokens[: item.start]
            rooms |= {room: seq.tokens[:place] for place, room in given.snapshots}
            made_by |= dict.fromkeys((room for _, room in given.snapshots), seq)
        pretend_to_run(scheduler, plan)
        if number in spoiling and scheduler.running:
            bad = scheduler.running[0]
            rooms |= {room: [] for room, seq in made_by.items() if seq is bad}
            blocks.spoil(bad)
            scheduler.finish(bad, FinishReason.ERROR)
        scheduler.check_integrity()
    raise AssertionError("a prompt was never run to its end")


def test_copies_are_no_more_than_a_part_of_the_cache(tmp_path: Path) -> None:
    settings = settings_for(make_zoo_model("mamba2", tmp_path / "base"))
    builder, engine, tiers = start(settings, {})
    tiers.close()
    snapshots = engine.scheduler.blocks.snapshots
    assert snapshots.size_bytes == builder.wrapped.survey.state_bytes
    assert 0 < snapshots.count * snapshots.size_bytes <= 2**25 / 4
    builder.wrapped.survey.keepers["another"] = next(iter(builder.wrapped.survey.keepers.values()))
    assert builder._num_snapshots() == 0


# pieces


def sequence(num_prompt: int, num_output: int = 0, computed: int = 0) -> Sequence:
    seq = request(num_prompt)
    seq.tokens += [1] * num_output
    seq.num_computed = computed
    return seq


def test_pieces_end_at_the_same_places_wherever_steps_end() -> None:
    pieces = Pieces(8)
    seq = sequence(20, num_output=3)
    assert pieces.cut(seq, 0, 23) == (8, 8, 4, 1, 1, 1)
    assert pieces.cut(seq, 0, 8) + pieces.cut(seq, 8, 20) == (8, 8, 4)
    assert pieces.cut(seq, 21, 22) == (1,)
    assert Pieces(8, continues=False).cut(seq, 0, 12) == (8, 1, 1, 1, 1)
    assert Pieces(1).cut(seq, 0, 4) == (1, 1, 1, 1)


def planner(pieces: Pieces, seats: int, budget: int, max_prompt_logits: int | None = None) -> Scheduler:
    return Scheduler(
        BlockManager(1000, 4, num_states=seats),
        FakeSlots(8),
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        max_prompt_logits=max_prompt_logits,
        pieces=pieces,
    )


@settings(max_examples=40)
@given(
    asked=st.lists(st.tuples(st.integers(1, 90), st.booleans(), st.integers(0, 5)), min_size=1, max_size=8),
    outputs=st.integers(1, 8),
    seats=st.integers(2, 6),
    pieces=st.builds(Pieces, st.sampled_from([1, 4, 16]), st.booleans()),
    more=st.tuples(st.integers(0, 40), st.integers(0, 9)),
)
def test_every_prompt_is_run_to_its_end_in_whole_pieces(
    asked: list[tuple[int, bool, int]], outputs: int, seats: int, pieces: Pieces, more: tuple[int, int]
) -> None:
    """From the least budget with which a server starts, beside any number of answers, scored or not."""
    scheduler = planner(pieces, seats, seats + pieces.size + more[0], pieces.size + more[1])
    to_come = [(at, request(length, outputs), is_scored) for length, is_scored, at in asked]
    for number in range(2000):
        for at, seq, is_scored in to_come:
            if at == number:
                seq.wants_prompt_logits = is_scored
                scheduler.add(seq)
        if number > 5 and not scheduler.has_work:
            return
        for item in step(scheduler).scheduled:
            end = item.start + item.num_tokens
            is_border = end >= item.seq.num_prompt_tokens or not end % pieces.size
            assert is_border or (item.start and not pieces.continues)
    raise AssertionError("a prompt was never run to its end")


def test_short_prompts_that_keep_coming_do_not_keep_a_long_one_waiting() -> None:
    scheduler = planner(Pieces(64), 64, 128)
    for _ in range(60):  # until there are as many streams as there will be
        scheduler.add(request(30, 45))
        step(scheduler)
    scheduler.add(long := request(1000, 1))
    for _ in range(1 + 1000 // 64):
        scheduler.add(request(30, 45))
        step(scheduler)
    assert long.num_output_tokens


@pytest.mark.parametrize("kind", ["long", "preempted"])
def test_a_step_beside_streams_runs_few_tokens_one_by_one(kind: str) -> None:
    """Of a prompt behind its first piece where states take single tokens alone, or of an answer once more."""
    pieces = Pieces(64, continues=kind == "preempted")
    scheduler = planner(pieces, 64, 512)
    scheduler.add(request(4, 2000))
    step(scheduler)
    scheduler.add(seq := request(70 if kind == "preempted" else 1000, 1000))
    if kind == "preempted":
        seq.tokens += [1] * 900
    most = 0
    while seq.num_uncomputed > 1:
        for item in step(scheduler).scheduled:
            most = max(most, len(pieces.cut(item.seq, item.start, item.start + item.num_tokens)))
    assert 8 < most <= 32


def test_a_step_is_halved_between_pieces_as_far_as_there_are_several() -> None:
    scheduler = planner(Pieces(8), 4, 64)
    seq = sequence(20, num_output=3)
    assert [scheduler.half_of(Scheduled(seq, 0, count)) for count in (20, 16, 8, 1)] == [8, 8, 4, 0]
    assert scheduler.half_of(Scheduled(seq, 20, 3)) == 1
