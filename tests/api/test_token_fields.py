"""vLLM's fields about tokens: what each asks of the engine, and what an answer, whole or streamed, has of them."""

import asyncio
import json
from typing import Any

import httpx2
import pytest

from manylora.api.requests import MAX_ECHO_LOGPROBS, MAX_ENCODED_CHARACTERS, prompts_of
from manylora.api.schemas import DEFAULT_MAX_TOKENS, CompletionRequest
from manylora.engine.interface import SamplingParams
from manylora.errors import ContextLengthExceeded

from .conftest import Rig
from .fakes import BOS, FakeCodec

IDS = [ord(c) for c in "hi"]


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# token ids


def test_a_completion_tells_the_ids_of_prompt_and_answer_in_each_choice(rig: Rig) -> None:
    answer = rig.complete(prompt=["hi", "you"], n=2, max_tokens=3, return_token_ids=True).json()
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[BOS, *IDS]] * 2 + [
        [BOS, 121, 111, 117]
    ] * 2
    assert [choice["token_ids"] for choice in answer["choices"]] == [[ord(c) for c in "The"]] * 4


def test_a_chat_tells_the_ids_of_its_prompt_once(rig: Rig) -> None:
    answer = rig.chat(n=2, max_tokens=3, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == list(rig.engine.generations[0].prompt_ids)
    assert [choice["token_ids"] for choice in answer["choices"]] == [[ord(c) for c in "The"]] * 2
    assert "prompt_token_ids" not in answer["choices"][0]


def test_a_streamed_completion_tells_ids_as_they_come_and_the_prompts_first(rig: Rig) -> None:
    found = events(rig.complete(n=2, max_tokens=3, return_token_ids=True, stream=True))
    for index in range(2):
        mine = [choice for event in found for choice in event["choices"] if choice["index"] == index]
        assert [id_ for choice in mine for id_ in choice["token_ids"]] == [ord(c) for c in "The"]
        assert [choice.get("prompt_token_ids") for choice in mine] == [[BOS, *IDS], None, None]


def test_a_streamed_chat_tells_its_prompts_ids_with_the_role(rig: Rig) -> None:
    found = events(rig.chat(max_tokens=3, return_token_ids=True, stream=True))
    assert found[0]["prompt_token_ids"] == list(rig.engine.generations[0].prompt_ids)
    assert not any("prompt_token_ids" in event for event in found[1:])
    assert [id_ for event in found[1:] for id_ in event["choices"][0]["token_ids"]] == [ord(c) for c in "The"]


def test_ids_without_text_are_an_event_of_their_own(rig: Rig) -> None:
    rig.engine.ids = (900, 901, 902)  # three bytes of one character
    found = events(rig.complete(max_tokens=3, return_token_ids=True, stream=True))
    assert [(e["choices"][0]["text"], e["choices"][0]["token_ids"]) for e in found] == [
        ("", [900]),
        ("", [901]),
        ("你", [902]),
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_answers_that_were_not_asked_for_ids_have_none(rig: Rig, route: str, stream: bool) -> None:
    text = getattr(rig, route)(max_tokens=3, stream=stream).text
    assert not any(name in text for name in ("token_ids", "prompt_logprobs"))


# log-probabilities


def test_tokens_of_log_probabilities_may_be_written_as_ids(rig: Rig) -> None:
    chosen = rig.complete(max_tokens=1, logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert chosen["tokens"] == ["token_id:84"]
    assert chosen["top_logprobs"] == [{"token_id:84": -0.5}]
    assert chosen["text_offset"] == [0]
    [entry] = rig.chat(max_tokens=1, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True).json()["choices"][
        0
    ]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:84", [84])
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:84", "token_id:85"]


def place(token: int, *others: int) -> dict[str, Any]:
    told = {str(token): {"logprob": -0.5, "rank": 1, "decoded_token": chr(token)}}
    for rank, other in enumerate(others, 2):
        told[str(other)] = {"logprob": -0.5 - (rank - 1), "rank": rank, "decoded_token": chr(other)}
    return told


def test_a_completion_has_the_log_probabilities_of_its_prompt_in_each_choice(rig: Rig) -> None:
    answer = rig.complete(prompt=[IDS, IDS[:1]], n=2, max_tokens=1, prompt_logprobs=2).json()
    first, second = [None, place(105, 106)], [None]
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [first, first, second, second]
    assert answer["choices"][0]["logprobs"] is None


def test_a_chat_has_the_log_probabilities_of_its_prompt_once(rig: Rig) -> None:
    answer = rig.chat(n=2, max_tokens=1, prompt_logprobs=0).json()
    prompt = rig.engine.generations[0].prompt_ids
    assert answer["prompt_logprobs"] == [None, *(place(token) for token in prompt[1:])]


def test_echo_and_the_prompts_log_probabilities_each_have_as_many_as_were_asked_for(rig: Rig) -> None:
    [choice] = rig.complete(prompt=IDS, max_tokens=1, echo=True, logprobs=1, prompt_logprobs=3).json()["choices"]
    assert rig.engine.generations[0].params.prompt_logprobs == 3
    assert choice["prompt_logprobs"] == [None, place(105, 106, 107)]
    assert [len(top) if top else 0 for top in choice["logprobs"]["top_logprobs"]] == [0, 1, 1]


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_the_prompts_log_probabilities_are_not_streamed(rig: Rig, route: str) -> None:
    answer = getattr(rig, route)(prompt_logprobs=1, stream=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize(
    ("fields", "each"), [({"prompt_logprobs": 20}, 21), ({"return_token_ids": True}, 1), ({"prompt_logprobs": 0}, 1)]
)
def test_more_about_prompts_than_an_answer_holds_is_refused(rig: Rig, fields: dict[str, Any], each: int) -> None:
    rig.engine.context_length = 4096
    num_tokens = MAX_ECHO_LOGPROBS // (each * 128)
    prompts = [[1] * 4000] * (num_tokens // 4000) + [[1] * (num_tokens % 4000)]
    assert rig.complete(prompt=prompts, n=128, max_tokens=0, **fields).status_code == 200
    refused = rig.complete(prompt=[*prompts, [1]], n=128, max_tokens=0, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(fields)))


def test_special_tokens_that_are_shown_have_a_width(rig: Rig) -> None:
    rig.engine.ids = (84, BOS, 104)
    for skip, offsets in ((True, [0, 1, 1]), (False, [0, 1, 4])):
        answer = rig.complete(max_tokens=3, logprobs=0, skip_special_tokens=skip).json()
        assert answer["choices"][0]["logprobs"]["text_offset"] == offsets


# the prompt


@pytest.mark.parametrize(
    ("prompt", "fields", "ids"),
    [
        ("hello", {"truncate_prompt_tokens": 2}, [108, 111]),
        ("hello", {"truncate_prompt_tokens": 6}, [BOS, 104, 101, 108, 108, 111]),
        ("hello", {"truncate_prompt_tokens": 200}, [BOS, 104, 101, 108, 108, 111]),
        ([1, 2, 3], {"truncate_prompt_tokens": 2}, [2, 3]),
        ("hello", {"add_special_tokens": False}, [104, 101, 108, 108, 111]),
        ("hello", {"add_special_tokens": True}, [BOS, 104, 101, 108, 108, 111]),
        ([1, 2], {"add_special_tokens": False}, [1, 2]),
    ],
)
def test_what_is_kept_of_a_prompt(rig: Rig, prompt: Any, fields: dict[str, Any], ids: list[int]) -> None:
    answer = rig.complete(prompt=prompt, **fields)
    assert list(rig.engine.generations[0].prompt_ids) == ids
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)


def test_a_chat_gets_special_tokens_where_it_asks_for_them(rig: Rig) -> None:
    for fields, first in (({}, "["), ({"add_special_tokens": False}, "["), ({"add_special_tokens": True}, "\0")):
        rig.chat(**fields)
        assert chr(rig.engine.generations[-1].prompt_ids[0]) == first


@pytest.mark.parametrize(("fields", "left"), [({"max_tokens": 56}, 56), ({}, DEFAULT_MAX_TOKENS)])
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_minus_one_keeps_what_the_context_has_room_for(rig: Rig, route: str, fields: dict[str, Any], left: int) -> None:
    long = "x" * 5000
    how = {"prompt": long} if route == "complete" else {"messages": [{"role": "user", "content": long}]}
    assert getattr(rig, route)(**how, **fields).json()["error"]["code"] == "context_length_exceeded"
    assert getattr(rig, route)(**how, **fields, truncate_prompt_tokens=-1).status_code == 200
    assert len(rig.engine.generations[0].prompt_ids) == rig.engine.context_length - left


def test_a_prompt_that_is_cut_and_still_too_long_is_refused(rig: Rig) -> None:
    answer = rig.complete(prompt="x" * 300, truncate_prompt_tokens=256)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_prompt_that_was_cut_is_repeated_as_the_model_sees_it(rig: Rig) -> None:
    cut, whole = rig.complete(prompt=["hello", "yo"], truncate_prompt_tokens=4, echo=True, max_tokens=1).json()[
        "choices"
    ]
    assert (cut["text"], whole["text"]) == ("elloT", "yoT")


def test_what_is_cut_off_a_text_is_bounded(rig: Rig) -> None:
    def ids_of(num_characters: int) -> tuple[int, ...]:
        asked = CompletionRequest(model="base-model", prompt="x" * num_characters, truncate_prompt_tokens=5)
        [prompt] = asyncio.run(prompts_of(asked, rig.engine, "public"))
        return prompt.ids

    assert len(ids_of(MAX_ENCODED_CHARACTERS)) == 5
    with pytest.raises(ContextLengthExceeded):
        ids_of(MAX_ENCODED_CHARACTERS + 1)


# the answer's tokens


class SpacedCodec(FakeCodec):
    """As many vocabularies do, it has tokens of their own for letters behind a space."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        spaced = [500 + ord(text[1])] if text.startswith(" ") else []
        return spaced + super().encode(text[2 * bool(spaced) :], add_special_tokens=add_special_tokens)


def test_bad_words_are_told_by_their_tokens_at_the_beginning_and_behind_a_space(rig: Rig) -> None:
    assert rig.complete(bad_words=["ab", " ab", "c"]).status_code == 200
    assert rig.engine.generations[0].params.bad_words == ((97, 98), (99,))  # behind a space they are no others here
    rig.engine.codec = SpacedCodec()
    assert rig.complete(bad_words=["ab", " ab", "c"]).status_code == 200
    assert rig.engine.generations[1].params.bad_words == ((97, 98), (597, 98), (99,), (599,))


def test_many_bad_words_are_told_as_few_are(rig: Rig) -> None:
    words = [chr(97 + i % 26) * 60 for i in range(200)]
    assert rig.complete(bad_words=words).status_code == 200
    assert len(rig.engine.generations[0].params.bad_words) == 26


@pytest.mark.parametrize("body", [{"max_tokens": 3}, {"max_completion_tokens": 3}])
def test_an_answer_cannot_be_longer_than_it_may_be(rig: Rig, body: dict[str, Any]) -> None:
    assert rig.complete(min_tokens=3, **body).status_code == 200
    answer = rig.complete(min_tokens=4, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "min_tokens")


def test_the_least_length_of_an_answer_is_held_against_what_it_may_have_in_the_end(rig: Rig) -> None:
    answer = rig.complete(min_tokens=17)  # more than completions have unasked
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "min_tokens")


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_the_priority_reaches_the_engine_with_every_prompt(rig: Rig, route: str) -> None:
    prompts = {"prompt": ["one", "two"]} if route == "complete" else {}
    getattr(rig, route)(priority=-7, **prompts)
    assert {generation.priority for generation in rig.engine.generations} == {-7}
    getattr(rig, route)()
    assert rig.engine.generations[-1].priority == 0


def test_a_request_without_these_fields_asks_for_nothing_new(rig: Rig) -> None:
    rig.complete()
    assert rig.engine.generations[0].params == SamplingParams(max_tokens=16)
