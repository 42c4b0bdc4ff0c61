"""Several tokens in a step: with a draft, right or wrong, everybody gets what it gets without, to the last bit."""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest

from manylora.engine.interface import FinishReason, Grammar
from manylora.engine.sequence import Scheduled, Sequence
from manylora.errors import SequenceFailed
from manylora.grammars.compiler import GrammarCompiler
from manylora.grammars.grammar import Whitespace
from manylora.models.checkpoint import load_tokenizer
from tests.engine.drafts import Oracle
from tests.engine.faults import Faults
from tests.engine.harness import Rig, available_kernels, build_rig, grammars_of, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.grammars.schemas import random_schema
from tests.tiny_adapters import make_adapter, make_adapter_that_spoils
from tests.tiny_models import END_OF_TURN

EXACT = [kernel for kernel in available_kernels if kernel != "torch"]
# A character each, but for some that are half of one, so that text waits for the next token.
PIECES = [chr(0x4E00 + i) if i % 5 else "\ufffd" for i in range(1000)]

REQUESTS: list[tuple[str | None, dict[str, Any]]] = [
    (None, {"max_tokens": 20}),
    ("tuned", {"max_tokens": 20, "temperature": 0.9, "seed": 1, "logprobs": 3}),
    ("other", {"max_tokens": 17, "temperature": 1.2, "seed": 2, "top_p": 0.8, "prompt_logprobs": 2, "logprobs": 0}),
    ("tuned", {"max_tokens": 20, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}),
    (None, {"max_tokens": 15, "temperature": 0.8, "seed": 4, "n": 3, "frequency_penalty": 0.7, "logprobs": 1}),
    ("other", {"max_tokens": 1, "temperature": 0.5, "seed": 5}),
    (None, {"max_tokens": 0, "prompt_logprobs": 1}),
    ("tuned", {"max_tokens": 100, "temperature": 1.0, "seed": 70, "ignore_eos": False, "logprobs": 2}),
    (None, {"max_tokens": 20, "temperature": 1.0, "seed": 71, "logit_bias": ((9, 4.0),)}),
    ("tuned", {"max_tokens": 20, "temperature": 1.0, "seed": 72, "allowed_token_ids": tuple(range(40, 90))}),
    (None, {"max_tokens": 12, "min_tokens": 9, "ignore_eos": False, "logit_bias": ((41, 50.0),), "prompt_logprobs": 0}),
    (None, {"max_tokens": 20, "bad_words": tuple((i, j) for i in range(100) for j in range(0, 100, 3))}),
]
PROMPTS = [[3 + 5 * i, *range(30 + i, 31 + 4 * i)] for i in range(len(REQUESTS))]


def decode(ids: SequenceOf[int]) -> str:
    return "".join(PIECES[i] for i in ids)


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_llama_dir, root / name, seed=i) for i, name in enumerate(("tuned", "other"))}


def rig_of(folder: Path, adapters: dict[str, Path], kernel: str, drafter: Oracle | None, **sizes: Any) -> Rig:
    sizes = {"num_blocks": 160, "eos_ids": frozenset(range(40, 60)), **sizes}
    return build_rig(load(folder), adapters, kernel=kernel, drafter=drafter, decode=decode, **sizes)


def ask_all(rig: Rig, stops: dict[int, dict[str, Any]] | None = None) -> None:
    for i, (name, params) in enumerate(REQUESTS):
        rig.add(f"r{i}", PROMPTS[i], name, **{**params, **(stops or {}).get(i, {})})


def answers(rig: Rig) -> dict[str, dict[str, Any]]:
    """All that a caller can know of each choice, but for how it was cut into pieces."""
    return {
        key: {
            "tokens": [t for o in outputs for t in o.delta.token_ids],
            "text": "".join(o.delta.text for o in outputs),
            "logprobs": [p for o in outputs for p in o.delta.logprobs],
            "prompt": [p for o in outputs for p in o.delta.prompt_logprobs],
            "end": outputs[-1].delta.finish_reason,
            "errors": [o.error for o in outputs if o.error is not None],
            "cached": sum(o.delta.num_cached_tokens for o in outputs),
        }
        for key, outputs in rig.outputs.items()
    }


def tokens_of(found: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    return {key: answer["tokens"] for key, answer in found.items()}


def run_both(folder: Path, adapters: dict[str, Path], kernel: str, oracle: Oracle, **sizes: Any) -> tuple[Rig, Rig]:
    """Everybody without drafts, and then with what the oracle makes of those answers."""
    plain, drafted = (rig_of(folder, adapters, kernel, each, **sizes) for each in (None, oracle))
    ask_all(plain)
    plain.run()
    oracle.answers = tokens_of(answers(plain))
    ask_all(drafted)
    drafted.run()
    for rig in (plain, drafted):
        assert rig.scheduler.blocks.num_used == 0
        assert not any(resident["users"] for resident in rig.tiers.residents())
        rig.close()
    assert oracle.proposed > 0
    return plain, drafted


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize(("most", "wrong"), [(1, 0.0), (4, 0.0), (4, 0.3), (9, 0.15), (3, 1.0)])
def test_a_draft_changes_no_answer(
    kernel: str, most: int, wrong: float, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    plain, drafted = run_both(tiny_llama_dir, adapters, kernel, Oracle(most=most, wrong=wrong))
    assert answers(drafted) == answers(plain)
    assert answers(plain)["r7/0"]["end"] is FinishReason.STOP
    if not wrong:
        assert drafted.engine.num_steps < plain.engine.num_steps


@pytest.mark.parametrize("kernel", EXACT)
def test_a_draft_changes_no_answer_where_blocks_are_few(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """Sequences are preempted, with tokens of drafts in their blocks, and a draft preempts nobody."""
    plain, drafted = run_both(tiny_llama_dir, adapters, kernel, Oracle(most=6, wrong=0.2), num_blocks=22)
    assert drafted.scheduler.num_preemptions > 0
    assert {k: {**a, "cached": 0} for k, a in answers(drafted).items()} == {
        k: {**a, "cached": 0} for k, a in answers(plain).items()
    }


def test_with_torchs_kernels_a_draft_gives_what_greedy_decoding_gives(
    tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    rig = rig_of(tiny_llama_dir, adapters, "torch", None)
    oracle = Oracle(most=5, wrong=0.2)
    drafted = rig_of(tiny_llama_dir, adapters, "torch", oracle)
    for each in (rig, drafted):
        for name in (None, "tuned"):
            each.add(str(name), PROMPTS[5], name, max_tokens=30)
        each.run()
        oracle.answers = tokens_of(answers(each))
        each.close()
    assert oracle.proposed
    for name in (None, "tuned"):
        check_greedy(
            with_adapter(tiny_llama_dir, adapters[name] if name else None), PROMPTS[5], drafted.tokens(str(name))
        )


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("place", range(8))
def test_an_answer_ends_inside_a_draft_where_it_ends_without(
    kernel: str, place: int, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """By a stop string over two tokens, by a stop token, by its length: nothing behind it is told, charged or kept."""
    first = rig_of(tiny_llama_dir, adapters, kernel, None)
    ask_all(first)
    first.run()
    first.close()
    whole = answers(first)
    said = whole["r8/0"]["tokens"]
    stops: dict[int, dict[str, Any]] = {
        0: {"max_tokens": place + 1},
        1: {"stop": (decode(whole["r1/0"]["tokens"][place : place + 2]),)},
        3: {"stop": (decode(whole["r3/0"]["tokens"][place : place + 1]),)},
        8: {"stop_token_ids": (said[place],)},
    }
    plain, drafted = (
        rig_of(tiny_llama_dir, adapters, kernel, each) for each in (None, Oracle(tokens_of(whole), most=5))
    )
    for rig in (plain, drafted):
        ask_all(rig, stops)
        rig.run()
        # Who asks again finds the same prefix in the cache.
        rig.add("again", [*PROMPTS[8], *said], None, max_tokens=4)
        rig.run()
        assert rig.scheduler.blocks.num_used == 0
        rig.close()
    assert answers(drafted) == answers(plain)
    assert answers(plain)["r8/0"]["tokens"] == said[: said.index(said[place]) + 1]


@pytest.mark.parametrize("kernel", EXACT)
def test_no_draft_goes_beyond_the_context_nor_beyond_a_steps_budget(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    sizes = {"num_blocks": 40, "block_size": 4, "max_num_batched_tokens": 10}
    oracle = Oracle(most=50)
    plain, drafted = (rig_of(tiny_llama_dir, adapters, kernel, each, **sizes) for each in (None, oracle))
    ran: list[Scheduled] = []
    forward = drafted.engine.runner.forward

    def watched(scheduled: list[Scheduled]) -> Any:
        assert sum(item.num_rows for item in scheduled) <= 10
        ran.extend(scheduled)
        return forward(scheduled)

    drafted.engine.runner.forward = watched  # type: ignore[method-assign,assignment]
    for rig in (plain, drafted):
        rig.add("long", range(30, 60), max_tokens=1000)
        rig.run()
        oracle.answers = tokens_of(answers(rig))
        rig.close()
    assert answers(drafted) == answers(plain)
    assert len(plain.tokens("long")) == 160 - 30
    assert max(len(item.draft) for item in ran) == 9
    assert all(item.start + item.num_rows <= 160 for item in ran)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize(("phase", "call"), [("schedule", 3), ("forward", 4), ("forward", 6), ("sample", 5)])
def test_a_step_that_fails_with_drafts_is_run_again_without(
    kernel: str, phase: str, call: int, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    plain = rig_of(tiny_llama_dir, adapters, kernel, None)
    ask_all(plain)
    plain.run()
    plain.close()
    drafted = rig_of(tiny_llama_dir, adapters, kernel, Oracle(tokens_of(answers(plain)), wrong=0.2))
    faults = Faults(drafted).install()
    faults.after(phase, call)
    ask_all(drafted)
    drafted.run()
    drafted.close()
    assert faults.counted == [(phase, "retried")]
    assert answers(drafted) == answers(plain)


@pytest.mark.parametrize("kernel", EXACT)
def test_a_draft_whose_tokens_spoil_the_logits_harms_nobody(kernel: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The adapter makes no numbers of token 77, which the draft proposes and the model does not say."""
    folder = make_adapter_that_spoils(tiny_llama_dir, tmp_path / "bad", 77)
    plain = build_rig(load(tiny_llama_dir), {"bad": folder}, kernel=kernel, num_blocks=120)
    oracle = Oracle({}, most=3)
    drafted = build_rig(load(tiny_llama_dir), {"bad": folder}, kernel=kernel, num_blocks=120, drafter=oracle)
    oracle.instead = {2: 77, 7: 77, 8: 77}
    for rig in (plain, drafted):
        rig.add("r", [5, 76, 6], "bad", max_tokens=12)
        rig.add("beside", [5, 76, 6], None, max_tokens=12)
        rig.run()
        oracle.answers = tokens_of(answers(rig))
        assert 77 not in oracle.answers["r/0"]
        rig.close()
    assert answers(drafted) == answers(plain)
    assert drafted.engine.num_steps < plain.engine.num_steps


def test_a_drafter_that_raises_fails_its_own_sequence(tiny_llama_dir: Path, adapters: dict[str, Path]) -> None:
    class Broken(Oracle):
        def propose(self, seq: Sequence, most: int, num_rows: int) -> list[int]:
            if seq.request_id == "r1":
                raise KeyError("lost")
            return super().propose(seq, most, num_rows)

    kernel = available_kernels[-1]
    plain = rig_of(tiny_llama_dir, adapters, kernel, None)
    drafted = rig_of(tiny_llama_dir, adapters, kernel, Broken())
    for rig in (plain, drafted):
        ask_all(rig)
        rig.run()
        rig.close()
    found, expected = answers(drafted), answers(plain)
    assert [type(error) for error in found.pop("r1/0")["errors"]] == [SequenceFailed]
    del expected["r1/0"]
    if drafted.is_exact:
        assert found == expected


@pytest.mark.parametrize("kernel", EXACT)
def test_tokens_that_are_taken_without_having_run_are_run_in_the_next_step(
    kernel: str, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    """As those that a grammar leaves no choice of: the sampler adds them behind the one it has sampled."""
    plain, forced = (rig_of(tiny_llama_dir, adapters, kernel, None) for _ in range(2))
    ask_all(plain)
    plain.run()
    known = tokens_of(answers(plain))
    sample = forced.engine.runner.sample

    def adding(scheduled: list[Scheduled], logits: Any) -> Any:
        outcomes = sample(scheduled, logits)
        for item, outcome in zip(scheduled, outcomes, strict=True):
            if item.samples and item.seq.params.logprobs is None:
                place = item.seq.num_output_tokens + 1
                outcome.token_ids = [
                    *outcome.token_ids,
                    *known[f"{item.seq.request_id}/{item.seq.index}"][place : place + 3],
                ]
        return outcomes

    forced.engine.runner.sample = adding  # type: ignore[method-assign,assignment]
    ask_all(forced)
    forced.run()
    assert answers(forced) == answers(plain)
    for rig in (plain, forced):
        assert rig.scheduler.blocks.num_used == 0
        rig.close()


# held to grammars

HELD: list[tuple[str | None, Grammar, dict[str, Any]]] = [
    (None, Grammar.json_schema(random_schema(5)), {"max_tokens": 60}),
    ("tuned", Grammar.json_schema(random_schema(6)), {"max_tokens": 60, "temperature": 1.0, "seed": 1}),
    ("other", Grammar.json_schema(random_schema(7), Whitespace(separators=(", ", ": "))), {"max_tokens": 60}),
    ("tuned", Grammar.json_schema(random_schema(8)), {"max_tokens": 40, "temperature": 1.0, "seed": 2, "logprobs": 2}),
    (
        None,
        Grammar.regex("[a-z]{3,30}( [a-z]{3,9}){2,6}[.]"),
        {"max_tokens": 50, "temperature": 1, "seed": 3, "n": 3},
    ),
    ("other", Grammar.regex("(ab|cd){2,20}"), {"max_tokens": 30, "temperature": 1.0, "seed": 4, "min_tokens": 9}),
    (None, Grammar.choice(["yes, of course", "yes, of late", "no"]), {"temperature": 1.0, "seed": 5}),
    ("tuned", Grammar.grammar(r"start: /(.|\n)*/"), {"max_tokens": 20, "repetition_penalty": 1.3, "ignore_eos": True}),
    ("tuned", Grammar.json_schema(True), {"max_tokens": 25, "stop": ("e",), "temperature": 1.0, "seed": 6}),
]


def ask_held(rig: Rig, compiler: GrammarCompiler) -> None:
    for i, (name, grammar, params) in enumerate(HELD):
        compiled = compiler.compile(grammar, "tenant").result(60)
        rig.add(f"h{i}", PROMPTS[i], name, **{"ignore_eos": False, **params}, grammar=compiled)
    for i, (name, params) in enumerate(REQUESTS[:3]):
        rig.add(f"r{i}", PROMPTS[i], name, **params)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize(("most", "wrong"), [(9, 0.0), (9, 0.2), (3, 1.0)])
def test_a_draft_changes_no_answer_that_is_held_to_a_grammar(
    kernel: str, most: int, wrong: float, tiny_llama_dir: Path, adapters: dict[str, Path]
) -> None:
    compiler, oracle = grammars_of(tiny_llama_dir), Oracle(most=most, wrong=wrong)
    how = {"num_blocks": 400, "eos_ids": frozenset([END_OF_TURN]), "decode": load_tokenizer(tiny_llama_dir).decode}
    plain, drafted = (
        build_rig(load(tiny_llama_dir), adapters, kernel=kernel, drafter=each, **how) for each in (None, oracle)
    )
    for rig in (plain, drafted):
        ask_held(rig, compiler)
        rig.run()
        oracle.answers = tokens_of(answers(rig))
        assert rig.scheduler.blocks.num_used == 0
        rig.close()
    compiler.close()
    found, expected = answers(drafted), answers(plain)
    assert found == expected
    assert not any(answer["errors"] for answer in expected.values())
    held = [o.delta for key, outputs in drafted.outputs.items() if key.startswith("h") for o in outputs]
    assert sum(delta.num_drafted for delta in held)
    if not wrong:
        assert sum(delta.num_accepted for delta in held) > 50
