"""The host part and the device part of a step share nothing but plain values."""

import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manylora.engine.executor import Executor
from manylora.engine.interface import FinishReason, SamplingParams, Task
from manylora.engine.model_runner import ModelRunner
from manylora.engine.sequence import Scheduled, Sequence
from manylora.engine.step_input import Sampled, SamplingInput, StepInput
from tests.engine.harness import available_kernels, build_rig, load
from tests.engine.test_drafting import EXACT, REQUESTS, answers, ask_all, rig_of
from tests.tiny_adapters import make_adapter

PLAIN = (int, float, bool, str, type(None), np.ndarray, np.generic)


def check_plain(value: Any) -> None:
    """Nothing in it is a tensor, a sequence of the engine, or anything else that lives in one process."""
    if is_dataclass(value):
        for each in fields(value):
            check_plain(getattr(value, each.name))
    elif isinstance(value, list | tuple):
        for each in value:
            check_plain(each)
    else:
        assert isinstance(value, PLAIN), type(value)


class Remote:
    """An executor that everything is sent to and from, as bytes. The logits stay where they are made."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.kept: dict[int, Any] = {}
        self.num_steps = 0

    @property
    def block_size(self) -> int:
        return self.inner.block_size

    @property
    def spare_block(self) -> int:
        return self.inner.spare_block

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def forward(self, step: StepInput) -> int:
        self.num_steps += 1
        self.kept = {self.num_steps: self.inner.forward(self.sent(step))}
        return self.num_steps

    def hidden(self) -> np.ndarray:
        hidden: np.ndarray = self.sent(self.inner.hidden())
        return hidden

    def sample(self, logits: int, wanted: SamplingInput) -> Sampled:
        sampled: Sampled = self.sent(self.inner.sample(self.kept.pop(logits), self.sent(wanted)))
        return sampled

    def sent(self, value: Any) -> Any:
        check_plain(value)
        return pickle.loads(pickle.dumps(value))


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_llama_dir, root / name, seed=i) for i, name in enumerate(("tuned", "other"))}


@pytest.mark.parametrize("kernel", EXACT)
def test_a_step_that_is_sent_to_another_place_answers_the_same(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """Greedy, by chance, with penalties, biases and log-probabilities, prompts scored whole and in pieces."""
    here = rig_of(tiny_llama_dir, adapters, kernel, None)
    there = rig_of(tiny_llama_dir, adapters, kernel, None, executor=Remote)
    for rig in (here, there):
        ask_all(rig)
        captured = Sequence("captured", [5, 9, 2], SamplingParams(max_tokens=0), capture_logits=True)
        rig.engine.add(captured)
        rig.run()
        rig.close()
    assert len(there.outputs) >= len(REQUESTS)
    assert answers(there) == answers(here)
    (a,), (b,) = (rig.outputs["captured/0"] for rig in (here, there))
    assert a.captured is not None
    assert b.captured is not None
    assert a.captured.shape == (3, here.wrapped.vocab_size)
    assert np.array_equal(a.captured, b.captured)


@pytest.mark.parametrize("kernel", available_kernels)
def test_no_slot_that_a_step_reads_is_written_to_or_taken_away(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    rig = rig_of(tiny_llama_dir, adapters, kernel, None)
    for name in adapters:
        rig.add(f"first-{name}", [3], name, max_tokens=1)
        rig.run()
    memory = rig.tiers.memory
    slots = {row["name"]: row["slot"] for row in rig.tiers.residents()}
    named: list[tuple[int, ...]] = []

    def touch(*_: Any) -> None:
        named.append(memory.named)
        with pytest.raises(AssertionError):
            memory.withdraw(slots["tuned"])
        with pytest.raises(AssertionError):
            memory.publish(memory.places[slots["tuned"]], None)  # type: ignore[arg-type]

    hook = rig.wrapped.model.register_forward_pre_hook(touch)
    rig.add("r", [5, 6, 7], "tuned", max_tokens=2)
    rig.run()
    hook.remove()
    assert named == [(slots["tuned"],)] * 2
    assert memory.named == ()
    memory.withdraw(slots["other"])
    rig.close()


def test_a_request_for_no_tokens_is_scored_and_nothing_is_sampled_for_it(tiny_llama_dir: Path) -> None:
    rig = build_rig(load(tiny_llama_dir), kernel=available_kernels[-1])
    asked: list[SamplingInput] = []
    assert isinstance(rig.engine.runner, ModelRunner)
    sample = rig.engine.runner._executor.sample
    rig.engine.runner._executor.sample = lambda logits, wanted: (  # type: ignore[method-assign]
        asked.append(wanted) or sample(logits, wanted)  # type: ignore[func-returns-value]
    )
    scored = rig.add("scored", range(30, 45), max_tokens=0, prompt_logprobs=1)
    warming = rig.add("warming", range(60, 75), max_tokens=0)
    rig.run()
    assert (scored.task, warming.task) == (Task.SCORE, Task.SCORE)
    assert rig.add("asked", [5]).task is Task.GENERATE
    assert sum(len(wanted.rows) for wanted in asked) == 0
    for name, num_entries in (("scored", 15), ("warming", 0)):
        (only,) = rig.outputs[f"{name}/0"]
        assert only.delta.finish_reason is FinishReason.LENGTH
        assert len(only.delta.prompt_logprobs) == num_entries
    rig.run()


def test_what_runs_of_a_scored_prompt_is_not_sampled() -> None:
    seq = Sequence("r", [1, 2, 3], SamplingParams(max_tokens=0))
    part, whole = Scheduled(seq, 0, 2), Scheduled(seq, 0, 3)
    assert (part.reaches_end, part.is_scored, part.samples) == (False, False, False)
    assert (whole.reaches_end, whole.is_scored, whole.samples) == (True, True, False)
