"""Which tokens may come next: never those without a meaning, ends only where there may be one, and what must come."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from manylora.errors import InvalidGrammar, ManyloraError
from manylora.grammars import masks as masks_module
from manylora.grammars.compiler import Compiled, GrammarCompiler
from manylora.grammars.grammar import Grammar, Whitespace
from manylora.grammars.masks import Constraint, Mask, MaskMaker
from manylora.grammars.vocabulary import Vocabulary
from tests.tiny_models import END_OF_TURN, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer

PADDED = VOCAB_SIZE + 70  # rows of the model; the last ones have no token
PATIENCE_S = 120
TOKENIZER = make_tokenizer()
SPECIAL = set(range(len(SPECIAL_TOKENS)))
EOS = (END_OF_TURN, 0)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(lambda: Vocabulary(TOKENIZER.backend_tokenizer.to_str(), PADDED, EOS), encode, 2**28)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def masks() -> Iterator[MaskMaker]:
    masks = MaskMaker(EOS)
    yield masks
    masks.close()


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def made(compiler: GrammarCompiler, grammar: Grammar) -> Compiled:
    return compiler.compile(grammar, "acme").result(PATIENCE_S)


def ready(masks: MaskMaker, constraint: Constraint) -> Constraint:
    deadline = time.monotonic() + PATIENCE_S
    while not constraint.is_ready and time.monotonic() < deadline:
        masks.wait_ready([constraint], 1.0)
    assert constraint.is_ready
    return constraint


def allowed(constraint: Constraint) -> set[int]:
    assert constraint.allowed is not None
    return set_bits(constraint.allowed)


def set_bits(mask: Mask) -> set[int]:
    return {int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))}


def follow(masks: MaskMaker, constraint: Constraint, text: str) -> None:
    """Take the tokens of `text`, those that must come included."""
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    while ids:
        ready(masks, constraint)
        if constraint.forced:
            forced = constraint.take_forced()
            assert list(forced) == ids[: len(forced)]
            ids = ids[len(forced) :]
            if not constraint.is_complete:
                continue
            assert not ids
            return
        assert ids[0] in allowed(constraint)
        constraint.advance([ids.pop(0)])
    ready(masks, constraint)


EVERYTHING = [Grammar.regex(r"(?s:.)*"), Grammar.json_schema(True), Grammar.grammar(r"start: /(.|\n)*/")]


@pytest.mark.parametrize("grammar", EVERYTHING, ids=lambda value: value.kind)
def test_rows_without_a_token_and_special_tokens_are_never_allowed(
    grammar: Grammar, compiler: GrammarCompiler, masks: MaskMaker
) -> None:
    constraint = ready(masks, Constraint(masks, made(compiler, grammar)))
    found = allowed(constraint)
    assert found
    assert max(found) < len(TOKENIZER)
    assert found & SPECIAL <= set(EOS)


def test_every_token_of_text_may_come_where_any_text_may(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    """Byte tokens included: characters of several tokens can be written."""
    constraint = Constraint(masks, made(compiler, Grammar.regex(r"(?s:.)*")))
    follow(masks, constraint, "naïve 天🙂")
    first_bytes_only = {i for i in range(len(TOKENIZER)) if i not in SPECIAL} - allowed(constraint)
    for token in first_bytes_only:  # only what could not begin a character
        assert TOKENIZER.decode([token]).startswith("\ufffd")
    assert set(EOS) <= allowed(constraint)


def test_an_end_is_allowed_where_the_grammar_has_one_and_nowhere_else(
    compiler: GrammarCompiler, masks: MaskMaker
) -> None:
    constraint = Constraint(masks, made(compiler, Grammar.regex("[ab]{2,4}")))
    for text, may_end in (("", False), ("a", False), ("b", True), ("b", True)):
        if text:
            follow(masks, constraint, text)
        assert bool(set(EOS) & allowed(ready(masks, constraint))) is may_end
    follow(masks, constraint, "a")
    assert constraint.is_complete


def test_where_an_end_is_not_wanted_it_is_allowed_nowhere(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    constraint = Constraint(masks, made(compiler, Grammar.regex("[ab]{0,4}")), ends_only_when_complete=True)
    for letter in "abab":
        assert not set(EOS) & allowed(ready(masks, constraint))
        follow(masks, constraint, letter)
    assert constraint.is_complete


SCHEMA = {
    "type": "object",
    "properties": {"first": {"const": "always this"}, "second": {"type": "boolean"}},
    "required": ["first", "second"],
    "additionalProperties": False,
}


def test_what_must_come_is_told_at_once_and_one_by_one_it_is_the_only_thing_allowed(
    compiler: GrammarCompiler, masks: MaskMaker
) -> None:
    compiled = made(compiler, Grammar.json_schema(SCHEMA, Whitespace(is_none=True)))
    at_once, one_by_one = Constraint(masks, compiled), Constraint(masks, compiled, one_by_one=True)
    forced = list(ready(masks, at_once).take_forced())
    assert TOKENIZER.decode(forced).startswith('{"first":"always this","sec')
    for token_id in forced:
        assert allowed(ready(masks, one_by_one)) == {token_id}
        assert not one_by_one.forced
        one_by_one.advance([token_id])
    assert allowed(ready(masks, one_by_one)) == allowed(ready(masks, at_once))


def test_matchers_of_one_grammar_go_their_own_ways(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    compiled = made(compiler, Grammar.choice(["ab", "cd"]))
    one, other = Constraint(masks, compiled), Constraint(masks, compiled)
    follow(masks, one, "a")
    follow(masks, other, "c")
    # the rest must come
    assert TOKENIZER.decode(one.forced or one.way.taken[1:]) == "b"
    assert TOKENIZER.decode(other.forced or other.way.taken[1:]) == "d"


def test_a_token_that_is_not_allowed_is_an_error_of_its_sequence(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    constraint = Constraint(masks, made(compiler, Grammar.regex("[ab]{5}")))
    ready(masks, constraint)
    constraint.advance(TOKENIZER.encode("z", add_special_tokens=False)[:1])
    assert isinstance(ready(masks, constraint).error, ManyloraError)


@pytest.mark.parametrize("whitespace", [Whitespace(), Whitespace(is_none=True), Whitespace(pattern=r"\t\t")])
def test_what_may_stand_between_the_parts_of_json(
    whitespace: Whitespace, compiler: GrammarCompiler, masks: MaskMaker
) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}}
    ways = {
        " ": "[ true, false ]",
        "": "[true,false]",
        "\n": "[\n\ttrue,\n\tfalse\n]",
        "\t\t": "[\t\ttrue,\t\tfalse\t\t]",
    }
    taken = []
    for name, text in ways.items():
        assert json.loads(text) == [True, False]
        constraint = Constraint(masks, made(compiler, Grammar.json_schema(schema, whitespace)))
        try:
            follow(masks, constraint, text)
        except AssertionError:
            continue
        taken.append(name)
    usual = [" ", "", "\n"]
    assert taken == ([""] if whitespace.is_none else ["", "\t\t"] if whitespace.pattern else usual)


def test_with_separators_given_all_of_a_key_must_come(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    whitespace = Whitespace(separators=(", ", ": "))
    constraint = Constraint(masks, made(compiler, Grammar.json_schema(SCHEMA, whitespace)))
    forced = TOKENIZER.decode(ready(masks, constraint).take_forced())
    assert '{"first": "always this", "second": '.startswith(forced)
    assert len(forced) > 30
    follow(masks, constraint, '{"first": "always this", "second": true}'[len(forced) :])
    assert constraint.is_complete


def test_a_model_cannot_write_spaces_for_ever(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    constraint = Constraint(masks, made(compiler, Grammar.json_schema({"type": "object"})))
    space = TOKENIZER.encode(" ", add_special_tokens=False)[0]
    follow(masks, constraint, "{\n")
    for _ in range(64):
        assert space in allowed(ready(masks, constraint))
        constraint.advance([space])
    assert space not in allowed(ready(masks, constraint))


def test_what_is_slow_counts_against_the_memory_of_grammars(
    compiler: GrammarCompiler, masks: MaskMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manylora.grammars import masks as module

    compiled = made(compiler, Grammar.regex("[abc]{9}"))
    before = compiled.num_bytes
    ready(masks, Constraint(masks, compiled))
    assert compiled.num_bytes == before
    monkeypatch.setattr(module, "_SLOW_S", -1.0)
    ready(masks, Constraint(masks, compiled))
    assert compiled.num_bytes > before


def test_an_answer_that_nothing_can_follow_is_an_error_and_no_endless_wait(
    compiler: GrammarCompiler, masks: MaskMaker
) -> None:
    """Special tokens in a grammar: this one is beyond what the tokenizer has."""
    with pytest.raises(InvalidGrammar):
        made(compiler, Grammar.grammar(f'start: "a" <[{PADDED + 100}]>'))


# looking ahead

ANSWERS = [
    (Grammar.json_schema(SCHEMA, Whitespace(is_none=True)), '{"first":"always this","second":true}'),
    (Grammar.json_schema(SCHEMA), '{"first": "always this", "second": false}'),
    (Grammar.choice(["yes, it is", "yes, it was", "no"]), "yes, it was"),
    (Grammar.regex("[ab]{2,9}(, )?c+"), "abba, cccc"),
    (Grammar.grammar('start: sum\nsum: NUMBER | sum "+" NUMBER | "(" sum ")"\nNUMBER: /[1-9]/'), "((1+2)+3)+4"),
]
Places = list[tuple[tuple[int, ...], set[int]]]  # what the sequence has taken, and what may come then


def places_of(masks: MaskMaker, constraint: Constraint, ids: list[int], most: int) -> Places:
    """All places at which the model is asked on the way along `ids`, `most` of which are looked at ahead from each."""
    found: Places = []
    at = 0
    while not ready(masks, constraint).is_complete:
        at += len(constraint.take_forced())
        if at == len(ids) or ready(masks, constraint).is_complete:
            return found
        if most:
            assert constraint.may_look
            constraint.look(tuple(ids[at : at + most]))
            ready(masks, constraint)
        taken = 1
        for bits in (constraint.allowed, *constraint.ahead):
            assert bits is not None
            where = tuple(ids[: at + taken - 1])
            found.append(
                (where, {int(i) for i in np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))})
            )
            taken += 1
        taken = min(taken - 1, len(ids) - at)
        constraint.advance(ids[at : at + taken])
        at += taken
    return found


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("most", [1, 3, 50])
@pytest.mark.parametrize(("grammar", "text"), ANSWERS, ids=lambda value: getattr(value, "kind", ""))
def test_what_may_come_behind_a_draft_is_what_may_come_behind_its_tokens(
    grammar: Grammar, text: str, most: int, one_by_one: bool, compiler: GrammarCompiler, masks: MaskMaker
) -> None:
    """Tokens that must come together have one choice each in a draft, and are no places where the model is asked."""
    compiled = made(compiler, grammar)
    way = Constraint(masks, compiled, one_by_one=True)
    ids = encode(text)
    follow(masks, way, text)
    expected = dict(places_of(masks, Constraint(masks, compiled, one_by_one=one_by_one), ids, 0))
    found = dict(places_of(masks, Constraint(masks, compiled, one_by_one=one_by_one), ids, most))
    found.pop(tuple(ids), None)  # behind the whole answer, where it could go on
    forced = {where: each for where, each in found.items() if where not in expected}
    assert all(each == {ids[len(where)]} for where, each in forced.items())
    assert {where: each for where, each in found.items() if where in expected} == expected
    if one_by_one:
        assert not forced


def test_a_draft_is_looked_at_up_to_what_may_not_come(compiler: GrammarCompiler, masks: MaskMaker) -> None:
    constraint = ready(masks, Constraint(masks, made(compiler, Grammar.regex("[ab]{4}!?"))))
    a, b, z = (encode(text)[0] for text in "abz")
    own = PADDED + 3  # of an adapter whose vocabulary is larger
    drafts = ((a, b, z, a), 2), ((z,), 0), ((a, own, a), 1), ((own,), 0), ((a, b, a, b, END_OF_TURN, a), 4)
    for draft, num_known in (*drafts, ((a, b, a, b), 4)):
        constraint.look(draft)
        assert not constraint.may_look
        assert len(ready(masks, constraint).ahead) == num_known, draft
    constraint.advance([a, b, a])
    assert not constraint.ahead
    assert allowed(ready(masks, constraint)) >= {a, b}


def test_a_draft_that_takes_too_long_to_look_at_is_given_up_and_not_its_sequence(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = MaskMaker(EOS)
    stuck = threading.Event()
    compiled = made(compiler, Grammar.regex("[ab]{4}!"))
    constraint = ready(masks, Constraint(masks, compiled))
    a = encode("a")[0]
    constraint.advance([a])
    ready(masks, constraint)

    def spin(*_: object) -> object:
        while not stuck.is_set():
            pass
        raise AssertionError

    monkeypatch.setattr(masks_module, "_look", spin)
    monkeypatch.setattr(masks_module, "MAX_MASK_S", 0.02)
    constraint.look((a, a))
    assert not ready(masks, constraint).ahead
    monkeypatch.undo()
    stuck.set()
    assert constraint.error is None
    assert not compiled.is_given_up
    assert not constraint.may_look, "it is not tried again"
    constraint.advance([a, a, a])
    assert TOKENIZER.decode(ready(masks, constraint).forced) == "!"
    masks.close()


@pytest.mark.parametrize("fails", ["at once", "never"])
def test_a_sequence_whose_mask_fails_keeps_its_error_whatever_is_looked_at(
    fails: str, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft is looked at behind the mask that fails, or that takes so long that its thread is given up."""
    masks = MaskMaker(EOS)
    constraint = ready(masks, Constraint(masks, made(compiler, Grammar.regex("[ab]{5}!"))))
    a = encode("a")[0]
    may_fail, is_over = threading.Event(), threading.Event()

    def failing(*_: object) -> object:
        may_fail.wait(PATIENCE_S)
        while fails == "never" and not is_over.is_set():
            pass
        raise masks_module._Fault("too many states")

    monkeypatch.setattr(masks_module, "_mask", failing)
    monkeypatch.setattr(masks_module, "MAX_MASK_S", 0.02)
    constraint.advance([a])
    masks.wait_settled([constraint], PATIENCE_S)
    assert constraint.may_look
    constraint.look((a, a))
    may_fail.set()
    assert isinstance(ready(masks, constraint).error, InvalidGrammar)
    is_over.set()
    other = ready(masks, Constraint(masks, made(compiler, Grammar.regex("[ab]{6}"))))
    assert other.error is not None, "behind it all that was queued has been done"
    assert isinstance(constraint.error, InvalidGrammar)
    assert constraint.is_decided
    masks.close()


def test_a_thread_that_was_given_up_changes_nothing_any_more(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = MaskMaker(EOS)
    constraint = ready(masks, Constraint(masks, made(compiler, Grammar.regex("[ab]{4}[?]"))))
    a, b = (encode(text)[0] for text in "ab")
    may_fail, has_failed = threading.Event(), threading.Event()

    def stuck(way: Any, *_: object) -> object:
        while not may_fail.is_set():
            pass
        way.matcher, way.taken = None, [b, b, b, b, b]
        has_failed.set()
        raise AssertionError

    monkeypatch.setattr(masks_module, "_look", stuck)
    monkeypatch.setattr(masks_module, "MAX_MASK_S", 0.02)
    constraint.look((a, a))
    ready(masks, constraint)
    monkeypatch.undo()
    may_fail.set()
    assert has_failed.wait(PATIENCE_S)
    assert not constraint.may_look
    for _ in range(3):
        constraint.advance([a])
        assert allowed(ready(masks, constraint)) >= {a, b}
    constraint.advance([a])
    assert TOKENIZER.decode(ready(masks, constraint).forced) == "?"
    masks.close()
