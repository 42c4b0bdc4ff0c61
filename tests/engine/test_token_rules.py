"""What a request rules out does not come, in its own sequence and in no other, whatever else it asks for."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor

from manylora.engine.interface import FinishReason, Grammar, SamplingParams
from manylora.engine.token_rules import Bits, TokenRules
from manylora.errors import NothingAllowed
from manylora.grammars.compiler import GrammarCompiler
from manylora.models.checkpoint import load_tokenizer
from manylora.models.codec import HuggingFaceCodec
from tests.engine.faults import Faults
from tests.engine.harness import Rig, available_kernels, build_rig, grammars_of, load
from tests.engine.oracle import with_adapter
from tests.engine.test_constraints import made
from tests.tiny_adapters import make_adapter
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE

PROMPT = list(range(40, 52))
FEW = (70, 71, 72, 73, 300)


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"tuned": make_adapter(tiny_llama_dir, tmp_path_factory.mktemp("adapter"))}


@pytest.fixture(scope="module")
def compiler(tiny_llama_dir: Path) -> Iterator[GrammarCompiler]:
    compiler = grammars_of(tiny_llama_dir)
    yield compiler
    compiler.close()


@pytest.fixture
def rig(tiny_llama_dir: Path, adapter: dict[str, Path]) -> Iterator[Rig]:
    rig = build(tiny_llama_dir, adapter)
    yield rig
    assert rig.scheduler.blocks.num_used == 0
    rig.close()


def build(folder: Path, adapters: dict[str, Path], kernel: str = available_kernels[-1], **how: Any) -> Rig:
    codec = HuggingFaceCodec(load_tokenizer(folder), [END_OF_TURN])
    options: dict[str, Any] = {"num_blocks": 2000, "max_num_batched_tokens": 256, **how}
    return build_rig(
        load(folder), adapters, kernel=kernel, decode=codec.decode, eos_ids=frozenset([END_OF_TURN]), **options
    )


def end_of(rig: Rig, name: str) -> Any:
    return rig.outputs[f"{name}/0"][-1]


def ids_of(bits: Bits) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


# the rules alone


def test_rules_are_as_a_plain_reading_of_them_says() -> None:
    """Tokens of 7 and sequences of them at random, against a search through all that was said."""
    draw = random.Random(5)
    for _ in range(400):
        words = tuple(tuple(draw.choices(range(7), k=draw.randint(1, 4))) for _ in range(draw.randint(0, 4)))
        some = tuple(draw.sample(range(7), draw.randint(1, 7))) if draw.random() < 0.5 else ()
        params = SamplingParams(
            max_tokens=9,
            allowed_token_ids=some,
            bad_words=words,
            min_tokens=draw.randint(0, 4),
            stop_token_ids=(5,),
            ignore_eos=draw.random() < 0.3,
        )
        prompt, output = draw.choices(range(7), k=3), draw.choices(range(7), k=draw.randint(0, 6))
        by_grammar = set(draw.sample(range(7), draw.randint(0, 7)))
        ended = {token for token in range(7) for word in words if tuple([*output, token][-len(word) :]) == word}
        left = (by_grammar & set(some or range(7))) - ended
        ends = {5} if params.ignore_eos else {5, 6}
        expected = (left - ends or left) if len(output) < params.min_tokens else left
        rules = TokenRules.of(params, [6], 7)
        if rules is None:
            assert (some, words, params.min_tokens) == ((), (), 0)
            continue
        bits = rules.allowed([*prompt, *output], len(output), np.array([sum(1 << i for i in by_grammar)], np.uint32))
        assert bits is not None
        assert ids_of(bits) == expected


def test_a_request_without_rules_has_none_and_one_whose_rules_are_over_has_no_mask() -> None:
    assert TokenRules.of(SamplingParams(max_tokens=5, stop_token_ids=(3,)), [6], 100) is None
    rules = TokenRules.of(SamplingParams(max_tokens=5, min_tokens=2), [6], 100)
    assert rules is not None
    early = rules.allowed([1, 1], 1)
    assert early is not None
    assert ids_of(early) == set(range(100)) - {6}
    assert rules.allowed([1, 1, 1], 2) is None


# answers


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_no_token_comes_but_those_that_are_allowed(rig: Rig, temperature: float) -> None:
    rig.add("a", PROMPT, "tuned", allowed_token_ids=FEW, temperature=temperature, seed=3, max_tokens=60)
    rig.run()
    assert set(rig.tokens("a")) <= set(FEW)
    assert len(rig.tokens("a")) == 60


@torch.inference_mode()
def test_words_are_ruled_out_as_transformers_does(rig: Rig, tiny_llama_dir: Path, adapter: dict[str, Path]) -> None:
    model = with_adapter(tiny_llama_dir, adapter["tuned"])
    rig.add("free", PROMPT, "tuned", max_tokens=12)
    rig.run()
    free = rig.tokens("free")
    words = (tuple(free[:1]), tuple(free[3:5]), tuple(free[6:9]), (free[10], END_OF_TURN))
    rig.add("held", PROMPT, "tuned", max_tokens=24, bad_words=words)
    rig.run()
    ruled = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=END_OF_TURN)
    tokens = list(PROMPT)
    for found in rig.tokens("held"):
        # The prompt's end is not the answer's beginning: a word counts in the answer alone.
        answer = torch.tensor([tokens[len(PROMPT) :]], dtype=torch.long)
        scores = ruled(answer, model(torch.tensor([tokens])).logits[:, -1])
        assert float(scores.max() - scores[0, found]) < 1e-3
        tokens.append(found)
    said = rig.tokens("held")
    assert not any(tuple(said[i : i + len(word)]) == word for word in words for i in range(len(said)))


@pytest.mark.parametrize("how", [{"stop_token_ids": FEW}, {"ignore_eos": False}])
def test_an_answer_does_not_end_before_its_least_length(rig: Rig, how: dict[str, Any]) -> None:
    ends = how.get("stop_token_ids", [END_OF_TURN])
    likely = tuple((token, 40.0) for token in ends)  # the model would end at once
    rig.add("soon", PROMPT, logit_bias=likely, max_tokens=30, **how)
    rig.add("late", PROMPT, logit_bias=likely, max_tokens=30, min_tokens=9, **how)
    rig.run()
    assert len(rig.tokens("soon")) == 1
    assert len(rig.tokens("late")) == 10
    assert end_of(rig, "late").delta.finish_reason is FinishReason.STOP
    assert not set(rig.tokens("late")[:9]) & set(ends)


def test_stop_strings_do_not_count_before_the_least_length(rig: Rig) -> None:
    rig.add("free", PROMPT, max_tokens=30, temperature=1.0, seed=5)
    rig.run()
    spelled = [rig.engine._decode([token]) for token in rig.tokens("free")]
    stops = tuple({piece for piece in spelled if piece and "\ufffd" not in piece})
    rig.add("late", PROMPT, max_tokens=30, temperature=1.0, seed=5, stop=stops, min_tokens=11)
    rig.run()
    assert len(rig.tokens("late")) == 12
    assert rig.text("free").startswith(rig.text("late"))


@pytest.mark.parametrize("stop", [{"stop_token_ids": (2,)}, {"ignore_eos": False}])
def test_the_end_token_is_shown_only_where_both_fields_say_so(rig: Rig, stop: dict[str, Any]) -> None:
    shown: dict[str, dict[str, Any]] = {
        "plain": {},
        "special": {"skip_special_tokens": False},
        "included": {"include_stop": True},
        "both": {"skip_special_tokens": False, "include_stop": True},
    }
    for name, how in shown.items():
        rig.add(name, PROMPT, logit_bias=((END_OF_TURN, 60.0),), min_tokens=3, max_tokens=9, **stop, **how)
    rig.run()
    texts = {name: rig.text(name) for name in ("plain", "special", "included", "both")}
    assert texts["plain"] == texts["special"] == texts["included"]
    assert texts["both"] == texts["plain"] + "<|im_end|>"
    assert len({tuple(rig.tokens(name)) for name in texts}) == 1


def test_special_tokens_within_an_answer_are_shown_where_they_are_asked_for(rig: Rig) -> None:
    for name, skips in {"hidden": True, "shown": False}.items():
        rig.add(
            name, PROMPT, allowed_token_ids=(1, 70), temperature=2.0, seed=1, max_tokens=12, skip_special_tokens=skips
        )
    rig.run()
    assert rig.tokens("hidden") == rig.tokens("shown")
    assert 1 in rig.tokens("shown")
    assert rig.text("shown").count("<|im_start|>") == rig.tokens("shown").count(1)
    assert rig.text("hidden") == rig.text("shown").replace("<|im_start|>", "")


# beside a grammar


def test_a_grammar_and_rules_hold_together(rig: Rig, compiler: GrammarCompiler, tiny_llama_dir: Path) -> None:
    grammar = made(compiler, Grammar.choice(["yes", "no", "nothing at all"]))
    tokenizer = load_tokenizer(tiny_llama_dir)
    spelled = [tuple(tokenizer.encode(word, add_special_tokens=False)) for word in ("yes", "nothing at all")]
    for seed in range(12):
        rig.add(
            f"r{seed}", PROMPT, grammar=grammar, bad_words=tuple(spelled), temperature=1.5, seed=seed,
            ignore_eos=False, max_tokens=40,
        )  # fmt: skip
    rig.run()
    ended = [end_of(rig, f"r{seed}") for seed in range(12)]
    texts = {rig.text(f"r{seed}") for seed in range(12) if ended[seed].error is None}
    assert texts
    # Other ways to spell a choice are other tokens; the very ones that were named never come.
    assert not any(tuple(rig.tokens(f"r{seed}")[: len(word)]) == word for seed in range(12) for word in spelled)
    assert texts <= {"yes", "no", "nothing at all"}


def test_an_answer_goes_on_for_as_long_as_its_grammar_lets_it(rig: Rig, compiler: GrammarCompiler) -> None:
    """The least length keeps an answer from ending where it may end or go on, and gives way where it must end."""
    rig.add("long", PROMPT, grammar=made(compiler, Grammar.regex("a{1,40}")), min_tokens=6, max_tokens=50,
            logit_bias=((END_OF_TURN, 90.0),), ignore_eos=False)  # fmt: skip
    rig.add("short", PROMPT, grammar=made(compiler, Grammar.choice(["no"])), min_tokens=20, max_tokens=50,
            ignore_eos=False)  # fmt: skip
    rig.run()
    assert len(rig.tokens("long")) == 7
    assert (rig.text("short"), end_of(rig, "short").delta.finish_reason) == ("no", FinishReason.STOP)


@pytest.mark.parametrize("has_grammar", [True, False])
def test_a_request_that_rules_everything_out_ends_and_says_so(
    has_grammar: bool, rig: Rig, compiler: GrammarCompiler
) -> None:
    rules: dict[str, Any]
    if has_grammar:
        rules = {"grammar": made(compiler, Grammar.choice(["yes"])), "allowed_token_ids": FEW}
    else:
        rules = {"allowed_token_ids": (70,), "bad_words": ((70, 70, 70),)}
    rig.add("none", PROMPT, max_tokens=20, **rules)
    rig.add("other", PROMPT, max_tokens=20)
    rig.run()
    error = end_of(rig, "none").error
    assert isinstance(error, NothingAllowed)
    assert f"After {0 if has_grammar else 2} tokens" in error.message
    assert "allowed_token_ids and" in error.message
    assert end_of(rig, "other").error is None
    assert len(rig.tokens("other")) == 20


# beside others

MIXED: list[tuple[str | None, dict[str, Any]]] = [
    (None, {"min_tokens": 15, "ignore_eos": False, "logit_bias": ((END_OF_TURN, 30.0),)}),
    ("tuned", {"temperature": 1.0, "seed": 3}),
    ("tuned", {"allowed_token_ids": tuple(range(60, 90)), "temperature": 1.0, "seed": 4, "n": 3, "logprobs": 2}),
    (None, {"bad_words": tuple((i, j) for i in range(60, 75) for j in range(60, 75)), "prompt_logprobs": 1}),
    (None, {"temperature": 0.7, "seed": 6, "repetition_penalty": 1.2}),
    (None, {"allowed_token_ids": FEW, "bad_words": ((70, 70), (71,)), "min_tokens": 3, "seed": 9, "temperature": 1.0}),
]


@pytest.mark.parametrize("kernel", [kernel for kernel in available_kernels if kernel != "torch"])
def test_in_a_mixed_batch_everybody_gets_what_it_gets_alone(
    kernel: str, tiny_llama_dir: Path, adapter: dict[str, Path]
) -> None:
    together = build(tiny_llama_dir, adapter, kernel, num_blocks=70, max_num_batched_tokens=24)  # some are preempted
    alone = build(tiny_llama_dir, adapter, kernel)
    for number, (name, how) in enumerate(MIXED):
        together.add(f"r{number}", [number + 3, *PROMPT], name, **{"max_tokens": 40, **how})
        alone.add(f"r{number}", [number + 3, *PROMPT], name, **{"max_tokens": 40, **how})
        alone.run()
    together.run()
    assert together.scheduler.num_preemptions
    for key, outputs in alone.outputs.items():
        assert told(together.outputs[key]) == told(outputs), key
    for rig in (together, alone):
        rig.close()


def told(outputs: list[Any]) -> tuple[Any, ...]:
    deltas = [output.delta for output in outputs]
    return (
        [token for delta in deltas for token in delta.token_ids],
        "".join(delta.text for delta in deltas),
        [entry for delta in deltas for entry in delta.logprobs],
        [entry for delta in deltas for entry in delta.prompt_logprobs],
        deltas[-1].finish_reason,
    )


def test_a_step_that_is_run_again_asks_the_rules_again(tiny_llama_dir: Path, adapter: dict[str, Path]) -> None:
    quiet, disturbed = (build(tiny_llama_dir, adapter) for _ in range(2))
    for rig in (quiet, disturbed):
        for number, (name, how) in enumerate(MIXED):
            rig.add(f"r{number}", PROMPT, name, **{"max_tokens": 20, **how})
    faults = Faults(disturbed).install()
    faults.after("sample", 3, 9, 14)
    disturbed.run()
    quiet.run()
    assert faults.counted == [("sample", "retried")] * 3
    assert {k: told(v) for k, v in disturbed.outputs.items()} == {k: told(v) for k, v in quiet.outputs.items()}
    for rig in (quiet, disturbed):
        rig.close()


# the prompt's log-probabilities


def test_the_prompts_ranks_are_those_of_the_model(tiny_llama_dir: Path, adapter: dict[str, Path]) -> None:
    rig = build_rig(load(tiny_llama_dir), adapter, max_num_batched_tokens=5)
    rig.add("r", PROMPT, "tuned", max_tokens=1, prompt_logprobs=2, prompt_ranks=True)
    rig.add("none", PROMPT, "tuned", max_tokens=1, prompt_logprobs=2)
    rig.run()
    model = with_adapter(tiny_llama_dir, adapter["tuned"])
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0]
    first, *rest = rig.outputs["r/0"][0].delta.prompt_logprobs
    assert (first.logprob, first.rank) == (None, None)
    for place, entry in enumerate(rest):
        above = int((logits[place] > logits[place, entry.token_id] + 1e-4).sum())
        near = int((logits[place] >= logits[place, entry.token_id] - 1e-4).sum())
        assert above + 1 <= (entry.rank or 0) <= near
    assert all(entry.rank is None for entry in rig.outputs["none/0"][0].delta.prompt_logprobs)
    assert VOCAB_SIZE >= max(entry.rank or 0 for entry in rest) > 1
    rig.close()
