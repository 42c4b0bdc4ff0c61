"""The real `openai` client, sync and async, against a real server."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from manylora.errors import QueueFull
from manylora.tenants.interface import Principal, Role

from .conftest import Rig

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def url(rig: Rig, serve: Callable[[FastAPI], Any]) -> Iterator[str]:
    with serve(rig.app) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def test_completion_with_an_adapter(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="alpha@2", prompt="hi", max_tokens=12)
    assert answer.choices[0].text == "alpha@2: The"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    extension = answer.model_dump()["manylora"]
    assert extension["adapter"]["version"] == 2


def test_completion_with_n_logprobs_echo_and_stop(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base-model", prompt=["a", "b"], n=2, logprobs=2, echo=True, stop=[" q"])
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [
        (0, "aThe", "stop"),
        (1, "aThe", "stop"),
        (2, "bThe", "stop"),
        (3, "bThe", "stop"),
    ]
    logprobs = answer.choices[3].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["<s>", "b", "T", "h", "e"]
    assert logprobs.text_offset == [0, 0, 1, 2, 3]


def test_streamed_completion_with_usage(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="base-model", prompt="hi", max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "The quick"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 12


def test_chat_with_n_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base-model", messages=MESSAGES, n=2, max_completion_tokens=3, logprobs=True, top_logprobs=3
    )
    assert [c.message.content for c in answer.choices] == ["The", "The"]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [t.token for t in logprobs.content] == ["T", "h", "e"]
    assert len(logprobs.content[0].top_logprobs) == 3


def test_an_answer_can_be_sent_back_as_part_of_the_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="base-model", messages=MESSAGES, max_tokens=3)
    history = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model="base-model", messages=history, max_tokens=3).choices


def test_streamed_chat_collected_by_the_clients_own_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="alpha", messages=MESSAGES, stop=" quick", stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "alpha@1: The"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == 12


def test_an_adapter_named_as_extra_body(client: openai.OpenAI, rig: Rig) -> None:
    client.completions.create(model="base-model", prompt="hi", extra_body={"adapter_id": "alpha@2", "top_k": 3})
    assert rig.engine.generations[0].adapter is not None
    assert rig.engine.generations[0].params.top_k == 3


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["base-model", "alpha"]
    model = client.models.retrieve("alpha").model_dump()
    assert (model["parent"], model["root"]) == ("base-model", "d1" * 8)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gone")


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI, rig: Rig) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="gone", prompt="hi")
    assert not_found.value.code == "adapter_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="base-model", messages=MESSAGES, modalities=["audio"], max_tokens=1)
    assert (bad.value.code, bad.value.param) == ("unsupported_field", "modalities")
    rig.engine.refuse = QueueFull("full", retry_after_s=1.2)
    with pytest.raises(openai.RateLimitError) as limited:
        client.completions.create(model="base-model", prompt="hi")
    assert limited.value.response.headers["retry-after"] == "2"
    assert limited.value.request_id


def test_a_wrong_key_is_the_clients_authentication_error(url: str, rig: Rig) -> None:
    rig.gate.keys["right"] = Principal("acme", Role.USER)
    wrong = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["base-model", "alpha", "beta"]


def test_an_error_within_a_stream_is_raised_by_the_client(client: openai.OpenAI, rig: Rig) -> None:
    rig.engine.error_at = 3
    stream = client.completions.create(model="base-model", prompt="hi", stream=True)
    assert [next(stream).choices[0].text for _ in range(3)] == ["T", "h", "e"]
    with pytest.raises(openai.APIError, match="tripped"):
        next(stream)


@pytest.mark.anyio
async def test_the_async_client_drives_both_routes(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        whole = await client.completions.create(model="base-model", prompt="hi", max_tokens=3)
        assert whole.choices[0].text == "The"
        stream = await client.chat.completions.create(
            model="alpha", messages=MESSAGES, stream=True, max_tokens=8, n=2, stream_options={"include_usage": True}
        )
        texts = ["", ""]
        usage = None
        async for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == ["alpha@1:", "alpha@1:"]
        assert usage is not None
        assert usage.completion_tokens == 16


@pytest.mark.anyio
async def test_leaving_the_async_clients_stream_aborts_the_request(url: str, rig: Rig) -> None:
    import anyio

    rig.engine.step_s, rig.engine.text = 0.02, "endless " * 25
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        stream = await client.completions.create(model="base-model", prompt="hi", stream=True, max_tokens=200)
        async for _ in stream:
            break
        await stream.close()
        with anyio.fail_after(60):
            while not rig.finished:
                await anyio.sleep(0.01)
    assert not rig.engine.open
    assert rig.finished[-1].outcome == "cancelled"
