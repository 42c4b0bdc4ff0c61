"""What an adapter says of the requests that name it: which fields it completes, which it locks, what it may say."""

import asyncio
import json
from typing import Any

import pytest

from manylora.api.defaults import FIELDS, MAX_SYSTEM_PROMPT, check
from manylora.api.structured import ANSWER_FIELDS
from manylora.chat.format import ChatFormat
from manylora.engine.interface import Grammar
from manylora.errors import InvalidAdapter, InvalidGrammar

from .conftest import Rig
from .fakes import VOCAB_SIZE, FakeCompiled
from .test_fields import REACH

CHOICES = ["yes", "no"]
SCHEMA = {"type": "object"}


def says(rig: Rig, **defaults: Any) -> None:
    rig.directory.defaults["alpha@1"] = json.dumps(defaults)


def params(rig: Rig) -> Any:
    return rig.engine.generations[-1].params


# completing requests

SET = [each for each in REACH if each[0] in FIELDS]


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize(("name", "value", "param", "expected"), SET)
def test_every_field_reaches_the_engine_as_one_of_a_request_does(
    rig: Rig, route: str, name: str, value: Any, param: str, expected: Any
) -> None:
    says(rig, **{name: value})
    assert getattr(rig, route)(model="alpha").status_code == 200
    assert getattr(params(rig), param) == expected
    assert getattr(rig, route)(model="base-model").status_code == 200
    assert getattr(rig, route)(model="alpha@2").status_code == 200
    plain = [g.params for g in rig.engine.generations[1:]]
    assert plain[0] == plain[1], "the base and another version say nothing"


def test_every_field_that_can_be_a_default_is_covered_here() -> None:
    elsewhere = {"system_prompt", "chat_template", "choices", "pooling", "truncate_prompt_tokens", *ANSWER_FIELDS}
    assert set(FIELDS) == {each[0] for each in SET} | elsewhere


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_a_requests_own_field_comes_first(rig: Rig, route: str) -> None:
    says(rig, temperature=0.2, stop=["x"], max_tokens=7, top_k=3)
    getattr(rig, route)(model="alpha", temperature=0.9, stop="y", max_tokens=5)
    found = params(rig)
    assert (found.temperature, found.stop, found.max_tokens, found.top_k) == (0.9, ("y",), 5, 3)
    getattr(rig, route)(model="alpha", temperature=None)
    assert (params(rig).temperature, params(rig).max_tokens) == (0.2, 7)


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_choices_hold_the_answer_on_every_route(rig: Rig, route: str) -> None:
    says(rig, choices=CHOICES)
    getattr(rig, route)(model="alpha")
    assert params(rig).grammar == FakeCompiled(Grammar.choice(CHOICES))
    getattr(rig, route)(model="alpha", response_format={"type": "text"})
    assert params(rig).grammar == FakeCompiled(Grammar.choice(CHOICES)), "it asks for nothing"
    getattr(rig, route)(model="alpha", guided_regex="a+")
    assert params(rig).grammar == FakeCompiled(Grammar.regex("a+")), "a request's own takes the place of all"


def test_a_schema_may_be_the_default(rig: Rig) -> None:
    says(rig, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}})
    rig.chat(model="alpha")
    assert params(rig).grammar == FakeCompiled(Grammar.json_schema(SCHEMA))


def test_the_default_length_is_no_longer_than_the_context_has_room_for(rig: Rig) -> None:
    says(rig, max_tokens=250)
    assert rig.complete(model="alpha", prompt="x" * 99).status_code == 200
    assert params(rig).max_tokens == 256 - 100
    assert rig.complete(model="alpha", prompt="x").status_code == 200
    assert params(rig).max_tokens == 250


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "hi")], "[system]Be brief.[user]hi[assistant]"),
        ([("system", "Sing."), ("user", "hi")], "[system]Sing.[user]hi[assistant]"),
        ([("developer", "Sing."), ("user", "hi")], "[system]Sing.[user]hi[assistant]"),
    ],
)
def test_the_system_prompt_is_put_before_chats_without_one(
    rig: Rig, messages: list[tuple[str, str]], expected: str
) -> None:
    says(rig, system_prompt="Be brief.")
    rig.chat(model="alpha", messages=[{"role": role, "content": content} for role, content in messages])
    assert rig.engine.codec.decode(rig.engine.generations[0].prompt_ids) == expected


def test_a_template_stands_in_for_the_bases(rig: Rig) -> None:
    says(rig, chat_template="{{ mine }}", system_prompt="Be brief.")
    rig.chat(model="alpha")
    rig.chat(model="alpha@2")
    rig.client.post("/tokenize", json={"model": "alpha", "messages": [{"role": "user", "content": "hi"}]})
    rig.client.post("/tokenize", json={"model": "base-model", "messages": [{"role": "user", "content": "hi"}]})
    templates = [options.template for _, options in rig.engine.codec.rendered]
    assert templates == ["{{ mine }}", None, "{{ mine }}", None]


def test_a_requests_own_template_is_taken_only_where_the_server_says_so(settings: Any) -> None:
    for allowed in (False, True):
        rig = Rig(settings.model_copy(update={"allow_request_chat_template": allowed, "max_body": 2**20}))
        assert rig.chat(chat_template=None).status_code == 200
        answer = rig.chat(chat_template="{{ own }}")
        assert answer.status_code == (200 if allowed else 400)
    assert [options.template for _, options in rig.engine.codec.rendered] == [None, "{{ own }}"]
    says(rig, chat_template="{{ mine }}", locked=["chat_template"])
    assert rig.chat(model="alpha", chat_template="{{ mine }}").status_code == 200
    assert rig.chat(model="alpha", chat_template="{{ own }}").json()["error"]["param"] == "chat_template"
    answer = rig.chat(chat_template="x" * 65_537)
    assert answer.json()["error"]["param"] == "chat_template"


def test_embeddings_are_pooled_as_the_adapter_says(rig: Rig) -> None:
    says(rig, pooling="mean", temperature=0.1)
    for body, pooling in (({"model": "alpha"}, "mean"), ({"model": "alpha", "pooling": "last"}, "last")):
        assert rig.client.post("/v1/embeddings", json={"input": "hi", **body}).status_code == 200
        assert params(rig).pooling == pooling


def test_texts_are_held_against_each_other_as_the_adapter_pools_them(rig: Rig) -> None:
    says(rig, pooling="mean", locked=["pooling"])
    for path, body in (
        ("/v1/score", {"text_1": "hi", "text_2": "you"}),
        ("/v1/rerank", {"query": "hi", "documents": ["you"]}),
    ):
        for model, pooling in (("base-model", "last"), ("alpha", "mean")):
            assert rig.client.post(path, json={"model": model, **body}).status_code == 200
            assert params(rig).pooling == pooling


@pytest.mark.parametrize(
    ("name", "said", "own", "param", "expected"),
    [
        ("include_stop_str_in_output", True, False, "include_stop", False),
        ("bad_words", ["x"], [], "bad_words", ()),
        ("allowed_token_ids", [5], [], "allowed_token_ids", ()),
    ],
)
def test_a_request_may_ask_for_nothing_where_the_adapter_asks_for_something(
    rig: Rig, name: str, said: Any, own: Any, param: str, expected: Any
) -> None:
    says(rig, **{name: said})
    rig.complete(model="alpha")
    assert getattr(params(rig), param)
    rig.complete(model="alpha", **{name: own})
    assert getattr(params(rig), param) == expected
    says(rig, **{name: said}, locked=[name])
    assert rig.complete(model="alpha", **{name: own}).json()["error"]["param"] == name


def test_a_chat_is_counted_with_its_system_prompt(rig: Rig) -> None:
    says(rig, system_prompt="Be brief.")
    for messages in ([{"role": "user", "content": "hi"}], [{"role": "system", "content": "x"}]):
        rig.chat(model="alpha", messages=messages)
        tokens = rig.client.post("/tokenize", json={"model": "alpha", "messages": messages}).json()["tokens"]
        assert tokens == list(rig.engine.generations[-1].prompt_ids)


# locked fields

LOCKED = [
    ({"temperature": 0.0}, {"temperature": 0}, {"temperature": 0.1}, "temperature"),
    ({"stop": ["a"]}, {"stop": "a"}, {"stop": ["a", "b"]}, "stop"),
    ({"max_tokens": 5}, {"max_tokens": 5}, {"max_tokens": 6}, "max_tokens"),
    ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_completion_tokens": 4}, "max_completion_tokens"),
    ({"choices": CHOICES}, {"guided_choice": CHOICES}, {"guided_choice": ["yes"]}, "guided_choice"),
    ({"choices": CHOICES}, {"structured_outputs": {"choice": CHOICES}}, {"guided_regex": "yes|no"}, "guided_regex"),
    (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}},
        "response_format",
    ),
]


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize(("defaults", "same", "other", "param"), LOCKED, ids=lambda value: None)
def test_a_locked_field_may_be_repeated_and_not_changed(
    rig: Rig, route: str, defaults: dict[str, Any], same: dict[str, Any], other: dict[str, Any], param: str
) -> None:
    says(rig, **defaults, locked=list(defaults))
    assert getattr(rig, route)(model="alpha", **same).status_code == 200
    assert getattr(rig, route)(model="alpha").status_code == 200
    refused = getattr(rig, route)(model="alpha", **other)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert "alpha@1" in refused.json()["error"]["message"]
    assert getattr(rig, route)(model="base-model", **other).status_code == 200


def test_a_locked_system_prompt_keeps_out_others(rig: Rig) -> None:
    says(rig, system_prompt="Be brief.", locked=["system_prompt"])
    user = {"role": "user", "content": "hi"}
    assert rig.chat(model="alpha", messages=[{"role": "system", "content": "Be brief."}, user]).status_code == 200
    refused = rig.chat(model="alpha", messages=[{"role": "system", "content": "Sing."}, user])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_locked_pooling_cannot_be_changed(rig: Rig) -> None:
    says(rig, pooling="mean", locked=["pooling"])
    answers = [
        rig.client.post("/v1/embeddings", json={"model": "alpha", "input": "hi", "pooling": how}).status_code
        for how in ("mean", "last")
    ]
    assert answers == [200, 400]


def test_who_locks_the_answers_look_is_called_no_tools(rig: Rig) -> None:
    rig.engine.codec.form = ChatFormat(takes_tools=True, syntax="hermes")
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    says(rig, choices=CHOICES, locked=["choices"])
    for asked, param in (
        ({"tools": [tool], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [strict]}, "tools"),
    ):
        refused = rig.chat(model="alpha", **asked)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert rig.chat(model="alpha", tools=[tool]).status_code == 200
    assert params(rig).grammar == FakeCompiled(Grammar.choice(CHOICES))
    says(rig, choices=CHOICES)
    assert rig.chat(model="alpha", tools=[tool], tool_choice="required").status_code == 200
    assert params(rig).grammar.grammar.kind == "tool_calls", "a request's own comes first"


# what may be said


def checked(rig: Rig, **defaults: Any) -> list[tuple[str, str]]:
    """Where something is wrong, and what."""
    try:
        asyncio.run(check(rig.engine, defaults, "acme"))
    except InvalidAdapter as error:
        return [(problem.where, problem.message) for problem in error.problems if problem.code == "bad_defaults"]
    return []


def test_everything_that_is_wrong_is_said_at_once(rig: Rig) -> None:
    found = checked(
        rig, temperature=9, stop=[1], stop_token_ids=[VOCAB_SIZE], choices=[], made_up=1, pooling="max",
        locked=["top_p"], system_prompt="", n=3,
    )  # fmt: skip
    assert [where for where, _ in found] == [
        "temperature", "stop", "stop_token_ids", "choices", "made_up", "pooling", "locked", "system_prompt", "n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("defaults", "where"),
    [
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"choices": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"system_prompt": "x" * (MAX_SYSTEM_PROMPT + 1)}, "system_prompt"),
        ({"locked": "temperature", "temperature": 1}, "locked"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"choices": ["a"], "guided_choice": ["b"]}, "guided_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_what_does_not_go_is_refused_by_its_place(rig: Rig, defaults: dict[str, Any], where: str) -> None:
    [(found, _)] = checked(rig, **defaults)
    assert found == where


@pytest.mark.parametrize(
    "defaults",
    [
        {},
        {"temperature": 0, "choices": CHOICES, "locked": ["choices", "temperature"]},
        {"response_format": {"type": "json_object"}, "max_tokens": 50, "system_prompt": "Be brief.", "top_p": None},
        {"pooling": "mean", "logit_bias": {"5": 1}},
    ],
)
def test_what_goes_is_taken_with_its_grammar_made_ready(rig: Rig, defaults: dict[str, Any]) -> None:
    assert checked(rig, **defaults) == []
    assert len(rig.engine.compiled) == any(name in defaults for name in ("choices", "response_format"))


def test_a_grammar_that_cannot_be_followed_is_refused(rig: Rig) -> None:
    rig.engine.refuse_grammar = InvalidGrammar("too hard")
    assert checked(rig, choices=CHOICES) == [("choices", "too hard")]
    assert checked(rig, guided_regex="a") == [("guided_regex", "too hard")]
