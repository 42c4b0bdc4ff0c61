"""The kind of adapter that `docs/extending.md` adds, as it stands there: uploaded over HTTP and served."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from manylora.identity import ADAPTER_FILES, CONFIG_FILE, TENSOR_FILE
from manylora.lora.format import kinds
from tests.e2e.test_parsed_once import complete, serving
from tests.tiny_adapters import make_adapter

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
pytestmark = pytest.mark.anyio


def example() -> str:
    """The one Python block of the section."""
    section = DOCS.read_text(encoding="utf-8").split("## A kind of adapter")[1].split("\n## ")[0]
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (block,) = blocks
    return block


def as_down_up(lora: Path, folder: Path, *, without: str = "none") -> Path:
    """The same adapter in the other kind's files."""
    folder.mkdir()
    config = json.loads((lora / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "peft_type": "DOWN_UP"}))
    tensors = load_file(lora / TENSOR_FILE)
    renamed = {name.replace("lora_A", "down").replace("lora_B", "up"): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in renamed.items() if without not in name}, folder / TENSOR_FILE)
    return folder


async def test_the_kind_of_the_docs_is_served_as_the_lora_it_is(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = make_adapter(tiny_llama_dir, tmp_path / "lora", seed=1, strength=2.0)
    other, broken = as_down_up(lora, tmp_path / "other"), as_down_up(lora, tmp_path / "broken", without="0.self_attn.q")
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))  # the example is no part of what other tests see
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, _):

        async def push(name: str, folder: Path) -> tuple[int, dict[str, object]]:
            parts = [("files", (file, (folder / file).read_bytes())) for file in ADAPTER_FILES]
            response = await client.post("/v1/adapters", data={"name": name}, files=parts)
            return response.status_code, response.json()

        status, body = await push("other", other)
        assert (status, "DOWN_UP" in json.dumps(body)) == (422, True)
        exec(compile(example(), str(DOCS), "exec"), {})
        status, body = await push("broken", broken)
        assert (status, "missing_tensor" in json.dumps(body)) == (422, True)
        status, body = await push("other", other)
        assert status == 201, body
        assert (await push("lora", lora))[0] == 201
        answer = await complete(client, "other")
        assert answer == await complete(client, "lora") != await complete(client, "tiny")
    async with serving(tiny_llama_dir, tmp_path / "data") as (client, catalog):  # as it was accepted, from the store
        assert await complete(client, "other") == answer
        assert (await catalog.get_version("public", "other", 1))[1].kind == "down-up"
