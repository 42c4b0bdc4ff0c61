"""An adapter that was trained with tokens of its own, over HTTP: its tokenizer's tokens are its requests' alone."""

import io
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from manylora.cli.offline import validate_offline
from manylora.identity import ADAPTER_FILES, OWN_TOKENS_FILE, TOKENIZER_FILES
from tests.e2e.test_parsed_once import serving
from tests.engine.oracle import check_greedy
from tests.resized import make_resized, with_resized
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.anyio
SIZE: Final = 324
TEXT: Final = "The quick <tool>brown <mark> fox<|stop|>"


def tokenizer_with_more() -> PreTrainedTokenizerBase:
    """The base's with four tokens more, of which two are plain words and one ends an answer."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>", AddedToken("<mark>", lstrip=True), "<|stop|>"])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    assert len(tokenizer) == SIZE
    return tokenizer


def make(base: Path, folder: Path, **settings: Any) -> Path:
    tokens = range(SIZE - 4, SIZE)
    make_resized(base, folder, SIZE, trainable_token_indices=[7, *tokens], **settings)
    tokenizer_with_more().save_pretrained(folder)
    return folder


async def push(client: httpx2.AsyncClient, name: str, files: Mapping[str, bytes]) -> Any:
    response = await client.post(
        "/v1/adapters", data={"name": name}, files=[("files", (file, data)) for file, data in files.items()]
    )
    assert response.status_code in (200, 201), response.text
    return response.json()


async def post(client: httpx2.AsyncClient, route: str, **body: Any) -> Any:
    response = await client.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def check_tokens(client: httpx2.AsyncClient, tokenizer: PreTrainedTokenizerBase) -> None:
    """There and back, for the adapter; the base knows nothing of them."""
    ids = tokenizer(TEXT)["input_ids"]
    assert {320, 321, 322} <= set(ids)
    found = await post(client, "/tokenize", model="own", prompt=TEXT, return_token_strs=True)
    assert found["tokens"] == ids
    assert "<tool>" in found["token_strs"]
    assert (await post(client, "/detokenize", model="own", tokens=ids))["prompt"] == tokenizer.decode(ids)
    bare = await post(client, "/tokenize", model="tiny", prompt=TEXT)
    assert bare["tokens"] == make_tokenizer()(TEXT)["input_ids"]
    assert max(bare["tokens"]) < 320
    for model in ("tiny", "other"):
        response = await client.post("/v1/completions", json={"model": model, "prompt": [5, 321], "max_tokens": 1})
        assert response.status_code == 400
        assert "0 to 319" in response.json()["error"]["message"]


async def check_answers(client: httpx2.AsyncClient, base: Path, folder: Path) -> None:
    """As PEFT gives them, and ended by the adapter's own last token; log-probabilities name its tokens."""
    tokenizer = tokenizer_with_more()
    ids = tokenizer(TEXT)["input_ids"]
    asked = {"model": "own", "prompt": TEXT, "temperature": 0, "max_tokens": 8}
    answer = (await post(client, "/v1/completions", **asked, ignore_eos=True, return_token_ids=True))["choices"][0]
    check_greedy(with_resized(base, folder, SIZE), ids, answer["token_ids"])
    assert answer["text"] == tokenizer.decode(answer["token_ids"], skip_special_tokens=True)
    forced = {**asked, "logit_bias": {"321": 90}, "logprobs": 1, "max_tokens": 2}
    answer = (await post(client, "/v1/completions", **forced))["choices"][0]
    assert answer["logprobs"]["tokens"] == ["<mark>", "<mark>"]
    assert answer["text"].count("<mark>") == 2
    answer = (await post(client, "/v1/completions", **asked, logit_bias={"323": 90}))["choices"][0]
    assert (answer["finish_reason"], answer["text"], answer.get("stop_reason")) == ("stop", "", None)
    answer = (await post(client, "/v1/completions", **asked, logit_bias={"322": 90}, stop="<|stop|>"))["choices"][0]
    assert (answer["finish_reason"], answer["text"]) == ("stop", "")
    chat = {"model": "own", "messages": [{"role": "user", "content": "<tool>"}], "max_tokens": 2, "temperature": 0}
    usage = (await post(client, "/v1/chat/completions", **chat))["usage"]
    rendered = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True, return_dict=False)
    assert usage["prompt_tokens"] == len(rendered)


async def check_refused(base: Path, folder: Path, data: Path) -> None:
    """On a base of the same shapes that has one of the adapter's tokens under another id."""
    shutil.copytree(base, folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<1>", "<2>", "<3>", "<4>", "<tool>"])
    tokenizer.save_pretrained(folder)
    async with serving(folder, data) as (client, _):
        for route, body in (("/v1/completions", {"max_tokens": 1}), ("/tokenize", {})):
            response = await client.post(route, json={"model": "own", "prompt": "hi", **body})
            assert response.status_code == 409
            assert "Upload it again" in response.json()["error"]["message"]
        await post(client, "/v1/completions", model="own@2", prompt="hi", max_tokens=1)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
async def test_tokens_of_its_own_are_its_requests_alone(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make(tiny_llama_dir, tmp_path / "own")
    files = {name: (folder / name).read_bytes() for name in (*ADAPTER_FILES, *TOKENIZER_FILES[:2])}
    other = make_adapter(tiny_llama_dir, tmp_path / "other", seed=3)
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, _):
        version = await push(client, "own", files)
        offline = validate_offline(folder, str(tiny_llama_dir))
        assert {name: offline[name] for name in ("digest", "size_bytes")} == {
            name: version[name] for name in ("digest", "size_bytes")
        }
        assert any("'<mark>'" in text or "<mark>" in text for text in version["report"]["warnings"])
        await push(client, "other", {name: (other / name).read_bytes() for name in ADAPTER_FILES})
        await check_tokens(client, tokenizer_with_more())
        await check_answers(client, tiny_llama_dir, folder)
        mixed = {"model": "tiny", "prompt": "hi", "adapters": [{"name": "own", "weight": 0.5}, {"name": "other"}]}
        response = await client.post("/v1/completions", json=mixed)
        assert response.status_code == 400
        assert "vocabulary" in response.json()["error"]["message"]
        archive = await client.get("/v1/adapters/own/versions/1/download")
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as members:
            kept = {m.name: file.read() for m in members.getmembers() if (file := members.extractfile(m)) is not None}
        assert {name: kept[name] for name in ADAPTER_FILES} == {name: files[name] for name in ADAPTER_FILES}
        assert OWN_TOKENS_FILE in kept
        again = await push(client, "own", kept)  # what was downloaded is the version that is there
        assert (again["version"], again["digest"]) == (version["version"], version["digest"])
        without = await push(client, "own", {name: files[name] for name in ADAPTER_FILES})
        assert without["version"] == 2  # without its tokens it is another adapter
        assert any("tokenizer.json" in text for text in without["report"]["warnings"])
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, _):
        await check_tokens(client, tokenizer_with_more())
        await check_answers(client, tiny_llama_dir, folder)
    await check_refused(tiny_llama_dir, tmp_path / "changed", tmp_path / "data")
