"""Grammars made ready: what is refused and how it is said, what a hostile one costs, what is kept and shared."""

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from manylora.chat.holding import CallRules, HeldTool
from manylora.children import Helper
from manylora.errors import InvalidGrammar, InvalidRequest, QueueFull, Unavailable
from manylora.grammars import compiler as module
from manylora.grammars.compiler import Compiled, GrammarCompiler, GrammarEvents
from manylora.grammars.grammar import MAX_GRAMMAR_BYTES, Grammar, Whitespace
from manylora.grammars.vocabulary import Vocabulary
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE, make_tokenizer

PATIENCE_S = 120


def vocabulary() -> Vocabulary:
    return Vocabulary(make_tokenizer().backend_tokenizer.to_str(), VOCAB_SIZE, (END_OF_TURN,))


def encode(text: str) -> list[int]:
    return list(make_tokenizer().encode(text, add_special_tokens=False))


class Heard(GrammarEvents):
    """What a compiler told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bool]] = []
        self.results: list[str] = []

    def on_request(self, kind: str, is_known: bool) -> None:
        self.requests.append((kind, is_known))

    def on_compile(self, seconds: float, result: str) -> None:
        assert seconds >= 0
        self.results.append(result)


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(vocabulary, encode, 2**28)
    yield compiler
    compiler.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def own(heard: Heard) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(vocabulary, encode, 2**20, heard)
    yield compiler
    compiler.close()


def made(compiler: GrammarCompiler, grammar: Grammar, tenant: str = "acme") -> Compiled:
    return compiler.compile(grammar, tenant).result(PATIENCE_S)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def calls_with(properties: dict[str, Any]) -> Grammar:
    """A call of a tool with these arguments."""
    tool = HeldTool("f", {"type": "object", "properties": properties, "required": list(properties)}, is_lenient=False)
    return CallRules([tool], must_call=True, only_one=True).grammar("hermes")


REFUSED = [
    (Grammar.json_schema({"type": "object", "properties": {"a": {"not": {}}}}), "'not'", ("not",)),
    (Grammar.json_schema({"type": "array", "uniqueItems": True, "contains": {}}), "'uniqueItems'", ("uniqueItems",)),
    (Grammar.json_schema({"if": {}, "then": {}}), "'if', 'then'", ("if", "then")),
    (Grammar.json_schema({"type": "string", "format": "path"}), "format: path", ("format",)),
    (Grammar.json_schema(False), "satisfies", ()),
    (Grammar.json_schema({"type": "string", "minLength": 3, "maxLength": 2}), "satisfies", ()),
    (Grammar.json_schema({"enum": []}), "satisfies", ()),
    (Grammar.json_schema({"$defs": {"t": {"$ref": "#/$defs/t"}}, "$ref": "#/$defs/t"}), "satisfies", ()),
    (Grammar.json_schema({"$ref": "http://example.com/schema"}), "http://example.com", ()),
    (Grammar.json_schema({"type": "animal"}), "animal", ()),
    (Grammar.json_schema([1]), "object or boolean", ()),
    (Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around", ()),
    (Grammar.regex("(?=a)b"), "look-around", ()),
    (Grammar.regex("("), "unclosed", ()),
    (calls_with({"limit": {"type": "array", "uniqueItems": True}}), "held to 'uniqueItems' of", ("uniqueItems",)),
    (calls_with({"a": {"type": "string", "format": "path"}}), "Unknown format: path. ", ("format",)),
    (calls_with({"a": False}), "No answer satisfies the schema: ", ()),
    (
        Grammar.structural_tag([{"begin": "<a>", "schema": {"not": {}}, "end": ""}], ["<a"]),
        "held to 'not' of",
        ("not",),
    ),
    (Grammar.grammar("start: nowhere"), "nowhere", ()),
    (Grammar.grammar("start: <|no_such_token|>"), "no_such_token", ()),
    (Grammar.grammar("root ::= ("), "Expected", ()),
    (Grammar.structural_tag([{"begin": "<a>", "schema": True, "end": ""}], ["<b"]), "none of the triggers", ()),
]


@pytest.mark.parametrize(("grammar", "said", "keys"), REFUSED, ids=lambda value: None)
def test_what_no_answer_can_be_held_to_is_refused_in_words(
    grammar: Grammar, said: str, keys: tuple[str, ...], shared: GrammarCompiler
) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        made(shared, grammar)
    assert said in refused.value.message
    assert set(refused.value.keys) >= set(keys)
    assert len(refused.value.message) < 600
    assert (refused.value.status, refused.value.code) == (400, "invalid_grammar")


# Without a process of their own, the first four would end the server's or keep a thread for ever.
HOSTILE = {
    "references": Grammar.json_schema(chain(5000)),
    "rules": Grammar.grammar("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"'),
    "optional letters": Grammar.regex("a?" * 20_000),
    "doubled": Grammar.regex("a" + "{2}" * 60),
    "a question of length": Grammar.regex("(a?){500}a{500}"),
    "the same in a schema": Grammar.json_schema({"type": "string", "pattern": "^(a?){500}a{500}$"}),
    "divisible": Grammar.json_schema({"type": "integer", "multipleOf": 999_983}),
    "properties": Grammar.json_schema({"type": "object", "properties": {f"k{i}": {} for i in range(9000)}}),
    "parentheses": Grammar.grammar("start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "groups": Grammar.regex("(" * 50_000 + "a" + ")" * 50_000),
    "a long text": Grammar.json_schema({"const": "x" * 200_000}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_ends_a_process_that_nobody_misses(name: str, shared: GrammarCompiler) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        made(shared, HOSTILE[name])
    assert "too" in refused.value.message
    assert made(shared, Grammar.choice([name])).grammar.kind == "choice"


TAKEN = [
    Grammar.json_schema(True),
    Grammar.json_schema(nested(20)),
    Grammar.json_schema({"enum": [f"number {i} of many" for i in range(5000)]}),
    Grammar.choice([f"number {i} of many" for i in range(5000)]),
    Grammar.json_schema({"type": "array", "uniqueItems": True, "items": {"format": "path"}}, is_lenient=True),
    Grammar.json_schema({"type": "object"}, Whitespace(is_none=True)),
    Grammar.json_schema({"type": "object"}, Whitespace(pattern=r"\t")),
    Grammar.json_schema(chain(50)),
    Grammar.structural_tag([{"begin": "<|im_start|>call", "schema": True, "end": "."}], ["<|im_start|>"]),
]


@pytest.mark.parametrize("grammar", TAKEN, ids=lambda value: None)
def test_what_can_be_followed_is_made_ready(grammar: Grammar, shared: GrammarCompiler) -> None:
    compiled = made(shared, grammar)
    assert not compiled.fault
    assert compiled.num_bytes > 0


def test_a_grammar_over_its_size_is_refused_at_once(shared: GrammarCompiler) -> None:
    with pytest.raises(InvalidGrammar, match=str(MAX_GRAMMAR_BYTES)):
        shared.compile(Grammar.regex("é" * MAX_GRAMMAR_BYTES), "acme")


def test_the_same_grammar_is_made_once_whoever_asks(own: GrammarCompiler, heard: Heard) -> None:
    first = own.compile(Grammar.choice(["a", "b"]), "acme")
    second = own.compile(Grammar.choice(["a", "b", "a"]), "bolt")
    assert first.result(PATIENCE_S) is second.result(PATIENCE_S)
    assert made(own, Grammar.choice(["a", "b"]), "third") is first.result()
    assert made(own, Grammar.regex("a|b")) is not first.result()
    assert heard.results == ["ok", "ok"]
    assert heard.requests == [("choice", False), ("choice", False), ("choice", True), ("regex", False)]


def test_a_refusal_is_remembered(own: GrammarCompiler, heard: Heard) -> None:
    for _ in range(3):
        with pytest.raises(InvalidGrammar, match="unclosed"):
            made(own, Grammar.regex("("))
    assert heard.results == ["refused"]


def test_grammars_leave_when_their_memory_is_used_up_the_longest_unused_first(
    own: GrammarCompiler, heard: Heard
) -> None:
    grammars = [Grammar.choice([f"{i}"]) for i in range(20)]
    for grammar in grammars:
        made(own, grammar)
        made(own, grammars[0])
    assert own.kept_bytes <= 2**20
    heard.requests.clear()
    made(own, grammars[0])
    made(own, grammars[-1])
    made(own, grammars[1])
    assert [is_known for _, is_known in heard.requests] == [True, True, False]


def test_a_tenant_waits_behind_itself_and_has_no_end_of_grammars_waiting(
    own: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    run = Helper.ask

    def held_back(self: Any, request: dict[str, Any]) -> Any:
        if request.get("source", "").startswith('["flood'):
            may_go_on.wait(PATIENCE_S)
        return run(self, request)

    monkeypatch.setattr(Helper, "ask", held_back)
    flood = [own.compile(Grammar.choice([f"flood{i}"]), "noisy") for i in range(module.MAX_GRAMMARS_WAITING)]
    with pytest.raises(QueueFull):
        own.compile(Grammar.choice(["one more"]), "noisy")
    assert made(own, Grammar.choice(["mine"]), "quiet")  # although the noisy one's are held back
    may_go_on.set()
    for future in flood:
        assert future.result(PATIENCE_S)
    assert made(own, Grammar.choice(["one more"]), "noisy")


def test_who_does_not_wait_any_more_takes_it_from_nobody(own: GrammarCompiler) -> None:
    first = own.compile(Grammar.choice(["shared"]), "acme")
    assert not first.cancel()
    assert own.compile(Grammar.choice(["shared"]), "bolt").result(PATIENCE_S)


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "manylora.grammars.trial" in " ".join(each.cmdline())]


def test_a_trial_that_was_killed_is_started_again_and_ends_with_the_compiler(heard: Heard) -> None:
    before = set(children())
    compiler = GrammarCompiler(vocabulary, encode, 2**20, heard)
    made(compiler, Grammar.choice(["a"]))
    mine = set(children()) - before
    assert len(mine) == 1
    for child in mine:
        child.kill()
        child.wait(PATIENCE_S)
    assert made(compiler, Grammar.choice(["b"]))
    compiler.close()
    deadline = time.monotonic() + PATIENCE_S
    while set(children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(children()) <= before


def test_where_grammars_cannot_be_tried_the_server_says_so(
    own: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(Unavailable):
        made(own, Grammar.choice(["a"]))
    monkeypatch.undo()
    assert made(own, Grammar.choice(["a"]))


@pytest.mark.parametrize(("tokenizer", "eos"), [(None, (2,)), ("{}", (2,)), (make_tokenizer().backend_tokenizer, ())])
def test_a_tokenizer_that_cannot_be_used_is_a_refusal(tokenizer: Any, eos: tuple[int, ...]) -> None:
    text = tokenizer if tokenizer is None or isinstance(tokenizer, str) else tokenizer.to_str()
    compiler = GrammarCompiler(lambda: Vocabulary(text, VOCAB_SIZE, eos), encode, 2**20)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        made(compiler, Grammar.choice(["a"]))
    compiler.close()
