"""Random allowed requests, and faults at random steps: who is not to blame never notices, and nothing is lost."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manylora.engine.interface import FinishReason
from manylora.engine.sequence import Sequence
from manylora.errors import SequenceFailed
from manylora.models.checkpoint import load_tokenizer
from manylora.models.codec import HuggingFaceCodec
from tests.engine.drafts import Oracle
from tests.engine.faults import PHASES, Faults
from tests.engine.harness import Rig, available_kernels, build_rig, load
from tests.tiny_adapters import make_adapter
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE

EXACT = [kernel for kernel in available_kernels if kernel != "torch"]
ADAPTERS = (None, "tuned", "other")
RARE = "\x00\x07\u200b\ufffd\U0001f9ff<|im_end|>𐍈é我\r\n\t"
_numbers = count()

token_ids = st.integers(0, VOCAB_SIZE - 1)
texts = st.text(st.characters(codec="utf-8") | st.sampled_from(RARE), min_size=1, max_size=30)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=3)
samplings = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 14), "ignore_eos": st.booleans(), "seed": st.integers(0, 2**63 - 1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([0.5, 0.99]),
        "top_k": st.integers(0, 40),
        "min_p": st.sampled_from([0.0, 0.1]),
        "typical_p": st.sampled_from([0.3, 1.0]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.sampled_from([1e-9, 0.5, 1.3, 100.0]),
        "logit_bias": st.lists(st.tuples(token_ids, st.floats(-100, 100)), max_size=3, unique_by=lambda b: b[0]).map(
            tuple
        ),
        "logprobs": st.integers(0, 5),
        "prompt_logprobs": st.integers(0, 5),
        "stop": st.lists(st.sampled_from(["e", "th", "\n", "我", " "]), max_size=2).map(tuple),
        "stop_token_ids": st.lists(token_ids, max_size=3).map(tuple),
        "n": st.integers(1, 3),
    },
)


@dataclass(frozen=True)
class Wanted:
    """A request; `leaves_after` is the step after which its client goes, -1 for one that stays."""

    prompt: Any
    adapter: str | None
    params: dict[str, Any]
    arrives_at: int
    leaves_after: int


requests = st.builds(
    Wanted,
    prompt=st.lists(token_ids, min_size=1, max_size=60) | texts | turns,
    adapter=st.sampled_from(ADAPTERS),
    params=samplings,
    arrives_at=st.integers(0, 6),
    leaves_after=st.sampled_from([-1, -1, -1, 0, 3, 8]),
)


@dataclass(repr=False)
class Engine:
    """The engine of all examples: each finds it as the one before has left it."""

    rig: Rig
    codec: HuggingFaceCodec
    faults: Faults
    oracle: Oracle
    seen: set[tuple[str, str]] = field(default_factory=set)  # phases in which a fault has come to something, and what

    def __repr__(self) -> str:
        return "Engine()"  # for hypothesis, which shows what it tried: all of it would be 60 kB

    def ids_of(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        if isinstance(prompt[0], tuple):
            return self.codec.chat([{"role": role, "content": text} for role, text in prompt])
        return list(prompt)

    def add(self, name: str, wanted: Wanted) -> list[Sequence]:
        first = self.rig.add(name, self.ids_of(wanted.prompt), wanted.adapter, **wanted.params)
        return [first, *first.followers]

    def answer(self, name: str, index: int) -> Any:
        outputs = self.rig.outputs.get(f"{name}/{index}", [])
        tokens = [t for o in outputs for t in o.delta.token_ids]
        return {
            "tokens": tokens,
            "text": "".join(o.delta.text for o in outputs),
            "logprobs": [p for o in outputs for p in o.delta.logprobs],
            "prompt": [p for o in outputs for p in o.delta.prompt_logprobs],
            "end": outputs[-1].delta.finish_reason if outputs else None,
        }

    def alone(self, wanted: Wanted) -> list[Any]:
        name = f"alone{next(_numbers)}"
        seqs = self.add(name, wanted)
        self.rig.run()
        return [self.answer(name, seq.index) for seq in seqs]


@pytest.fixture(scope="module", params=EXACT)
def engine(
    request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("adapters")
    adapters = {name: make_adapter(tiny_llama_dir, root / name, seed=i) for i, name in enumerate(("tuned", "other"))}
    codec = HuggingFaceCodec(load_tokenizer(tiny_llama_dir), {END_OF_TURN})
    # Few blocks, and less than the longest prompt in a step: sequences are preempted, and prompts run in pieces.
    oracle = Oracle()
    rig = build_rig(
        load(tiny_llama_dir),
        adapters,
        kernel=request.param,
        drafter=oracle,
        num_blocks=90,
        max_num_seqs=6,
        decode=codec.decode,
        eos_ids=codec.eos_ids,
    )
    engine = Engine(rig, codec, Faults(rig).install(), oracle)
    yield engine
    rig.close()
    assert {(phase, "isolated") for phase in PHASES} <= engine.seen
    assert {(phase, "retried") for phase in PHASES[:3]} <= engine.seen


def with_every_phase(test: Callable[..., None]) -> Callable[..., None]:
    """Tried whatever chance brings: a lasting fault in each phase, and one that passes."""
    plain = [Wanted([n, 2, 3, 4], None, {"max_tokens": 6, "ignore_eos": True, "seed": n}, 0, -1) for n in range(4)]
    for phase in PHASES:
        test = example(plain, [], (phase, 1, 0), (0, 0.0))(test)
        test = example(plain, [], (phase, 1, 2), (3, 0.2))(test)
    for phase in PHASES[:3]:
        test = example(plain, [(phase, 2)], ("deliver", 1, 4), (2, 0.2))(test)
    return test


@with_every_phase
@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(requests, min_size=4, max_size=7),
    passing=st.lists(st.tuples(st.sampled_from(PHASES[:3]), st.integers(1, 12)), max_size=1),
    lasting=st.tuples(st.sampled_from(PHASES), st.integers(0, 6), st.integers(0, 4)),
    drafts=st.tuples(st.integers(0, 6), st.sampled_from([0.0, 0.2, 0.8])),
)
def test_no_fault_reaches_whom_it_is_not_about(
    engine: Engine,
    wanted: list[Wanted],
    passing: list[tuple[str, int]],
    lasting: tuple[str, int, int],
    drafts: tuple[int, float],
) -> None:
    """`passing`: a phase fails at one call. `lasting`: it fails whenever one request is in it that has got so far.

    Two that pass could meet one sequence in both of its tries alone, which then counts as the cause.
    `drafts`: at most so many tokens in each, and how many of them are wrong.
    """
    rig, faults = engine.rig, engine.faults
    expected = [engine.alone(each) for each in wanted]
    names = [f"r{next(_numbers)}" for _ in wanted]
    engine.oracle.most, engine.oracle.wrong = drafts
    engine.oracle.answers = {
        f"{name}/{index}": answer["tokens"]
        for name, answers in zip(names, expected, strict=True)
        for index, answer in enumerate(answers)
    }
    guilty = lasting[1] % len(wanted)
    faults.of(lasting[0], names[guilty], lasting[2])
    for phase, call in passing:
        faults.after(phase, call)

    seqs: dict[int, list[Sequence]] = {}
    step = 0
    while rig.engine.has_work or len(seqs) < len(wanted):
        for i, each in enumerate(wanted):
            if each.arrives_at == step:
                seqs[i] = engine.add(names[i], each)
            if each.leaves_after >= 0 and step == each.arrives_at + each.leaves_after:
                rig.engine.abort(seqs[i])
        rig.step()
        step += 1
        assert step < 2000
    engine.seen.update(faults.counted)
    faults.clear()

    assert rig.scheduler.blocks.num_used == 0
    assert not any(resident["users"] for resident in rig.tiers.residents())
    for i, each in enumerate(wanted):
        for seq in seqs[i]:
            found, whole = engine.answer(names[i], seq.index), expected[i][seq.index]
            assert seq.is_finished
            assert seq.detokenizer is None
            if i == guilty or each.leaves_after >= 0:
                assert whole["tokens"][: len(found["tokens"])] == found["tokens"]
                assert whole["text"].startswith(found["text"]) or found["end"] is not FinishReason.ERROR
            else:
                assert found == whole
        errors = [o.error for seq in seqs[i] for o in rig.outputs.get(f"{names[i]}/{seq.index}", []) if o.error]
        assert all(i == guilty and isinstance(error, SequenceFailed) for error in errors)
    rig.outputs.clear()
