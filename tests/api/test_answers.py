"""The bodies: texts, numbering, usage, finish reasons, log-probabilities, echo."""

from collections.abc import Sequence
from typing import Any

import pytest

from manylora.engine.interface import FinishReason
from manylora.errors import AdapterLoadFailed

from .conftest import Rig


def test_a_completion_has_openais_shape(rig: Rig) -> None:
    body = rig.complete(max_tokens=3).json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage", "manylora"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "base-model")
    assert body["choices"] == [{"index": 0, "text": "The", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_chat_completion_has_openais_shape(rig: Rig) -> None:
    body = rig.chat(max_tokens=3).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "The", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]


def test_stopping_by_itself_is_told_from_running_out_of_tokens(rig: Rig) -> None:
    assert rig.complete(stop=" quick").json()["choices"][0] == {
        "index": 0,
        "text": "The",
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(rig: Rig) -> None:
    body = rig.complete(prompt=["a", "bb", "ccc"], n=2, max_tokens=1, echo=True).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(
        enumerate(["aT", "aT", "bbT", "bbT", "cccT", "cccT"])
    )
    assert body["usage"]["prompt_tokens"] == 2 + 3 + 4, "each prompt once, however many choices it has"
    assert body["usage"]["completion_tokens"] == 6
    assert [g.params.n for g in rig.engine.generations] == [2, 2, 2]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("ab", [[0, 97, 98]]), ([97, 98], [[97, 98]]), ([[97], [98]], [[97], [98]]), (["a", "b"], [[0, 97], [0, 98]])],
)
def test_every_form_of_prompt_reaches_the_engine(rig: Rig, prompt: Any, expected: list[list[int]]) -> None:
    assert rig.complete(prompt=prompt).status_code == 200
    assert [list(g.prompt_ids) for g in rig.engine.generations] == expected


def test_a_long_prompt_is_tokenised_elsewhere_with_the_same_result(rig: Rig) -> None:
    rig.engine.context_length = 100_000
    assert rig.complete(prompt="x" * 20_000).json()["usage"]["prompt_tokens"] == 20_001
    long_chat = [{"role": "user", "content": "x" * 20_000}]
    assert rig.chat(messages=long_chat, max_tokens=1).json()["usage"]["prompt_tokens"] > 20_000


def test_messages_reach_the_template_with_their_parts_joined(rig: Rig) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rig.chat(messages=[{"role": "developer", "content": "rules"}, {"role": "user", "content": parts}])
    ids = rig.engine.generations[0].prompt_ids
    assert rig.engine.codec.decode(ids) == "[system]rules[user]ab[assistant]"


def test_echo_repeats_token_ids_as_text(rig: Rig) -> None:
    assert rig.complete(prompt=[0, 97], echo=True, max_tokens=1).json()["choices"][0]["text"] == "<s>aT"


def test_completion_logprobs_have_openais_shape(rig: Rig) -> None:
    logprobs = rig.complete(max_tokens=2, logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["T", "h"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"T": -0.5, "U": -1.5}, {"h": -0.5, "i": -1.5}],
        "text_offset": [0, 1],
    }


def test_logprobs_zero_reports_the_chosen_token_alone(rig: Rig) -> None:
    logprobs = rig.complete(max_tokens=1, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"T": -0.5}]


def test_echo_with_logprobs_covers_the_prompt(rig: Rig) -> None:
    choice = rig.complete(prompt="hé", max_tokens=1, logprobs=1, echo=True).json()["choices"][0]
    assert choice["text"] == "héT"
    assert choice["logprobs"] == {
        "tokens": ["<s>", "h", "é", "T"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"h": -0.5}, {"é": -0.5}, {"T": -0.5}],
        "text_offset": [0, 0, 1, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_an_answer(rig: Rig, stream: bool) -> None:
    answer = rig.complete(prompt="hé", max_tokens=0, logprobs=0, echo=True, stream=stream)
    body = events(answer.text)[-1] if stream else answer.json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hé", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "h", "é"]
    assert body["manylora"]["adapter"] is None
    assert stream or body["usage"]["completion_tokens"] == 0


def backwards(indices: range) -> Sequence[int]:
    return indices[::-1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_waits_for_the_prompts_logprobs_when_another_choice_is_first(rig: Rig, stream: bool) -> None:
    rig.engine.choice_order = backwards
    body = {"prompt": "x", "n": 3, "max_tokens": 2, "logprobs": 0, "echo": True}
    if stream:
        choices = collect(rig.complete(**body, stream=True).text)
    else:
        choices = {c["index"]: (c["text"], c["logprobs"]["tokens"]) for c in rig.complete(**body).json()["choices"]}
    assert choices == {i: ("xTh", ["<s>", "x", "T", "h"]) for i in range(3)}


def collect(text: str) -> dict[int, tuple[str, list[str]]]:
    choices: dict[int, tuple[str, list[str]]] = {}
    for event in events(text):
        for choice in event["choices"]:
            before, tokens = choices.get(choice["index"], ("", []))
            choices[choice["index"]] = before + choice["text"], tokens + choice["logprobs"]["tokens"]
    return choices


def events(text: str) -> list[dict[str, Any]]:
    """The data events of a stream but `[DONE]`, which must be there."""
    import orjson

    *data, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [orjson.loads(line.removeprefix("data: ")) for line in data]


def test_offsets_count_characters_even_where_a_token_splits_one(rig: Rig) -> None:
    rig.engine.ids = (97, 900, 901, 902, 98)  # a你b, one token for each byte of 你
    choice = rig.complete(logprobs=0).json()["choices"][0]
    assert choice["text"] == "a你b"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2]


def test_chat_logprobs_have_openais_shape(rig: Rig) -> None:
    rig.engine.text = "é"
    logprobs = rig.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    token = {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]}
    other = {"token": "ê", "logprob": -1.5, "bytes": [0xC3, 0xAA]}
    assert logprobs == {"content": [{**token, "top_logprobs": [token, other]}], "refusal": None}


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_an_engine_error_before_the_first_token_has_its_own_status(rig: Rig, route: str) -> None:
    rig.engine.error_at, rig.engine.error = 0, AdapterLoadFailed("The adapter's files are gone.")
    for stream in (False, True):
        answer = getattr(rig, route)(stream=stream)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "adapter_load_failed"
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("reason", "status", "code"), [(FinishReason.ABORTED, 503, "draining"), (FinishReason.ERROR, 500, "internal_error")]
)
def test_an_answer_that_the_engine_broke_off_is_an_error(
    rig: Rig, reason: FinishReason, status: int, code: str
) -> None:
    rig.engine.last_reason = reason
    answer = rig.complete()
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_the_slowest_of_several_prompts_gives_the_times(rig: Rig) -> None:
    body = rig.complete(prompt=["a", "b"], model="alpha").json()
    assert body["manylora"]["queue_ms"] == 1.5
    assert body["manylora"]["load_tier"] == "host"
