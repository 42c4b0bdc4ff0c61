"""A template is asked how it reads messages, and a chat of which it would leave something out is refused."""

from typing import Any

import pytest

from manylora.errors import InvalidRequest
from manylora.models.chat_template import ChatTemplate
from manylora.models.codec import HuggingFaceCodec
from tests.tiny_models import make_tokenizer

STRING = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][0]['text'] }}{% endfor %}"
EITHER = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
SYSTEM_AS_STRING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'system' %}{{ m['content'] | trim }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
STRICT_PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('parts, please') }}{% endif %}"
    "[{{ m['role'] }}]{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
)
SYSTEM_FIRST_ONLY = (
    "{% if messages[0]['role'] == 'system' %}[system]{{ messages[0]['content'] }}{% endif %}"
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "more"},
]


def template(source: str | None) -> ChatTemplate:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    "source", [STRING, PARTS, FIRST_PART, EITHER, SYSTEM_AS_STRING, STRICT_PARTS, SYSTEM_FIRST_ONLY]
)
def test_every_form_of_template_gets_the_form_that_it_reads(source: str) -> None:
    assert template(source).render(CHAT) == "[system]be brief[user]hi[assistant]yes?[user]more"


def test_a_question_reaches_a_model_whose_template_reads_parts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PARTS
    codec = HuggingFaceCodec(tokenizer, [])

    assert codec.decode(codec.chat([{"role": "user", "content": "How do I kill a process?"}])).endswith("a process?")


@pytest.mark.parametrize(
    ("source", "messages", "number"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]{% endfor %}", CHAT[1:2], 0),
        ("{% for m in messages %}{{ m['text'] }}{% endfor %}", CHAT[1:2], 0),
        (SYSTEM_FIRST_ONLY, [CHAT[1], CHAT[0], CHAT[1]], 1),
        (SYSTEM_FIRST_ONLY, [CHAT[1], {"role": "tool", "content": "42", "tool_call_id": "1"}], 1),
        ("{{ messages[-1]['content'] }}", CHAT, 0),
    ],
)
def test_a_chat_of_which_something_would_be_left_out_is_refused(
    source: str, messages: list[dict[str, Any]], number: int
) -> None:
    with pytest.raises(InvalidRequest, match="leaves out") as refused:
        template(source).render(messages)

    assert refused.value.param == f"messages[{number}]"


def test_content_that_a_template_changes_or_cuts_is_the_templates_business() -> None:
    source = "{% for m in messages %}{{ m['content'].split('</think>')[-1] | trim | upper }}{% endfor %}"

    with pytest.raises(InvalidRequest):  # markers in capitals are not known
        template(source).render(CHAT)
    cutting = template(source.replace(" | upper", ""))
    assert cutting.render([{"role": "assistant", "content": "<think>hm</think> yes "}]) == "yes"


def test_a_template_refuses_with_its_own_words_and_not_with_all_of_the_callers() -> None:
    source = "{{ raise_exception('no ' ~ messages[0]['content']) }}"

    with pytest.raises(InvalidRequest, match="refuses these messages: no probe0probe"):
        template(source).render(CHAT)
    late = template("{% if 'x' in messages[0]['content'] %}" + source + "{% endif %}{{ messages[0]['content'] }}")
    with pytest.raises(InvalidRequest) as refused:
        late.render([{"role": "user", "content": "x" * 100_000}])
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{{ [0] * 9 ** 9 ** 9 }}{{ x.y.z }}"][:2]
)
def test_a_template_may_fail_in_any_way(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        template(source).render(CHAT)


def test_the_start_says_what_is_wrong_with_tokenizer_and_template() -> None:
    tokenizer = make_tokenizer()
    codec = HuggingFaceCodec(tokenizer, [])
    assert codec.faults(codec.num_tokens) == []
    assert "rows up to" in codec.faults(codec.num_tokens - 1)[0]
    tokenizer.chat_template = None
    assert HuggingFaceCodec(tokenizer, []).faults(10**6) == []
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{% endfor %}"
    assert "leaves out" in HuggingFaceCodec(tokenizer, []).faults(10**6)[0]


def test_a_long_history_is_rendered_as_a_short_one() -> None:
    chat = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(2000)]

    assert template(PARTS).render(chat) == "".join(f"[{m['role']}]{m['content']}" for m in chat)
