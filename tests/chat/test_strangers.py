"""Templates of strangers: rendered as transformers renders them, and bounded whatever they are."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from manylora.chat.format import ChatOptions
from manylora.chat.render_process import MAX_RENDERED_CHARACTERS
from manylora.errors import InvalidRequest
from manylora.models.codec import HuggingFaceCodec
from tests.tiny_models import make_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '1 < 2 & "é"你\ud800'},
    {"role": "assistant", "content": "Yes.", "name": None},
    {"role": "user", "content": "Why?"},
]
TURNS = (
    "{{ bos_token }}{%- for m in messages %}\n<{{ m.role }}>\n{{- m['content'] | trim | tojson }}\n"
    "{%- if m.name is defined %}name{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{{ documents }}{{ mood }}"
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    "{% generation %}{% if add_generation_prompt %}<assistant>{% endif %}{% endgeneration %}"
)
NINES = "{% for _ in range(99999) %}"
LOOP = f"{NINES * 3}{'{% endfor %}' * 3}"
HOSTILE = {
    "loop": LOOP + "{% for m in messages %}{{ m.content }}{% endfor %}",
    "memory": "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    "{{ ns.x }}",
    "constant": "{{ 'a' * 10 ** 9 }}{{ messages[0].content }}",
    "power": "{{ 9 ** (9 ** 9) }}{{ messages[0].content }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for m in messages %}",
    "refusal": "{{ raise_exception('not with me') }}",
    "long": "{{ 'a' * 5000000 }}{{ messages[0].content }}",
    "file": "{% include '/etc/passwd' %}",
}


@pytest.fixture(scope="module")
def codec() -> Iterator[HuggingFaceCodec]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}base{{ m.content }}{% endfor %}"
    codec = HuggingFaceCodec(tokenizer, [])
    yield codec
    codec.close()


@pytest.mark.parametrize("more", [{}, {"for_answer": False}, {"continue_final": True}])
def test_it_is_rendered_as_a_bases_own_would_be(codec: HuggingFaceCodec, more: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    options = {"tools": [tool], "documents": [{"title": "a"}], "variables": {"mood": ["x", None]}, **more}

    ours = codec.render_chat(CHAT, ChatOptions(template=TURNS, **options))

    assert ours == HuggingFaceCodec(tokenizer, []).render_chat(CHAT, ChatOptions(**options))
    assert "Why?" in ours


def test_what_it_takes_is_found_out_by_trying(codec: HuggingFaceCodec) -> None:
    found = codec.chat_format("{% if tools %}{{ tools | tojson }}{% endif %}<tool_call>{{ messages[0].content }}")
    assert (found.takes_tools, found.tells_tools, found.syntax) == (True, False, "hermes")
    assert not codec.chat_format().takes_tools


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_it_does_ends_in_a_refusal(codec: HuggingFaceCodec, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        codec.render_chat(CHAT, ChatOptions(template=HOSTILE[name]))
    assert refused.value.param == "messages"
    assert len(refused.value.message) < 400
    wanted = {"loop": "time", "memory": "", "refusal": "not with me", "long": str(MAX_RENDERED_CHARACTERS)}
    assert wanted.get(name, "") in refused.value.message
    assert codec.render_chat(CHAT[3:], ChatOptions(template="{{ messages[0].content }}")) == "Why?"


def test_one_of_another_message_is_a_refusal_too(codec: HuggingFaceCodec) -> None:
    with pytest.raises(InvalidRequest, match=r"leaves out 'messages\[1\]'"):
        codec.render_chat(CHAT, ChatOptions(template="{{ messages[0].content }}"))


def test_many_threads_at_once_get_what_is_theirs(codec: HuggingFaceCodec) -> None:
    def render(number: int) -> str:
        chat = [{"role": "user", "content": f"hello {number}"}]
        return codec.render_chat(chat, ChatOptions(template=f"{number}:{{{{ messages[0].content }}}}"))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(12))) == [f"{number}:hello {number}" for number in range(12)]


def _renderers() -> set[psutil.Process]:
    children = psutil.Process().children()
    return {each for each in children if "manylora.chat.render_process" in " ".join(each.cmdline())}


def test_its_process_starts_again_and_ends_when_it_is_closed() -> None:
    before = _renderers()
    codec = HuggingFaceCodec(make_tokenizer(), [])
    options = ChatOptions(template="{{ messages[0].content }}")
    assert codec.render_chat(CHAT[3:], options) == "Why?"
    for child in _renderers() - before:
        child.kill()
        child.wait()
    assert codec.render_chat(CHAT[3:], options) == "Why?"
    closing = threading.Thread(target=codec.close)
    closing.start()
    closing.join()
    assert _renderers() <= before
    assert codec.render_chat(CHAT[3:], options) == "Why?"
    codec.close()
    assert _renderers() <= before
