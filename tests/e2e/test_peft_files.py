"""What PEFT itself saves, over HTTP: uploaded, in versions, downloaded as it came, and answered as PEFT answers."""

import io
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from manylora.identity import ADAPTER_FILES
from tests.e2e.test_parsed_once import serving
from tests.engine.oracle import check_greedy, with_adapter
from tests.models.zoo import make_zoo_model

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*"),
]
PROMPT: Final = [7, 33, 250, 12, 5, 91, 180, 44, 3]
# By base: each adapter's settings of PEFT's.
FILES: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "llama": {
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "head-and-tokens": {
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": [7, 12, 250],
        },
    },
    "qwen3_moe": {"experts": {"target_modules": "all-linear"}},  # of a mixture PEFT makes parameters of it
}


def save(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """By PEFT, with random numbers."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.2)
        tuned.save_pretrained(folder)
    return folder


async def upload(client: httpx2.AsyncClient, name: str, folder: Path) -> Any:
    parts = [("files", (file, (folder / file).read_bytes())) for file in ADAPTER_FILES]
    response = await client.post("/v1/adapters", data={"name": name, "activate": "true"}, files=parts)
    assert response.status_code == 201, response.text
    return response.json()


async def download(client: httpx2.AsyncClient, name: str, version: int) -> dict[str, bytes]:
    response = await client.get(f"/v1/adapters/{name}/versions/{version}/download")
    assert response.status_code == 200, response.text
    with tarfile.open(fileobj=io.BytesIO(response.content)) as members:
        return {m.name: file.read() for m in members.getmembers() if (file := members.extractfile(m)) is not None}


async def answer(client: httpx2.AsyncClient, model: str) -> list[int]:
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    response = await client.post("/v1/completions", json={**body, "return_token_ids": True})
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("base", FILES)
async def test_what_peft_saves_comes_in_goes_out_and_answers_as_it_is(
    base: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = tiny_llama_dir if base == "llama" else make_zoo_model(base, tmp_path / "base")
    made = {
        (name, version): save(model, tmp_path / f"{name}-{version}", version, **settings)
        for name, settings in FILES[base].items()
        for version in (1, 2)
    }
    found = {}
    async with serving(model, tmp_path / "data") as (client, _):
        for (name, version), folder in made.items():
            assert (await upload(client, name, folder))["version"] == version
        for (name, version), folder in made.items():
            kept = await download(client, name, version)
            assert kept == {file: (folder / file).read_bytes() for file in ADAPTER_FILES}
            found[name, version] = await answer(client, f"{name}@{version}")
        for name in FILES[base]:
            assert await answer(client, name) == found[name, 2]
    for key, folder in made.items():
        check_greedy(with_adapter(model, folder), PROMPT, found[key])
    assert len({tuple(each) for each in found.values()}) == len(found), "each version answers in its own way"
