"""What a template takes beside messages, how calls of earlier turns are shown, and a base that knows no tools."""

import json
from typing import Any

import pytest

from manylora.chat.format import ChatFormat, ChatOptions, FormatOverrides, syntax_of
from manylora.chat.pieces import Arguments, CallStart, Reasoning, Text
from manylora.errors import InvalidRequest
from manylora.models.chat_template import ChatTemplate
from manylora.models.codec import HuggingFaceCodec
from tests.tiny_models import make_tokenizer

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HERMES = (
    "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
MISTRAL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine, please') }}{% endif %}"
    "{{ c.function | tojson }}{{ c.id }}{% endfor %}{% else %}{{ m.content }}{{ m.tool_call_id }}"
    "{% endif %}{% endfor %}"
)
ONE_CALL = HERMES.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if (m.tool_calls or []) | length > 1 %}"
    "{{ raise_exception('one at a time') }}{% endif %}",
)
NO_CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
DOCUMENTS = "{% for d in documents or [] %}({{ d.title }}: {{ d.text }}){% endfor %}" + PLAIN


def call(name: str = "get_weather", call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"city": "Paris"}}}


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "How is Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [call()]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
]


def template(source: str | None, **more: Any) -> ChatTemplate:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, **more)


def test_tools_and_calls_are_shown() -> None:
    text = template(HERMES).render(CHAT, ChatOptions(tools=[TOOL]))

    assert text.startswith("[tools]{")
    assert '<tool_call>get_weather{"city": "Paris"}</tool_call>' in text
    assert text.endswith("[tool]sunny[assistant]")


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (HERMES, ChatFormat(takes_tools=True, syntax="hermes")),
        (MISTRAL, ChatFormat(takes_tools=True, syntax="mistral")),
        (PLAIN, ChatFormat()),
        (DOCUMENTS, ChatFormat(takes_documents=True)),
        (NO_CALLS, ChatFormat(takes_tools=True)),
        (HERMES + "{# </think> #}", ChatFormat(takes_tools=True, syntax="hermes", reasoning=("<think>", "</think>"))),
        (None, ChatFormat()),
    ],
)
def test_what_a_template_takes_is_found_out_by_trying(source: str | None, form: ChatFormat) -> None:
    found = template(source).format(None)

    fields = ("takes_tools", "tells_tools", "takes_documents", "reasoning", "syntax", "has_response_template")
    assert [getattr(found, name) for name in fields] == [getattr(form, name) for name in fields]


@pytest.mark.parametrize(
    ("source", "syntax"),
    [
        ("… <tool_call>{name: …}</tool_call> …", "hermes"),
        ("<tool_call><function=…>", None),
        ("<tool_call><function=…><parameter=…>", "qwen3_coder"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>name\n```json\n", "deepseek_v3"),
        ("<｜tool▁call▁begin｜>name<｜tool▁sep｜>{}", "deepseek_v31"),
        ("[TOOL_CALLS][", "mistral"),
        ("[TOOL_CALLS]name[ARGS]", "mistral_args"),
        ("{{ '\"parameters\": ' }} tool_call.arguments", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("plain", None),
    ],
)
def test_how_calls_are_written_is_told_from_the_template(source: str, syntax: str | None) -> None:
    assert syntax_of(source) == syntax


def test_what_is_told_comes_before_what_is_found_out() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = HERMES + "{# </think> #}"
    told = FormatOverrides(tool_parser="pythonic", reasoning_marks="<a> </a>")

    assert HuggingFaceCodec(tokenizer, [], told).chat_format().syntax == "pythonic"
    assert HuggingFaceCodec(tokenizer, [], told).chat_format().reasoning == ("<a>", "</a>")
    assert HuggingFaceCodec(tokenizer, [], FormatOverrides(reasoning_marks="none")).chat_format().reasoning is None


def test_calls_that_a_template_leaves_out_or_refuses_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"leaves out 'messages\[1\]'"):
        template(NO_CALLS).render(CHAT)
    twice = [CHAT[0], {**CHAT[1], "tool_calls": [call(), call()]}]
    assert template(HERMES).render(twice).count("<tool_call>") == 2
    with pytest.raises(InvalidRequest, match="one at a time"):
        template(ONE_CALL).render(twice)


def test_ids_become_what_the_template_insists_on() -> None:
    text = template(MISTRAL).render(CHAT, ChatOptions(tools=[TOOL]))

    [short] = {part[-9:] for part in (text, text[: text.rindex("sunny")])}
    assert short.isalnum()
    assert "call_1" not in text
    kept = [{**CHAT[1], "tool_calls": [call(call_id="abcdefghi")]}]
    assert template(MISTRAL).render(kept).endswith("abcdefghi")


def test_variables_reach_the_template_but_for_its_own() -> None:
    assert template(HERMES).render(CHAT, ChatOptions(variables={"enable_thinking": True})).endswith("<think>")
    for name in ("messages", "tokenize", "bos_token", "add_generation_prompt"):
        with pytest.raises(InvalidRequest) as refused:
            template(HERMES).render(CHAT, ChatOptions(variables={name: 1}))
        assert refused.value.param == f"chat_template_kwargs.{name}"


def test_documents_another_template_and_a_turn_that_is_not_begun() -> None:
    documents = [{"title": "A", "text": "B"}]
    assert template(DOCUMENTS).render(CHAT[:1], ChatOptions(documents=documents)).startswith("(A: B)[user]")
    assert template(PLAIN).render(CHAT[:1], ChatOptions(template=HERMES)).endswith("[assistant]")
    assert not template(HERMES).render(CHAT[:1], ChatOptions(for_answer=False)).endswith("[assistant]")


def test_a_base_without_tools_is_told_of_them_in_words() -> None:
    plain = template(PLAIN, with_tool_prompt=True)
    form = plain.format(None)
    assert (form.takes_tools, form.tells_tools, form.syntax) == (True, True, "hermes")

    text = plain.render([{"role": "system", "content": "Be brief."}, *CHAT], ChatOptions(tools=[TOOL]))
    assert text.startswith("[system]Be brief.\n\nYou can call functions.")
    assert '"name": "get_weather"' in text
    assert '[assistant]<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in text
    assert text.endswith("[user]<tool_response>\nsunny\n</tool_response>")
    assert plain.render(CHAT[:1]) == "[user]How is Paris?"
    assert not template(HERMES, with_tool_prompt=True).format(None).tells_tools


RESPONSE: dict[str, Any] = {
    "start_anchor": "[assistant]",
    "fields": {
        "content": {},
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


def response_reader(prompt: str = "[assistant]", *, only_one: bool = False) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = HERMES
    tokenizer.response_template = RESPONSE
    codec = HuggingFaceCodec(tokenizer, [])
    assert codec.chat_format().has_response_template
    return codec.response_reader(prompt, [TOOL], only_one=only_one)


def read(reader: Any, text: str) -> list[Any]:
    return [*reader.add(text), *reader.end()]


def test_a_tokenizers_own_rules_read_its_answers() -> None:
    called = json.dumps({"name": "get_weather", "arguments": {"city": "Paris"}})
    text = f"<think>\nHm.\n</think>\n I look. <call>{called}</call><call>{called}</call>"

    reasoning, said, first, arguments, second, _ = read(response_reader(), text)

    assert (reasoning, said) == (Reasoning("Hm."), Text("I look."))
    assert isinstance(first, CallStart)
    assert isinstance(second, CallStart)
    assert (first.index, first.name, second.index) == (0, "get_weather", 1)
    assert arguments == Arguments(0, '{"city": "Paris"}')
    assert len([p for p in read(response_reader(only_one=True), text) if isinstance(p, CallStart)]) == 1
    assert read(response_reader("[assistant]<think>"), "Hm.</think>Yes.") == [Reasoning("Hm."), Text("Yes.")]


@pytest.mark.parametrize("text", ["a <call>{oh", "a <call>oh</call> b", '<call>{"name": "other"}</call>'])
def test_what_its_rules_cannot_read_is_text(text: str) -> None:
    pieces = read(response_reader(), text)

    assert all(isinstance(piece, Text) for piece in pieces)
    assert ("oh" in text) == ("oh" in "".join(piece.text for piece in pieces))
