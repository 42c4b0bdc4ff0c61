from pathlib import Path
from typing import Any

import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.data.encoding import Encoder, length_statistics
from tests.lifecycle.helpers import write_rows
from tests.tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def _dataset(tmp_path: Path, *rows: dict[str, Any]) -> Any:
    return read_dataset(write_rows(tmp_path / "a.jsonl", list(rows)))


def test_prompt_of_an_example_is_what_the_chat_template_builds_for_a_request(tmp_path: Path, tokenizer: Any) -> None:
    dataset = _dataset(tmp_path, {"prompt": "Where is it?", "completion": "here"})

    [one] = Encoder(tokenizer, max_length=512).encode(dataset, context_length=512)

    request = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is it?"}], add_generation_prompt=True, return_dict=False
    )
    assert list(one.prompt_ids) == request
    assert tokenizer.decode(one.ids[one.first_answer :]) == "here<|im_end|>"
    assert one.num_answer_tokens == len(one.ids) - len(request)


def test_every_assistant_turn_of_a_chat_is_learnt_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    dataset = _dataset(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})

    [one] = Encoder(tokenizer, max_length=512).encode(dataset, context_length=512)

    learnt = [token for token, is_answer in zip(one.ids, one.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(learnt) == "a1<|im_end|>a2<|im_end|>"
    assert tokenizer.decode(one.prompt_ids).endswith("q2<|im_end|>\n<|im_start|>assistant\n")


def test_only_the_last_answer_gets_an_end_of_text_that_its_template_does_not_write(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_start|>"  # as bases whose turns end with another token than their texts
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    dataset = _dataset(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})

    [one] = Encoder(tokenizer, max_length=512).encode(dataset, context_length=512)

    learnt = [token for token, is_answer in zip(one.ids, one.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(learnt) == "a1;a2;<|im_start|>"
    assert tokenizer.decode(one.ids) == "[user]q1;[assistant]a1;[user]q2;[assistant]a2;<|im_start|>"


def test_plain_rendering_is_prompt_completion_and_end_of_text(tmp_path: Path, tokenizer: Any) -> None:
    dataset = _dataset(tmp_path, {"prompt": "2+2=", "completion": " 4"})

    [one] = Encoder(tokenizer, render="plain", max_length=512).encode(dataset, context_length=512)

    assert tokenizer.decode(one.ids) == "2+2= 4<|im_end|>"
    assert list(one.prompt_ids) == tokenizer("2+2=")["input_ids"]


def test_instruction_goes_before_the_first_user_message(tmp_path: Path, tokenizer: Any) -> None:
    dataset = _dataset(tmp_path, {"text": "nice", "label": "good"})

    [one] = Encoder(tokenizer, instruction="Rate this.", max_length=512).encode(dataset, context_length=512)

    assert "<|im_start|>user\nRate this.\nnice<|im_end|>" in tokenizer.decode(one.prompt_ids)


def test_long_prompt_is_cut_on_the_left_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    dataset = _dataset(tmp_path, {"prompt": "x" * 300, "completion": "end"})

    encoded = Encoder(tokenizer, max_length=64).encode(dataset, context_length=2000)

    assert len(encoded[0]) == 64
    assert tokenizer.decode(encoded[0].ids).endswith("assistant\nend<|im_end|>")
    assert length_statistics(encoded).num_truncated == 1


def test_row_longer_than_the_model_is_refused_by_its_number(tmp_path: Path, tokenizer: Any) -> None:
    dataset = _dataset(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "x" * 900, "completion": "b"})

    with pytest.raises(InvalidRequest, match="row 2 has"):
        Encoder(tokenizer, max_length=64).encode(dataset, context_length=256)


def test_answer_that_does_not_fit_is_refused_by_its_number(tmp_path: Path, tokenizer: Any) -> None:
    dataset = _dataset(tmp_path, {"prompt": "a", "completion": "b" * 100})

    with pytest.raises(InvalidRequest, match="row 1's answer does not fit 32 tokens"):
        Encoder(tokenizer, max_length=32).encode(dataset, context_length=512)


def test_chat_rendering_without_a_template_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None

    with pytest.raises(InvalidRequest, match="no chat template"):
        Encoder(tokenizer, render="chat", max_length=32)


def test_a_template_that_reads_parts_gets_them_so_that_the_question_is_learnt_from(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    dataset = _dataset(tmp_path, {"prompt": "Where is it?", "completion": "here"})

    [one] = Encoder(tokenizer, max_length=512).encode(dataset, context_length=512)

    assert tokenizer.decode(one.prompt_ids) == "[user]Where is it?[assistant]"
