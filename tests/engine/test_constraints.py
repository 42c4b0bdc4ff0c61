"""Answers that are held to a grammar, on a model whose logits are random: nothing but the grammar makes them right."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLParserLimits

from manylora.engine.interface import FinishReason, Grammar
from manylora.errors import InvalidGrammar, SequenceFailed
from manylora.grammars import language, masks
from manylora.grammars.compiler import Compiled, GrammarCompiler
from manylora.models.checkpoint import load_tokenizer
from tests.engine.faults import PHASES, Faults
from tests.engine.harness import Rig, available_kernels, build_rig, grammars_of, load
from tests.grammars.schemas import check_conforms, random_schema
from tests.tiny_adapters import make_adapter
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE

ADAPTERS = ("one", "two", "three", "four")
NAMES = (None, *ADAPTERS)
PROMPT = list(range(40, 52))
PERSON = {
    "type": "object",
    "properties": {"customer_name": {"type": "string", "maxLength": 6}, "quantity": {"enum": [1, 2, 300]}},
    "required": ["customer_name", "quantity"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tiny_llama_dir: Path) -> Iterator[GrammarCompiler]:
    compiler = grammars_of(tiny_llama_dir)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(tiny_llama_dir, root / name, seed=i) for i, name in enumerate(ADAPTERS)}


def build(folder: Path, adapters: dict[str, Path], kernel: str = available_kernels[-1], **how: Any) -> Rig:
    options: dict[str, Any] = {"num_blocks": 2000, "max_num_batched_tokens": 256, **how}
    decode = load_tokenizer(folder).decode
    return build_rig(load(folder), adapters, kernel=kernel, decode=decode, eos_ids=frozenset([END_OF_TURN]), **options)


@pytest.fixture(scope="module")
def shared_rig(tiny_llama_dir: Path, adapters: dict[str, Path]) -> Iterator[Rig]:
    rig = build(tiny_llama_dir, adapters)
    yield rig
    rig.close()


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """One engine for all tests: each leaves nothing behind in it."""
    shared_rig.outputs = {}
    yield shared_rig
    assert not shared_rig.engine.has_work
    assert shared_rig.scheduler.blocks.num_used == 0


def made(compiler: GrammarCompiler, grammar: Grammar) -> Compiled:
    return compiler.compile(grammar, "tenant").result(60)


def ask(rig: Rig, request_id: str, grammar: Compiled | None, adapter: str | None = None, **how: Any) -> None:
    options = {"max_tokens": 900, "temperature": 1.0, "seed": 7, "ignore_eos": False, **how}
    rig.add(request_id, PROMPT, adapter, grammar=grammar, **options)


def answer(rig: Rig, request_id: str, index: int = 0) -> tuple[list[int], str, FinishReason | None]:
    last = rig.outputs[f"{request_id}/{index}"][-1]
    assert last.error is None, last.error
    return rig.tokens(request_id, index), rig.text(request_id, index), last.delta.finish_reason


# what answers are


def check_schemas(rig: Rig, compiler: GrammarCompiler, seeds: range) -> None:
    for seed in seeds:
        grammar = made(compiler, Grammar.json_schema(random_schema(seed)))
        temperature = 0.0 if seed % 7 == 0 else 1.0
        ask(rig, f"s{seed}", grammar, NAMES[seed % len(NAMES)], seed=seed, temperature=temperature, max_tokens=300)
    rig.run()
    whole = [seed for seed in seeds if answer(rig, f"s{seed}")[2] is FinishReason.STOP]
    for seed in whole:
        check_conforms(random_schema(seed), rig.text(f"s{seed}"))
    assert len(whole) > len(seeds) * 0.9  # the others wrote until there was no room


def test_every_answer_conforms_to_its_own_schema_whatever_the_model_would_say(
    rig: Rig, compiler: GrammarCompiler
) -> None:
    check_schemas(rig, compiler, range(40))


@pytest.mark.slow
def test_answers_conform_to_hundreds_of_random_schemas(rig: Rig, compiler: GrammarCompiler) -> None:
    check_schemas(rig, compiler, range(1000, 1400))


REGEXES = (r"[a-f0-9]{8}-[0-9]{4}", r"(red|green|blue)( dark)?", r"\d{3}/\w{2}", "ж[aб]{2,5}")


@pytest.mark.parametrize("pattern", REGEXES)
def test_an_answer_matches_its_regular_expression_as_a_whole(pattern: str, rig: Rig, compiler: GrammarCompiler) -> None:
    ask(rig, "r", made(compiler, Grammar.regex(pattern)))
    rig.run()
    _, text, reason = answer(rig, "r")
    assert reason is FinishReason.STOP
    assert re.fullmatch(pattern, text)


CHOICES = ["yes", "yesterday", "no", 'say "no"', "c\\d", "two\nlines", "naïve café 🙂", "\x7f", "<|im_end|>", "a/b"]


def test_an_answer_is_one_of_its_choices(rig: Rig, compiler: GrammarCompiler) -> None:
    grammar = made(compiler, Grammar.choice(CHOICES))
    for seed in range(60):
        ask(rig, f"c{seed}", grammar, seed=seed)
    rig.run()
    answers = {answer(rig, f"c{seed}")[1:] for seed in range(60)}
    assert answers <= {(choice, FinishReason.STOP) for choice in CHOICES}
    assert len(answers) > 4


LARK = 'start: sum\nsum: NUMBER | sum "+" NUMBER | "(" sum ")"\nNUMBER: /[1-9]/'
GBNF = 'root ::= sum\nsum ::= number | number "+" sum | "(" sum ")"\nnumber ::= [1-9]'


@pytest.mark.parametrize("text", [LARK, GBNF])
def test_an_answer_follows_a_context_free_grammar(text: str, rig: Rig, compiler: GrammarCompiler) -> None:
    for seed in range(8):
        ask(rig, f"g{seed}", made(compiler, Grammar.grammar(text)), seed=seed, max_tokens=500)
    rig.run()
    whole = [answer(rig, f"g{seed}")[1] for seed in range(8) if answer(rig, f"g{seed}")[2] is FinishReason.STOP]
    assert whole
    for found in whole:
        assert re.fullmatch(r"[1-9+()]+", found)
        assert eval(found) > 0


def test_structures_begin_at_their_triggers_and_all_other_text_is_free(rig: Rig, compiler: GrammarCompiler) -> None:
    call = {"begin": "<call>", "schema": PERSON, "end": "</call>"}
    grammar = made(compiler, Grammar.structural_tag([call], ["<"]))
    bias = ((token_of(rig, "<"), 100.0),)
    for seed in range(4):
        ask(rig, f"t{seed}", grammar, seed=seed, logit_bias=bias, max_tokens=200)
    rig.run()
    texts = [answer(rig, f"t{seed}")[1] for seed in range(4)]
    calls = [found for text in texts for found in re.findall("<call>(.*?)</call>", text, re.DOTALL)]
    assert calls
    for found in calls:
        check_conforms(PERSON, found)
    assert all("<" not in re.sub("<call>.*?(</call>|$)", "", text, flags=re.DOTALL)[:-6] for text in texts)


def token_of(rig: Rig, text: str) -> int:
    return next(i for i in range(VOCAB_SIZE) if rig.engine._decode([i]) == text)


# what becomes of the other fields


def test_rows_with_their_own_grammars_and_adapters_answer_as_each_does_alone(
    rig: Rig, compiler: GrammarCompiler
) -> None:
    def ask_one(run: str, number: int) -> None:
        grammar = made(compiler, Grammar.json_schema(random_schema(number))) if number % 8 else None
        adapter = NAMES[number % len(NAMES)]
        ask(rig, f"{run}{number}", grammar, adapter, seed=number, max_tokens=60, temperature=number % 3 / 2)

    for number in range(32):
        ask_one("alone", number)
        rig.run()
    for number in range(32):
        ask_one("together", number)
    rig.run()
    assert rig.is_exact
    for number in range(32):
        assert answer(rig, f"together{number}") == answer(rig, f"alone{number}")


def test_a_batch_of_32_adapters_with_32_schemas_answers_as_each_does_alone(
    tiny_llama_dir: Path, tmp_path: Path, compiler: GrammarCompiler
) -> None:
    names = [f"tenant{number}" for number in range(32)]
    fleet = {
        name: make_adapter(tiny_llama_dir, tmp_path / name, rank=4, seed=number) for number, name in enumerate(names)
    }
    schemas = [random_schema(3000 + number) for number in range(32)]
    assert len({str(schema) for schema in schemas}) == 32
    rig = build(tiny_llama_dir, fleet, max_num_batched_tokens=512)
    for name in names:
        rig.add(f"load {name}", PROMPT, name, max_tokens=1)
    rig.run()

    def ask_one(run: str, number: int) -> None:
        grammar = made(compiler, Grammar.json_schema(schemas[number]))
        ask(rig, f"{run}{number}", grammar, names[number], seed=number, max_tokens=100, temperature=number % 3 / 2)

    for number in range(32):
        ask_one("together", number)
    rig.step()
    assert len(rig.scheduler.running) > 24  # who has said all in one step is not among them
    rig.run()
    for number in range(32):
        ask_one("alone", number)
        rig.run()
    assert rig.is_exact
    whole = 0
    for number, schema in enumerate(schemas):
        assert answer(rig, f"together{number}") == answer(rig, f"alone{number}")
        if answer(rig, f"alone{number}")[2] is FinishReason.STOP:
            check_conforms(schema, rig.text(f"alone{number}"))
            whole += 1
    assert whole > 16  # the others were cut
    rig.close()


def test_what_must_come_is_taken_without_the_model(rig: Rig, compiler: GrammarCompiler) -> None:
    grammar = made(compiler, Grammar.json_schema(PERSON))
    before = rig.engine.num_steps
    ask(rig, "fast", grammar)
    rig.run()
    tokens, text, reason = answer(rig, "fast")
    assert reason is FinishReason.STOP
    check_conforms(PERSON, text)
    assert rig.engine.num_steps - before < len(tokens) - 10
    assert any(len(output.delta.token_ids) > 3 for output in rig.outputs["fast/0"])


def test_log_probabilities_are_the_models_own_and_change_no_answer(rig: Rig, compiler: GrammarCompiler) -> None:
    grammar = made(compiler, Grammar.json_schema(PERSON))
    ask(rig, "plain", grammar)
    ask(rig, "scored", grammar, logprobs=3)
    rig.run()
    assert answer(rig, "scored") == answer(rig, "plain")
    entries = [entry for output in rig.outputs["scored/0"] for entry in output.delta.logprobs]
    tokens = rig.tokens("scored")
    assert [entry.token_id for entry in entries] == tokens
    # A model of random weights would have said something else at almost every place, and its own say is reported.
    likeliest = [entry.top[0][0] for entry in entries]
    assert sum(a != b for a, b in zip(likeliest, tokens, strict=True)) > len(tokens) / 2
    assert all(entry.logprob is not None and entry.logprob < 0 for entry in entries)
    # The same tokens as a prompt have the same probabilities.
    rig.add("prompt", [*PROMPT, *tokens], max_tokens=1, prompt_logprobs=0)
    rig.run()
    again = [e for o in rig.outputs["prompt/0"] for e in o.delta.prompt_logprobs][len(PROMPT) :]
    assert [e.logprob for e in again] == pytest.approx([e.logprob for e in entries], abs=1e-4)


def test_every_choice_of_a_request_has_a_way_of_its_own(rig: Rig, compiler: GrammarCompiler) -> None:
    grammar = made(compiler, Grammar.json_schema(PERSON))
    ask(rig, "n", grammar, n=5)
    rig.run()
    answers = [answer(rig, "n", index) for index in range(5)]
    for _, text, reason in answers:
        assert reason is FinishReason.STOP
        check_conforms(PERSON, text)
    assert len({text for _, text, _ in answers}) == 5


def test_stop_strings_cut_an_answer_and_bias_and_penalties_choose_among_what_is_allowed(
    rig: Rig, compiler: GrammarCompiler
) -> None:
    grammar = made(compiler, Grammar.json_schema(PERSON))
    ask(rig, "stop", grammar, stop=("tomer_na",))
    ask(rig, "biased", made(compiler, Grammar.regex("(a|b|c){20}")), logit_bias=((token_of(rig, "b"), 100.0),))
    forbidden = tuple((i, 100.0) for i in (0, 1, END_OF_TURN, 300))
    ask(rig, "forbidden", grammar, logit_bias=forbidden, presence_penalty=2.0, repetition_penalty=1.5, top_k=5)
    ask(rig, "short", grammar, max_tokens=5)
    rig.run()
    assert answer(rig, "stop")[1:] == ('{"cus', FinishReason.STOP)
    assert answer(rig, "biased")[1] == "b" * 20
    check_conforms(PERSON, answer(rig, "forbidden")[1])
    tokens, _, reason = answer(rig, "short")
    assert (len(tokens), reason) == (5, FinishReason.LENGTH)


def test_an_answer_that_may_end_or_go_on_goes_on_when_its_end_is_ignored(rig: Rig, compiler: GrammarCompiler) -> None:
    ask(rig, "may", made(compiler, Grammar.regex("[ab]{3,60}")), ignore_eos=True)
    rig.run()
    _, text, reason = answer(rig, "may")
    assert (len(text), reason) == (60, FinishReason.STOP)


def test_an_answer_of_nothing_at_all_is_one(rig: Rig, compiler: GrammarCompiler) -> None:
    ask(rig, "empty", made(compiler, Grammar.choice([""])))
    rig.run()
    assert answer(rig, "empty")[1:] == ("", FinishReason.STOP)


def test_the_prompt_alone_is_held_to_nothing(rig: Rig, compiler: GrammarCompiler) -> None:
    ask(rig, "none", made(compiler, Grammar.choice(["a"])), max_tokens=0)
    rig.run()
    assert answer(rig, "none") == ([], "", FinishReason.LENGTH)


def test_a_prompt_that_is_scored_keeps_its_scores(rig: Rig, compiler: GrammarCompiler) -> None:
    ask(rig, "scored", made(compiler, Grammar.json_schema(PERSON)), prompt_logprobs=1)
    rig.run()
    entries = [e for o in rig.outputs["scored/0"] for e in o.delta.prompt_logprobs]
    assert [e.token_id for e in entries] == PROMPT


def test_answers_survive_being_put_back_and_find_their_prefix_again(
    tiny_llama_dir: Path, adapters: dict[str, Path], compiler: GrammarCompiler
) -> None:
    grammars = [made(compiler, Grammar.json_schema(random_schema(seed))) for seed in range(100, 112)]

    def run(num_blocks: int) -> tuple[list[Any], int]:
        rig = build(tiny_llama_dir, adapters, num_blocks=num_blocks)
        for number, grammar in enumerate(grammars):
            ask(rig, f"p{number}", grammar, NAMES[number % 5], seed=number, max_tokens=40)
        rig.run()
        found = [answer(rig, f"p{number}") for number in range(len(grammars))]
        rig.close()
        return found, rig.scheduler.num_preemptions

    roomy, none = run(2000)
    tight, some = run(24)
    assert (none, some > 0) == (0, True)
    assert tight == roomy


# faults


@pytest.fixture(scope="module")
def shared_faults(tiny_llama_dir: Path, adapters: dict[str, Path]) -> Iterator[Faults]:
    rig = build(tiny_llama_dir, adapters)
    yield Faults(rig).install()
    rig.close()


@pytest.fixture
def faults(shared_faults: Faults) -> Iterator[Faults]:
    shared_faults.clear()
    shared_faults.rig.outputs = {}
    yield shared_faults
    shared_faults.clear()
    assert not shared_faults.rig.engine.has_work
    assert shared_faults.rig.scheduler.blocks.num_used == 0


def ask_eight(rig: Rig, compiler: GrammarCompiler, run: str) -> None:
    for seed in range(8):
        grammar = made(compiler, Grammar.json_schema(random_schema(seed)))
        ask(rig, f"{run}{seed}", grammar, NAMES[seed % 5], seed=seed, max_tokens=50, logprobs=1 if seed % 2 else None)


@pytest.mark.parametrize("phase", PHASES[:3])
@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_step_that_is_run_again_takes_no_token_twice(
    phase: str, call: int, faults: Faults, compiler: GrammarCompiler
) -> None:
    rig = faults.rig
    ask_eight(rig, compiler, "clean")
    rig.run()
    ask_eight(rig, compiler, "faulty")
    faults.after(phase, call, call + 1)
    rig.run()
    assert faults.counted == [(phase, "retried")]
    for seed in range(8):
        assert answer(rig, f"faulty{seed}") == answer(rig, f"clean{seed}")


@pytest.mark.parametrize("phase", PHASES)
def test_who_a_step_fails_for_ends_alone(phase: str, faults: Faults, compiler: GrammarCompiler) -> None:
    rig = faults.rig
    ask_eight(rig, compiler, "clean")
    rig.run()
    ask_eight(rig, compiler, "faulty")
    faults.of(phase, "faulty3", 4)
    rig.run()
    assert isinstance(rig.outputs["faulty3/0"][-1].error, SequenceFailed)
    for seed in (0, 1, 2, 4, 5, 6, 7):
        assert answer(rig, f"faulty{seed}") == answer(rig, f"clean{seed}")


def test_a_grammar_that_takes_longer_than_a_step_holds_up_nobody_else(
    rig: Rig, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = made(compiler, Grammar.regex("(slow){30}!"))
    may_go_on = threading.Event()
    follow = masks._follow

    def held_back(way: Any, token_ids: tuple[int, ...]) -> Any:
        if way.compiled is slow and token_ids:
            may_go_on.wait(60)
        return follow(way, token_ids)

    monkeypatch.setattr(masks, "_follow", held_back)
    ask(rig, "slow", slow, logprobs=0)  # one token after the other
    while not rig.outputs.get("slow/0"):
        rig.step()
    ask(rig, "free", None, max_tokens=20)
    for _ in range(40):
        rig.step()
    assert len(rig.tokens("free")) > 0
    assert rig.outputs["free/0"][-1].delta.finish_reason is not None
    assert len(rig.tokens("slow")) == 1
    may_go_on.set()
    rig.run()
    assert answer(rig, "slow")[1:] == ("slow" * 30 + "!", FinishReason.STOP)


def test_a_grammar_that_never_ends_its_work_ends_its_own_sequence(
    rig: Rig, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = made(compiler, Grammar.regex("(stuck){30}"))
    ends = threading.Event()
    mask = masks._mask

    def never(way: Any, eos_ids: tuple[int, ...]) -> Any:
        while way.compiled is stuck and not ends.is_set():
            pass
        return mask(way, eos_ids)

    monkeypatch.setattr(masks, "_mask", never)
    monkeypatch.setattr(masks, "MAX_MASK_S", 0.05)
    ask(rig, "stuck", stuck, logprobs=0)
    ask(rig, "other", made(compiler, Grammar.json_schema(PERSON)))
    rig.run()
    error = rig.outputs["stuck/0"][-1].error
    assert isinstance(error, InvalidGrammar)
    check_conforms(PERSON, answer(rig, "other")[1])
    with pytest.raises(InvalidGrammar, match="too complex"):
        compiler.compile(stuck.grammar, "tenant").result(60)
    ends.set()


def with_states(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(language, "LIMITS", LLParserLimits(max_lexer_states=most, verbose_errors=False))


def test_a_grammar_that_cannot_be_followed_any_more_is_the_callers_fault(
    rig: Rig, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lexer has so many states that only an answer finds out about them."""
    with_states(monkeypatch, 200)
    grammar = made(compiler, Grammar.regex("(a|b)*a(a|b){30}"))
    for name in ("much", "again"):
        ask(rig, name, grammar, ignore_eos=True)
    ask(rig, "other", made(compiler, Grammar.json_schema(PERSON)))
    rig.run()
    for name in ("much", "again"):
        error = rig.outputs[f"{name}/0"][-1].error
        assert isinstance(error, InvalidGrammar)
        assert error.status == 400
        assert "too complex" in error.message
        assert rig.tokens(name)
    check_conforms(PERSON, answer(rig, "other")[1])


def test_what_other_requests_found_out_about_a_grammar_uses_up_nothing(
    rig: Rig, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matchers of one grammar share the states of its lexer: together they pass a bound that none passes alone."""
    with_states(monkeypatch, 100)
    renewed: list[Compiled] = []
    renew = Compiled.renewed

    def counted(self: Compiled) -> Any:
        renewed.append(self)
        return renew(self)

    monkeypatch.setattr(Compiled, "renewed", counted)
    grammar = made(compiler, Grammar.regex("(a|b)*b(a|b){30}"))
    for seed in range(12):
        ask(rig, f"one{seed}", grammar, seed=seed, ignore_eos=True, max_tokens=12)
        rig.run()
    assert all(answer(rig, f"one{seed}")[2] is FinishReason.LENGTH for seed in range(12))
    assert renewed
