"""The bridge to asyncio over a real engine: queues, ends of every kind, and an engine that dies."""

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.engine.async_engine import AsyncEngine, RunningGeneration
from manylora.engine.counts import SnapshotCounts
from manylora.engine.effect import PROBE_TEXT, effect_of
from manylora.engine.interface import Delta, Effect, FinishReason, Mix, ModelInfo, SamplingParams
from manylora.engine.sequence import Sequence
from manylora.errors import (
    ContextLengthExceeded,
    Draining,
    EngineDead,
    InvalidRequest,
    ManyloraError,
    QueueFull,
    SequenceFailed,
)
from manylora.lora.format.reader import Adapter, read_trusted
from manylora.lora.memory.packing import PackedAdapter
from manylora.models.checkpoint import load_tokenizer
from manylora.models.codec import HuggingFaceCodec
from tests.engine.harness import Rig, build_rig, grammars_of, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.models.zoo import make_zoo_model
from tests.tiny_adapters import make_adapter, make_adapter_that_spoils
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE

pytestmark = pytest.mark.anyio
PROMPT = [5, 9, 200, 31, 77]
LONG = 150


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llama_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def rig(tiny_llama_dir: Path, adapter: Path) -> Rig:
    ends = frozenset({END_OF_TURN})
    return build_rig(load(tiny_llama_dir), {"tuned": adapter}, num_blocks=120, max_num_seqs=2, eos_ids=ends)


@asynccontextmanager
async def started(rig: Rig, folder: Path, *, max_open: int = 64, **how: Any) -> AsyncIterator[AsyncEngine]:
    codec = HuggingFaceCodec(load_tokenizer(folder), ())
    model = ModelInfo("tiny", context_length=400, vocab_size=VOCAB_SIZE, created=0)
    engine = AsyncEngine(rig.engine, rig.tiers, model, codec, grammars_of(folder), max_open=max_open, **how)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def engine(rig: Rig, tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with started(rig, tiny_llama_dir) as engine:
        yield engine


def ask(
    engine: AsyncEngine, name: str = "r", max_tokens: int = 8, rig: Rig | None = None, **how: Any
) -> RunningGeneration:
    """A greedy request; with `rig`, for its adapter."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **how)
    return engine.generate(name, PROMPT, params, adapter=rig.refs["tuned"] if rig else None)


async def collect(generation: RunningGeneration) -> list[Delta]:
    return [delta async for delta in generation]


async def nothing_runs(engine: AsyncEngine) -> None:
    while (stats := engine.stats()).running or stats.waiting:
        await asyncio.sleep(0.001)
    engine._admission.check_integrity(Counter())


async def test_a_request_is_answered_to_its_end(engine: AsyncEngine, tiny_llama_dir: Path) -> None:
    deltas = await collect(ask(engine))
    check_greedy(with_adapter(tiny_llama_dir, None), PROMPT, [t for d in deltas for t in d.token_ids])
    assert [d.finish_reason for d in deltas] == [None] * 7 + [FinishReason.LENGTH]


async def test_a_request_for_no_tokens_runs_its_prompt_only(engine: AsyncEngine) -> None:
    deltas = await collect(ask(engine, max_tokens=0, logprobs=1, prompt_logprobs=1, n=2))
    assert [(d.token_ids, d.text, d.finish_reason) for d in deltas] == [((), "", FinishReason.LENGTH)] * 2
    assert [entry.token_id for entry in deltas[0].prompt_logprobs] == PROMPT
    assert engine.stats().kv_blocks_used == 0


async def test_the_last_delta_says_what_of_the_request_ended_it(engine: AsyncEngine) -> None:
    deltas = await collect(ask(engine))
    ids, text = [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas)
    assert [d.stop_reason for d in deltas] == [None] * 8
    by_token = await collect(ask(engine, stop_token_ids=(ids[3],)))
    by_text = await collect(ask(engine, stop=("never said", text[1])))
    ending: dict[str, Any] = {"temperature": 0.0, "logit_bias": ((END_OF_TURN, 100.0),)}
    also: list[tuple[str, dict[str, Any]]] = [("a", {}), ("b", {"stop_token_ids": (END_OF_TURN,)})]
    by_model = [
        await collect(engine.generate(name, PROMPT, SamplingParams(max_tokens=8, **ending, **more)))
        for name, more in also
    ]
    for found, reason in ((by_token, ids[3]), (by_text, text[1]), (by_model[0], None), (by_model[1], None)):
        assert (found[-1].finish_reason, found[-1].stop_reason) == (FinishReason.STOP, reason)
        assert all(d.stop_reason is None for d in found[:-1])


async def test_a_dying_engine_fails_every_request_and_is_not_ready(
    rig: Rig, engine: AsyncEngine, adapter: Path
) -> None:
    rig.engine.runner.forward = dies_after(rig, steps=5)  # type: ignore[method-assign]
    assert engine.is_ready
    asked = [ask(engine, f"r{i}", LONG, rig if i % 2 else None) for i in range(5)]  # two run, three wait

    ends = await asyncio.gather(*map(collect, asked), return_exceptions=True)

    assert all(isinstance(end, EngineDead) and "the device fell off" in end.message for end in ends)
    assert not engine.is_ready
    with pytest.raises(EngineDead, match="the device fell off"):
        ask(engine)
    with pytest.raises(EngineDead):
        await engine.measure_effect(rig.refs["tuned"], read_trusted(adapter, rig.wrapped.modules))


async def test_a_dying_engine_says_so_once_everybody_was_told(rig: Rig, engine: AsyncEngine) -> None:
    rig.engine.runner.forward = dies_after(rig, steps=5)  # type: ignore[method-assign]
    told = asyncio.Event()
    engine.on_death(told.set)
    assert engine.failure is None
    running = asyncio.ensure_future(collect(ask(engine, max_tokens=LONG)))
    await asyncio.wait_for(told.wait(), 60)
    assert isinstance(engine.failure, EngineDead)
    with pytest.raises(EngineDead):
        await running


async def test_a_request_that_a_step_fails_for_is_told_and_the_others_go_on(rig: Rig, engine: AsyncEngine) -> None:
    expected = await collect(ask(engine, "alone", max_tokens=40))
    forward = rig.engine.runner.forward

    def failing(scheduled: Any) -> Any:
        if any(item.seq.request_id == "bad" and item.seq.num_output_tokens > 3 for item in scheduled):
            raise RuntimeError("a token that nobody has seen")
        return forward(scheduled)

    rig.engine.runner.forward = failing  # type: ignore[method-assign]
    good, bad = ask(engine, "good", max_tokens=40), ask(engine, "bad", max_tokens=40, n=2)
    ends = await asyncio.gather(collect(good), collect(bad), return_exceptions=True)
    assert isinstance(ends[1], SequenceFailed)
    assert "nobody has seen" not in ends[1].message, "what a fault says is for the log"
    assert [d.token_ids for d in ends[0]] == [d.token_ids for d in expected]  # type: ignore[union-attr]
    await nothing_runs(engine)
    assert engine.is_ready
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("what", ["add", "abort"])
@pytest.mark.parametrize("is_done", [True, False], ids=["afterwards", "before"])
async def test_a_request_that_cannot_be_taken_in_or_out_ends_alone(
    what: str, is_done: bool, rig: Rig, engine: AsyncEngine
) -> None:
    real = getattr(rig.engine, what)

    def failing(of: Any) -> None:
        if is_done:
            real(of)
        raise KeyError("lost")

    beside = asyncio.ensure_future(collect(ask(engine, "beside", max_tokens=LONG)))
    await asyncio.sleep(0.01)
    setattr(rig.engine, what, failing)
    if what == "add":
        with pytest.raises(SequenceFailed):
            await collect(ask(engine, "lost", n=2))
    else:
        leaving = ask(engine, "leaving", max_tokens=LONG)
        async for _ in leaving:
            break
        await leaving.aclose()
    setattr(rig.engine, what, real)
    assert len(await beside) == LONG
    await nothing_runs(engine)
    rig.scheduler.check_integrity()
    assert engine.is_ready
    assert engine.stats().kv_blocks_used == 0
    assert len(await collect(ask(engine, "later"))) == 8


@pytest.mark.parametrize("error", [OSError("no such CPU"), ValueError("none")])
async def test_threads_that_cannot_be_placed_are_left_alone(rig: Rig, tiny_llama_dir: Path, error: Exception) -> None:
    calls = []

    def place() -> None:
        calls.append(1)
        raise error

    async with started(rig, tiny_llama_dir, before_step=place) as engine:
        assert len(await collect(ask(engine))) == 8
    assert len(calls) == 1


@pytest.mark.parametrize("ids", [[1, VOCAB_SIZE], [VOCAB_SIZE + 5000], [3, -1], []])
async def test_no_token_that_the_model_has_no_row_for_enters_a_step(engine: AsyncEngine, ids: list[int]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.generate("r", ids, SamplingParams(max_tokens=1))
    assert refused.value.param == "prompt"
    assert len(await collect(ask(engine))) == 8


def dies_after(rig: Rig, steps: int) -> Any:
    forward = rig.engine.runner.forward

    def dying(scheduled: Any) -> Any:
        if rig.engine.num_steps >= steps:
            raise RuntimeError("the device fell off")
        return forward(scheduled)

    return dying


async def test_a_full_queue_refuses_and_says_when_to_come_back(rig: Rig, tiny_llama_dir: Path) -> None:
    async with started(rig, tiny_llama_dir, max_open=3, tenant_share=1.0) as engine:
        asked = [ask(engine, "one"), ask(engine, "two", n=2)]
        with pytest.raises(QueueFull) as refused:
            ask(engine, "three")
        assert refused.value.retry_after_s > 0
        assert [len(await collect(generation)) for generation in asked] == [8, 16]
        assert len(await collect(ask(engine, "four"))) == 8


async def test_one_tenant_cannot_fill_the_queue_for_another(rig: Rig, tiny_llama_dir: Path) -> None:
    """Whatever became of its requests: answered, left, or failed for want of their adapter."""
    rig.tiers._read = lambda ref: read_trusted(Path("/nowhere"), rig.wrapped.modules)

    async with started(rig, tiny_llama_dir, max_open=20) as engine:

        def of(tenant: str, name: str, rig: Rig | None = None, max_tokens: int = 3) -> RunningGeneration:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            return engine.generate(name, PROMPT, params, adapter=rig.refs["tuned"] if rig else None, tenant=tenant)

        for turn in range(3):
            flood = [of("flood", f"{turn}-{number}", rig if number % 3 == 0 else None, LONG) for number in range(10)]
            with pytest.raises(QueueFull, match="your tenant's share"):
                of("flood", "too many")
            answers = await asyncio.gather(*(collect(of("quiet", f"q{turn}-{number}")) for number in range(5)))
            assert [len(answer) for answer in answers] == [3] * 5
            ends = await asyncio.gather(*(collect(each) for each in flood[::2]), return_exceptions=True)
            assert any(isinstance(end, ManyloraError) for end in ends)
            assert any(isinstance(end, list) for end in ends)
            for each in flood[1::2]:
                await each.aclose()
            await nothing_runs(engine)


async def test_counts_of_one_tenant_say_nothing_of_another(rig: Rig, engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=LONG, temperature=0.0, ignore_eos=True, n=3)
    theirs = engine.generate("r", PROMPT * 20, params, adapter=rig.refs["tuned"], tenant="acme")
    async for _ in theirs:
        break
    everybody, acme, rival = engine.stats(), engine.stats("acme"), engine.stats("rival")
    assert everybody.running > 0
    for name in ("running", "kv_blocks_used", "slots_used", "preemptions"):
        assert getattr(acme, name) > 0 or name == "preemptions", name
        assert getattr(rival, name) == 0, name
    assert rival.waiting == rival.waiting_for_adapter == rival.device_tier_bytes == rival.host_tier_bytes == 0
    assert [(row["name"], row["users"]) for row in rival.resident] == [("tuned", 0)], "it is public"
    assert [(row["name"], row["users"] > 0) for row in acme.resident] == [("tuned", True)]
    assert (rival.kv_blocks_total, rival.slots_total) == (everybody.kv_blocks_total, everybody.slots_total)
    await theirs.aclose()


async def test_stats_have_the_copies_of_states_that_prefixes_are_found_with(tmp_path: Path) -> None:
    folder = make_zoo_model("qwen3_5_text", tmp_path / "base")
    rig = build_rig(load(folder))
    rig.scheduler.blocks.snapshots.size_bytes = 100
    async with started(rig, folder) as engine:
        for request_id in ("first", "same"):
            async for _ in engine.generate(request_id, [9] * 30, SamplingParams(max_tokens=2)):
                pass
        everybody, mine = engine.stats(), engine.stats("public")
    assert everybody.snapshots == SnapshotCounts(used=1, total=16, bytes=100, hits=1)
    assert mine.snapshots == SnapshotCounts()


async def test_a_prompt_that_leaves_no_room_is_refused(engine: AsyncEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match="400"):
        engine.generate("r", [1] * 400, SamplingParams(max_tokens=1))


async def test_leaving_early_frees_blocks_and_slot(rig: Rig, engine: AsyncEngine) -> None:
    generation = ask(engine, max_tokens=LONG, rig=rig, n=3)
    async for _ in generation:
        break
    assert engine.stats().kv_blocks_used
    await generation.aclose()
    await nothing_runs(engine)
    assert (engine.stats().kv_blocks_used, engine.stats().slots_used) == (0, 0)


async def test_draining_finishes_what_runs_and_refuses_what_comes(engine: AsyncEngine) -> None:
    running = asyncio.ensure_future(collect(ask(engine, max_tokens=LONG)))
    drained = asyncio.ensure_future(engine.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        ask(engine)
    await drained
    assert (await running)[-1].finish_reason is FinishReason.LENGTH


async def test_what_outlasts_the_drain_is_told_so(engine: AsyncEngine) -> None:
    running = asyncio.ensure_future(collect(ask(engine, max_tokens=LONG)))
    await asyncio.sleep(0)
    await engine.drain(0)
    with pytest.raises(Draining):
        await running
    await nothing_runs(engine)
    assert engine.stats().kv_blocks_used == 0


async def test_closing_ends_what_still_runs(engine: AsyncEngine) -> None:
    running = asyncio.ensure_future(collect(ask(engine, max_tokens=LONG)))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(Draining):
        await running
    with pytest.raises(Draining):
        ask(engine)


async def test_an_adapter_is_forgotten_after_its_last_request(rig: Rig, engine: AsyncEngine) -> None:
    ref = rig.refs["tuned"]
    running = asyncio.ensure_future(collect(ask(engine, max_tokens=LONG, rig=rig)))
    await asyncio.sleep(0)
    forgotten = asyncio.ensure_future(engine.forget(ref))
    done, _ = await asyncio.wait({running, forgotten}, return_when=asyncio.FIRST_COMPLETED)
    assert done == {running}
    await forgotten
    assert engine.tier_of(ref) == "disk"


async def test_an_effect_is_measured_beside_running_requests(
    rig: Rig, engine: AsyncEngine, tiny_llama_dir: Path, adapter: Path
) -> None:
    beside = asyncio.ensure_future(collect(ask(engine, max_tokens=40)))
    effect = await engine.measure_effect(rig.refs["tuned"], read_trusted(adapter, rig.wrapped.modules))
    await beside

    ids = engine.codec.encode(PROBE_TEXT)
    with torch.inference_mode():
        base, tuned = (
            m(torch.tensor([ids])).logits[0]
            for m in (with_adapter(tiny_llama_dir, None), with_adapter(tiny_llama_dir, adapter))
        )
    assert effect.prompt_tokens == len(ids)
    assert effect.max_abs_logit_delta == pytest.approx(float((base - tuned).abs().max()), rel=1e-3)
    assert effect.kl > 0


async def test_an_effect_is_measured_at_its_payers_expense_and_worked_out_beside_the_event_loop(
    rig: Rig, engine: AsyncEngine, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: Counter[tuple[str, float]] = Counter()
    charge, threads = rig.scheduler.waiting.charge, []

    def charging(seq: Sequence, num_prompt_tokens: int, num_output_tokens: int) -> None:
        charged[seq.tenant, seq.weight] += num_prompt_tokens + num_output_tokens
        charge(seq, num_prompt_tokens, num_output_tokens)

    def working_out(*logits: Any) -> Effect:
        threads.append(threading.current_thread())
        return effect_of(*logits)

    monkeypatch.setattr(rig.scheduler.waiting, "charge", charging)
    monkeypatch.setattr("manylora.engine.async_engine.effect_of", working_out)
    read = read_trusted(adapter, rig.wrapped.modules)
    effect = await engine.measure_effect(rig.refs["tuned"], read, tenant="acme", weight=3.0)
    assert charged == {("acme", 3.0): effect.num_tokens_run}
    assert effect.num_tokens_run == 2 * len(engine.codec.encode(PROBE_TEXT))
    assert len(threads) == 1
    assert threads[0] not in (threading.current_thread(), engine._thread)


async def test_what_is_the_event_loops_is_not_to_be_done_elsewhere(rig: Rig, engine: AsyncEngine) -> None:
    running = ask(engine, max_tokens=LONG)
    with pytest.raises(AssertionError):
        await asyncio.to_thread(ask, engine)
    with pytest.raises(AssertionError):
        await asyncio.to_thread(engine.leave, running)
    await running.aclose()
    assert len(await collect(ask(engine))) == 8


async def test_the_engine_steps_on_its_own_thread_alone(rig: Rig, engine: AsyncEngine) -> None:
    await collect(ask(engine))
    for step in (rig.engine.step, lambda: rig.engine.abort([]), lambda: rig.add("r", PROMPT)):
        with pytest.raises(AssertionError):
            step()
    assert len(await collect(ask(engine))) == 8


async def test_an_effect_of_no_numbers_is_measured_as_such_so_that_the_upload_can_say_so(
    rig: Rig, engine: AsyncEngine, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    first = engine.codec.encode(PROBE_TEXT)[0]
    bad = make_adapter_that_spoils(tiny_llama_dir, tmp_path / "bad", first)
    effect = await engine.measure_effect(rig.refs["tuned"], read_trusted(bad, rig.wrapped.modules))
    assert not math.isfinite(effect.max_abs_logit_delta)
    assert engine.is_ready


async def test_where_an_adapter_begins_to_act_is_looked_up_once_for_all_choices(
    rig: Rig, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = []
    acts_from = Mix.acts_from

    def noted(mix: Mix, prompt_ids: SequenceOf[int]) -> int:
        looked_up.append(len(prompt_ids))
        return acts_from(mix, prompt_ids)

    monkeypatch.setattr(Mix, "acts_from", noted)
    await collect(ask(engine, rig=rig, max_tokens=1, n=4))
    assert looked_up == [len(PROMPT)]


async def test_timing_tells_waiting_from_loading(
    rig: Rig, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = rig.tiers._pack

    def pack_once_it_is_waited_for(read: Adapter) -> PackedAdapter:
        deadline = time.monotonic() + 30
        while not engine.stats().waiting_for_adapter and time.monotonic() < deadline:
            time.sleep(0.001)
        return pack(read)

    monkeypatch.setattr(rig.tiers, "_pack", pack_once_it_is_waited_for)
    first, second = ask(engine, "first", rig=rig), None
    await collect(first)
    second = ask(engine, "second", rig=rig)
    await collect(second)
    assert (first.timing.load_tier, second.timing.load_tier) == ("disk", "device")
    assert first.timing.load_ms > second.timing.load_ms == 0
    assert first.timing.ttft_ms >= first.timing.load_ms + first.timing.queue_ms


async def test_an_error_of_one_request_is_its_own(rig: Rig, engine: AsyncEngine) -> None:
    rig.tiers._read = lambda ref: read_trusted(Path("/nowhere"), rig.wrapped.modules)
    lost, beside = ask(engine, "lost", rig=rig, n=2), ask(engine, "beside")
    with pytest.raises(ManyloraError):
        await collect(lost)
    assert len(await collect(beside)) == 8
    await nothing_runs(engine)
    assert engine.is_ready
