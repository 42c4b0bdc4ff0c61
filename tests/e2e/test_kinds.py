"""Adapters of other kinds than plain LoRA, made by PEFT, over HTTP: uploaded, measured, served, kept."""

import io
import tarfile
import warnings
from pathlib import Path

import httpx2
import pytest

from manylora.identity import ADAPTER_FILES
from tests.e2e.test_parsed_once import PROMPT, serving
from tests.engine.oracle import check_greedy, with_adapter
from tests.models.zoo import make_zoo_model
from tests.peft_kinds import make_kind
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.anyio
NAMES = {
    "dora": "DoRA with rsLoRA",
    "saved": "LoRA with saved embedding and head",
    "tokens": "Trained tokens",
    "ia3": "IA3",
    "norms": "LN tuning",
    "oft": "OFT",
    "prompt": "Prompt tuning",
    "prefix": "Prefix tuning",
}


async def push(client: httpx2.AsyncClient, name: str, folder: Path) -> httpx2.Response:
    parts = [("files", (file, (folder / file).read_bytes())) for file in ADAPTER_FILES]
    return await client.post("/v1/adapters", data={"name": name}, files=parts)


async def answer(client: httpx2.AsyncClient, model: str, prompt: list[int]) -> list[int]:
    asked = {**PROMPT, "model": model, "prompt": prompt, "return_token_ids": True}
    response = await client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


async def check_room(client: httpx2.AsyncClient, model: str, *, num_virtual: int) -> None:
    """Virtual tokens are no tokens of the caller's prompt, and take their part of the context."""
    asked = {"model": model, "prompt": [5] * 20, "max_tokens": 2, "temperature": 0}
    response = await client.post("/v1/completions", json=asked)
    assert response.json()["usage"]["prompt_tokens"] == 20
    asked |= {"prompt": [5] * (512 - num_virtual - 2)}
    assert (await client.post("/v1/completions", json=asked)).status_code == 200
    asked |= {"prompt": [5] * (512 - num_virtual - 1)}
    response = await client.post("/v1/completions", json=asked)
    assert response.status_code == 400
    assert f"behind {num_virtual} virtual ones" in response.json()["error"]["message"]
    mixed = {**asked, "model": "tiny", "prompt": "hi", "adapters": [{"name": model, "weight": 0.5}]}
    response = await client.post("/v1/completions", json=mixed)
    assert response.status_code == 400
    assert "served alone" in response.json()["error"]["message"]
    asked |= {"truncate_prompt_tokens": -1}
    assert (await client.post("/v1/completions", json=asked)).status_code == 200


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
async def test_each_kind_is_measured_served_and_kept(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folders = {
        name: make_kind(tiny_llama_dir, tmp_path / name, kind, seed=n) for n, (name, kind) in enumerate(NAMES.items())
    }
    prompt = [*make_tokenizer().encode("The quick brown fox"), 7, 250]  # with two of the trained tokens
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, catalog):
        for name, folder in folders.items():
            response = await push(client, name, folder)
            assert response.status_code == 201, response.text
            assert response.json()["report"]["effect"]["max_abs_logit_delta"] > 0.01
        found = {name: await answer(client, name, prompt) for name in folders}
        for name, folder in folders.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuned = with_adapter(tiny_llama_dir, folder)
            check_greedy(tuned, prompt, found[name])
        assert (await catalog.get_version("public", "oft", 1))[1].kind == "oft"
        await check_room(client, "prompt", num_virtual=3)
        archive = await client.get("/v1/adapters/saved/versions/1/download")
        assert archive.status_code == 200
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as members:
            for member in members.getmembers():
                file = Path(member.name).name
                content = members.extractfile(member)
                if file in ADAPTER_FILES and content is not None:
                    assert content.read() == (folders["saved"] / file).read_bytes()
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, _):  # as they were accepted, from the store
        assert {name: await answer(client, name, prompt) for name in folders} == found


async def test_an_adapter_that_would_take_too_much_memory_is_refused_with_what_it_takes(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    small = make_kind(tiny_llama_dir, tmp_path / "small", "FourierFT")
    assert sum(path.stat().st_size for path in small.iterdir()) < 10_000
    async with serving(tiny_llama_dir, tmp_path / "data", max_adapter_memory="64KiB") as (client, _):
        response = await push(client, "small", small)
        assert response.status_code == 422
        assert "--max-adapter-memory" in response.text
        assert "245,760 bytes" in response.text


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*")
async def test_an_adapter_on_experts_is_measured_served_and_kept(tmp_path: Path) -> None:
    """All linears of a mixture, as PEFT has them: its experts and its router are among them."""
    base = make_zoo_model("mixtral", tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", rank=4, strength=2.0)
    assert b"gate_up_proj" in (folder / "adapter_config.json").read_bytes()
    prompt = make_tokenizer().encode("The quick brown fox")
    async with serving(base, tmp_path / "data") as (client, _):
        response = await push(client, "experts", folder)
        assert response.status_code == 201, response.text
        assert response.json()["report"]["effect"]["max_abs_logit_delta"] > 0.01
        found = await answer(client, "experts", prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = with_adapter(base, folder)
        check_greedy(tuned, prompt, found)
        archive = await client.get("/v1/adapters/experts/versions/1/download")
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as members:
            kept = {Path(m.name).name: members.extractfile(m) for m in members.getmembers()}
            for file in ADAPTER_FILES:
                content = kept[file]
                assert content is not None
                assert content.read() == (folder / file).read_bytes()
    async with serving(base, tmp_path / "data") as (client, _):
        assert await answer(client, "experts", prompt) == found
