"""A real server process, a real (tiny) model, the real clients."""

import asyncio
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.tiny_adapters import make_adapter

from .conftest import ADAPTERS, Server

pytestmark = pytest.mark.slow
NAMES = ["tiny", *ADAPTERS]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def test_the_announcement_says_what_is_served(server: Server) -> None:
    assert server.announcement["model"] == "tiny"
    assert server.announcement["num_adapters"] == len(ADAPTERS)
    assert server.announcement["is_open"] is True
    assert server.announcement["moved_from"] is None


def test_base_and_adapters_are_listed(client: openai.OpenAI) -> None:
    assert {m.id for m in client.models.list()} == set(NAMES)


def test_every_adapter_answers_otherwise_than_the_base_and_always_the_same(client: openai.OpenAI) -> None:
    answers = {
        name: {client.completions.create(model=name, prompt="The quick", **GREEDY).choices[0].text for _ in range(3)}
        for name in NAMES
    }
    assert all(len(texts) == 1 for texts in answers.values())
    assert len({next(iter(texts)) for texts in answers.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI, name: str) -> None:
    whole = client.completions.create(model=name, prompt="The quick", **GREEDY)
    stream = client.completions.create(
        model=name, prompt="The quick", stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_streams_and_counts(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="middle", messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(model="middle", messages=MESSAGES, stream=True, **GREEDY)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content


def test_choices_of_one_seed_differ_and_come_again(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(model="tiny", prompt="The", n=4, seed=7, temperature=1.5, max_tokens=24)
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_several_prompts_are_answered_as_each_alone(client: openai.OpenAI) -> None:
    prompts = ["The quick", "SELECT name", "我爱北京"]
    together = client.completions.create(model="small", prompt=prompts, **GREEDY)
    alone = [client.completions.create(model="small", prompt=p, **GREEDY).choices[0].text for p in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_logprobs_are_of_the_greedy_token_and_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="large", prompt="The quick", logprobs=3, echo=True, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert answer.usage is not None
    assert len(logprobs.tokens) == answer.usage.total_tokens
    assert logprobs.token_logprobs[0] is None
    for chosen, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[-24:]:
        assert chosen == max(top.values())
        assert 1 <= len(top) <= 3, "several ids can have one text, such as half a character's"
    assert answer.choices[0].text.startswith("The quick")


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="small", prompt="The quick", **GREEDY).choices[0].text
    stop = whole[5:8]
    stopped = client.completions.create(model="small", prompt="The quick", stop=stop, **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole[: whole.index(stop)]


def test_logit_bias_decides(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="The", logit_bias={"70": 100}, logprobs=0, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(set(logprobs.tokens)) == 1


@pytest.mark.anyio
async def test_forty_requests_at_once_get_what_each_gets_alone(server: Server) -> None:
    prompts = [f"{n} The quick brown fox" + " jumps" * (n % 7) for n in range(40)]
    names = [NAMES[n % len(NAMES)] for n in range(40)]
    async with server.async_client() as client:

        async def ask(name: str, prompt: str) -> str:
            answer = await client.completions.create(model=name, prompt=prompt, **GREEDY)
            return str(answer.choices[0].text)

        together = await asyncio.gather(*(ask(n, p) for n, p in zip(names, prompts, strict=True)))
        alone = [await ask(n, p) for n, p in zip(names, prompts, strict=True)]
    assert together == alone


async def settled(server: Server) -> dict[str, Any]:
    """The stats once nothing runs any more."""
    while True:
        stats = await asyncio.to_thread(server.stats)
        if not any(stats[name] for name in ("running", "waiting", "waiting_for_adapter", "in_flight")):
            return stats
        await asyncio.sleep(0.05)


@pytest.mark.anyio
async def test_a_hundred_vanishing_clients_leave_nothing_in_use(server: Server) -> None:
    async def vanish(number: int) -> None:
        body = {"model": NAMES[number % 4], "prompt": f"{number} The", "max_tokens": 400, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        async with (
            httpx.AsyncClient(timeout=120) as client,
            client.stream("POST", url, json={**body, "stream": True}) as answer,
        ):
            lines = answer.aiter_lines()
            for _ in range(1 + number % 5):
                await anext(lines)

    await asyncio.gather(*(vanish(number) for number in range(100)))
    stats = await asyncio.wait_for(settled(server), 60)
    assert (stats["kv_blocks_used"], stats["slots_used"]) == (0, 0)
    assert stats["totals"]["outcomes"]["cancelled"] >= 100


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody"}, 404, "adapter_not_found"),
        ({"temprature": 1}, 400, "unsupported_field"),
        ({"prompt": "x " * 5000}, 400, "context_length_exceeded"),
        ({"prompt": ""}, 400, "invalid_request"),
        ({"prompt": [10**9]}, 400, "invalid_request"),
        ({"max_tokens": -1}, 400, "invalid_request"),
        ({"max_tokens": 10**30}, 400, "invalid_request"),
        ({"max_tokens": 10**15}, 400, "context_length_exceeded"),
        ({"prompt": "x" * 100_000_000}, 413, "request_too_large"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_lost(
    server: Server, client: openai.OpenAI, body: dict[str, Any], status: int, code: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "The", **body}, timeout=120)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert client.completions.create(model="small", prompt="The", **GREEDY).choices[0].text


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt": "\xff\xfe", "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "\\ud83d", "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "The", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "The", "top_k": -99999999999999999999}',
        b'{"model": "tiny", "prompt": "The", "seed": 1' + b"0" * 4000 + b"}",
        b'{"model": "tiny", "prompt": []}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_says_nothing_sensible_is_refused(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=120)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.process.poll() is None


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/stats", "/dashboard", "/docs", "/openapi.json"])
def test_every_page_is_there(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}").status_code == 200


def test_metrics_name_the_adapters(server: Server, client: openai.OpenAI) -> None:
    client.completions.create(model="large", prompt="The", **GREEDY)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'manylora_requests_total{adapter="large",outcome="ok",tenant="public"}' in text
    assert "manylora_step_duration_seconds_count" in text


def test_an_adapter_is_uploaded_used_and_deleted(server: Server, client: openai.OpenAI, adapters_dir: Path) -> None:
    folder = adapters_dir / "small"
    files = [("files", (n, (folder / n).read_bytes())) for n in ("adapter_config.json", "adapter_model.safetensors")]
    uploaded = httpx.post(f"{server.url}/v1/adapters", data={"name": "copy"}, files=files, timeout=60)
    assert uploaded.status_code == 201, uploaded.text
    texts = [client.completions.create(model=n, prompt="The", **GREEDY).choices[0].text for n in ("copy", "small")]
    assert texts[0] == texts[1]
    assert httpx.delete(f"{server.url}/v1/adapters/copy").status_code == 204
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="copy", prompt="The", **GREEDY)


@pytest.mark.anyio
async def test_sigterm_lets_running_requests_finish_and_then_ends_well(own_server: Callable[..., Any]) -> None:
    with own_server() as server:
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"model": "small", "prompt": "The", "max_tokens": 450, "ignore_eos": True}
            url = f"{server.url}/v1/completions"
            async with client.stream("POST", url, json={**body, "stream": True}) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                server.process.send_signal(signal.SIGTERM)
                while (await client.get(f"{server.url}/ready")).status_code == 200:
                    pass
                refused = await client.post(url, json=body)
                rest = [line async for line in lines if line]
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(60) == 0


@pytest.mark.anyio
async def test_a_dead_engine_answers_what_waits_and_ends_the_process(own_server: Callable[..., Any]) -> None:
    with own_server(max_num_seqs=2, drain_delay_s=3600) as server:
        body = {"model": "small", "prompt": "The", "max_tokens": 450, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        async with httpx.AsyncClient(timeout=120) as client:
            async with client.stream("POST", url, json={**body, "stream": True}) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                waiting = [asyncio.create_task(client.post(url, json=body)) for _ in range(6)]
                while (await client.get(f"{server.url}/v1/stats")).json()["waiting"] < 5:
                    pass
                server.process.send_signal(signal.SIGUSR1)
                rest = [line async for line in lines if line]
            answers = await asyncio.gather(*waiting)
        assert '"code":"engine_dead"' in rest[-1]
        assert {(a.status_code, a.json()["error"]["code"]) for a in answers} == {(503, "engine_dead")}
        assert "the device is gone" in answers[0].json()["error"]["message"]
        assert server.process.wait(60) == 1
        log = server.stderr.read_text()
        assert log.count("engine_died") == 1
        assert "engine_dead: The engine has stopped: RuntimeError: the device is gone" in log


@pytest.mark.anyio
async def test_a_dead_engine_can_be_told_to_leave_the_process_up(own_server: Callable[..., Any]) -> None:
    with own_server(max_num_seqs=2, exit_on_engine_failure=False) as server:
        body = {"model": "small", "prompt": "The", "max_tokens": 450, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        async with httpx.AsyncClient(timeout=120) as client:

            async def ask() -> httpx.Response:
                return await client.post(url, json=body)

            async with client.stream("POST", url, json={**body, "stream": True}) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                waiting = [asyncio.create_task(ask()) for _ in range(6)]
                while (await client.get(f"{server.url}/v1/stats")).json()["waiting"] < 5:
                    pass
                server.process.send_signal(signal.SIGUSR1)
                rest = [line async for line in lines if line]
            answers = await asyncio.gather(*waiting)
            answers.append(await ask())
            ready = await client.get(f"{server.url}/ready")
            health = await client.get(f"{server.url}/health")
        assert '"code":"engine_dead"' in rest[-1]
        assert {(a.status_code, a.json()["error"]["code"]) for a in answers} == {(503, "engine_dead")}
        assert "the device is gone" in answers[0].json()["error"]["message"]
        assert (ready.status_code, health.status_code) == (503, 200)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.anyio
async def test_a_full_queue_is_a_429_that_says_when_to_come_back(own_server: Callable[..., Any]) -> None:
    with own_server(max_num_seqs=1, max_queue=2, tenant_queue_share=1) as server:
        body = {"model": "small", "prompt": "The", "max_tokens": 200, "ignore_eos": True}
        async with httpx.AsyncClient(timeout=120) as client:
            asked = (client.post(f"{server.url}/v1/completions", json=body) for _ in range(8))
            answers = await asyncio.gather(*asked)
    assert [a.status_code for a in answers].count(200) >= 3
    refused = [a for a in answers if a.status_code != 200]
    assert refused
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1


def test_an_adapter_folder_for_another_base_is_refused_in_the_log_with_all_reasons(
    own_server: Callable[..., Any], tiny_model_dir: Callable[[str], Path], adapters_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "mixed"
    shutil.copytree(adapters_dir, root)
    make_adapter(tiny_model_dir("gpt2"), root / "of-gpt2", targets=["c_attn", "c_fc"], fan_in_fan_out=True)
    with own_server(adapters=str(root)) as server:
        assert {m.id for m in server.client().models.list()} == set(NAMES)
        log = server.stderr.read_text()
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "of-gpt2", "prompt": "The"})
    assert "Not registered" in log
    assert "of-gpt2" in log
    assert "c_attn" in log
    assert "c_fc" in log
    assert answer.status_code == 404


def test_adapters_found_once_are_there_after_a_restart(own_server: Callable[..., Any]) -> None:
    for changes in ({}, {"adapters": None}):
        with own_server(**changes) as server:
            assert {m.id for m in server.client().models.list()} == set(NAMES)


def test_without_keys_the_server_binds_to_loopback(own_server: Callable[..., Any]) -> None:
    with own_server(host="0.0.0.0") as server:
        assert server.announcement["moved_from"] == "0.0.0.0"
        assert server.url.startswith("http://127.0.0.1:")


def test_a_port_in_use_ends_the_start_before_the_model_is_read(failing_start: Callable[..., tuple[int, str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, message = failing_start(port=port, model="/nowhere")
    assert status == 2
    assert f"Port {port}" in message
    assert "--port" in message


def test_a_model_folder_without_weights_is_named(
    failing_start: Callable[..., tuple[int, str]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "empty-model"
    shutil.copytree(tiny_llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    status, message = failing_start(model=str(folder))
    assert status == 2
    assert "model_unusable" in message
    assert "Traceback" not in message


def test_too_little_memory_for_one_sequence_is_said(failing_start: Callable[..., tuple[int, str]]) -> None:
    status, message = failing_start(kv_cache_memory="16KiB")
    assert status == 2
    assert "--kv-cache-memory" in message
    assert "Traceback" not in message
