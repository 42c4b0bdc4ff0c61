"""A merged checkpoint against the engine that serves the same adapter beside its base."""

import random
from pathlib import Path

import pytest

from manylora.lifecycle.weights.config import MergeConfig
from manylora.lifecycle.weights.merge import merge
from tests.conftest import ModelMaker
from tests.engine.harness import available_kernels, build_rig, load
from tests.tiny_adapters import make_adapter


def _prompts(count: int) -> list[list[int]]:
    numbers = random.Random(3)
    return [[numbers.randrange(3, 300) for _ in range(numbers.randrange(2, 30))] for _ in range(count)]


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_checkpoint_and_served_adapter_give_the_same_greedy_tokens(
    architecture: str, kernel: str, tiny_model_dir: ModelMaker, tmp_path: Path
) -> None:
    """In fp32, in one batch with the bare base, whose answers differ."""
    base = tiny_model_dir(architecture)
    folder = make_adapter(base, tmp_path / "a", rank=8, alpha=12, seed=4)
    merge(MergeConfig(((folder, 1.0),), tmp_path / "merged", base=str(base), dtype="float32"))
    served = build_rig(load(base), {"tuned": folder}, kernel=kernel)
    merged = build_rig(load(tmp_path / "merged"), kernel=kernel)
    prompts = _prompts(8)

    for number, prompt in enumerate(prompts):
        served.add(f"r{number}", prompt, "tuned", max_tokens=24)
        served.add(f"base{number}", prompt, max_tokens=24)
        merged.add(f"r{number}", prompt, max_tokens=24)
    served.run()
    merged.run()

    for number in range(len(prompts)):
        assert served.tokens(f"r{number}") == merged.tokens(f"r{number}")
    assert any(served.tokens(f"base{n}") != served.tokens(f"r{n}") for n in range(len(prompts)))
    served.close()
    merged.close()


@pytest.mark.slow
def test_shipped_adapter_merged_into_the_default_model_answers_as_it_is_served(
    default_model_dir: Path, tmp_path: Path
) -> None:
    adapter = Path(__file__).parents[2] / "adapters" / "city-zh"
    merge(MergeConfig(((adapter, 1.0),), tmp_path / "merged", dtype="float32"))
    tokenizer_texts = ("我爱北京天安门", "昨天我们参观了华强北", "南京总统府的人太多了")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in tokenizer_texts
    ]
    tokens = []
    for model, adapters in ((default_model_dir, {"tuned": adapter}), (tmp_path / "merged", {})):
        rig = build_rig(load(model), adapters, kernel=available_kernels[-1], num_blocks=200)
        for number, prompt in enumerate(prompts):
            rig.add(f"r{number}", prompt, "tuned" if adapters else None, max_tokens=12)
        rig.run()
        tokens.append([rig.tokens(f"r{number}") for number in range(len(prompts))])
        rig.close()

    assert tokens[0] == tokens[1]
