"""The example of docs/python.md, run as it stands, and the parts that it opens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.engine.interface import SamplingParams
from manylora.errors import AdapterNotFound
from manylora.identity import PUBLIC_TENANT
from manylora.serving.parts import open_parts
from manylora.settings import Settings

ROOT = Path(__file__).parents[2]
QUESTION = "Once upon a time"


def example() -> str:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def answer_of_peft(model_dir: Path, adapter: Path, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), adapter)
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_example_answers_as_peft_does(tiny_llama_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example(), encoding="utf-8")
    (tmp_path / "manylora.toml").write_text('dtype = "float32"\nkv_cache_memory = "4MiB"\n', encoding="utf-8")

    done = subprocess.run(
        [sys.executable, script, str(tiny_llama_dir), str(adapters_dir), "middle", QUESTION],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == answer_of_peft(tiny_llama_dir, adapters_dir / "middle", 16)


@pytest.mark.anyio
async def test_parts_end_whole_and_can_be_opened_again(
    tiny_llama_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    settings = Settings(
        model=str(tiny_llama_dir), adapters=adapters_dir, data_dir=tmp_path / "data", dtype="float32",
        kv_cache_memory=2**22,
    )  # fmt: skip
    answers = []
    for _ in range(2):
        async with open_parts(settings) as parts:
            adapter = parts.directory.resolve(PUBLIC_TENANT, "large")
            prompt = parts.engine.codec.encode(QUESTION)
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            deltas = [delta async for delta in parts.engine.generate("1", prompt, params, adapter=adapter)]
            answers.append([token for delta in deltas for token in delta.token_ids])
            with pytest.raises(AdapterNotFound):
                parts.directory.resolve(PUBLIC_TENANT, "unknown")

    assert answers[0] == answers[1]
    assert len(answers[0]) == 4
