"""The main promise through the front door: 32 clients, 32 adapters, one server, each answered by its own adapter."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from manylora.models.checkpoint import load_tokenizer
from manylora.models.codec import HuggingFaceCodec
from tests.engine.oracle import check_greedy, with_adapter
from tests.tiny_adapters import make_adapter

from .conftest import Server

pytestmark = pytest.mark.slow

RANKS = (4, 8, 16, 32, 64)
LENGTHS = (3, 300, 20, 1, 120)  # characters, about as many tokens
NUM_TOKENS = 20
SMALL_CACHE = "320KiB"  # 40 blocks of 16 tokens: five of the longest requests


@pytest.fixture(scope="module")
def folders(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("thirty-two")
    return {
        f"a{i:02d}": make_adapter(tiny_llama_dir, root / f"a{i:02d}", rank=RANKS[i % len(RANKS)], seed=i)
        for i in range(32)
    }


def messages(number: int) -> list[Any]:
    text = f"{number} " + "The quick brown fox jumps over the lazy dog. " * 8
    return [{"role": "user", "content": text[: LENGTHS[number % len(LENGTHS)]]}]


async def ask(client: openai.AsyncOpenAI, number: int, name: str) -> list[list[int]]:
    """The bytes of each token of the answer."""
    answer = await client.chat.completions.create(
        model=name,
        messages=messages(number),
        temperature=0,
        max_tokens=NUM_TOKENS,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    adapter = answer.model_dump()["manylora"]["adapter"]
    assert (adapter and adapter["name"]) == (None if name == "tiny" else name)
    return [entry.bytes or [] for entry in logprobs.content or []]


async def vanish(server: Server, number: int, name: str) -> None:
    """Ask for more than anybody else and leave after a few tokens."""
    body = {"model": name, "messages": messages(number), "max_tokens": 100, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(timeout=300) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.aiter_lines()
        for _ in range(1 + number % 4):
            await anext(lines)


@pytest.mark.anyio
async def test_thirty_two_adapters_and_the_base_at_once_answer_as_peft_does_alone(
    own_server: Callable[..., Any], folders: dict[str, Path], tiny_llama_dir: Path
) -> None:
    names = [*folders, *["tiny"] * 8]
    changes = {"adapters": str(next(iter(folders.values())).parent), "kv_cache_memory": SMALL_CACHE}
    with own_server(**changes) as server:
        async with server.async_client() as client:
            answers, _ = await asyncio.gather(
                asyncio.gather(*(ask(client, number, name) for number, name in enumerate(names))),
                asyncio.gather(*(vanish(server, number, names[number]) for number in range(0, 40, 2))),
            )
            stats = server.stats()
    assert stats["preemptions"] > 0, "the cache was large enough, so this shows less than it should"

    codec = HuggingFaceCodec(load_tokenizer(tiny_llama_dir), ())
    id_of = {tuple(codec.token_bytes(i)): i for i in range(codec.num_tokens)}
    assert len(id_of) == codec.num_tokens
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        tokens = [id_of[tuple(code)] for code in answer]
        assert len(tokens) == NUM_TOKENS
        check_greedy(with_adapter(tiny_llama_dir, folders.get(name)), codec.chat(messages(number)), tokens)
