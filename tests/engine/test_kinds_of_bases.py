"""Kinds of adapters on bases of other shapes: tied heads, biases, transposed weights, fused linears, other norms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from manylora.lora.format.reader import read
from tests.engine.harness import available_kernels, build_rig, load
from tests.engine.oracle import with_adapter
from tests.engine.test_adapter_kinds import base_of
from tests.peft_kinds import make_kind

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
PROMPT = [7, 33, 250, 12, 5, 91, 180, 44, 3]  # with tokens that are trained
MOST = 1e-4  # of the logits' spread

_TIES: Final = {"ensure_weight_tying": True}
_GPT2: Final = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
_GEMMA_NORMS: Final = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "norm"]
# Of each base: the kind, and settings in place of its own.
CASES: Final[Mapping[str, list[tuple[str, dict[str, Any]]]]] = {
    "tied": [
        ("LoRA with trained tokens", {}),
        ("LoRA with trained tokens", _TIES),
        ("LoRA with tokens of a named embedding", {}),
        ("Trained tokens", {}),
        ("LoRA with saved embedding and head", {}),
        ("LoRA with a saved embedding", {}),
        ("LoRA with a saved embedding", _TIES),
        ("LoRA with a saved head", {}),
        ("LoRA with a saved head", _TIES),
        ("LoRA on the embedding", {}),
        ("LoRA on the embedding", _TIES),
        ("LoRA on the head", _TIES),
        ("DoRA on the embedding", {}),
    ],
    "qwen2": [
        ("LoRA with all biases", {}),
        ("LoRA with its own biases", {}),
        ("LoRA with a bias on B", {}),
        ("LoRA with a saved linear", {"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}),
        ("LoRA with a saved linear", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
        ("DoRA", {}),
        ("PiSSA", {}),
        ("RoAd 1", {}),
        ("RoAd 4", {}),
        ("GLoRA", {}),
        ("GLoRA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
        ("IA3", {}),
        ("BEFT", {}),
        ("BOFT", {}),
        ("OFT", {}),
        ("HRA", {}),
        ("DEFT", {}),
        ("HiRA", {}),
        ("PEANuT", {}),
        ("MiSS, bat", {}),
        ("LN tuning", {}),
        ("FRoD", {}),
        ("OSF", {}),
    ],
    "gpt2": [
        ("DoRA", {**_GPT2, "target_modules": ["c_attn", "c_proj"]}),
        ("DoRA on the embedding", {**_GPT2, "target_modules": ["wte", "c_attn"]}),
        ("LoRA with all biases", _GPT2),
        ("LoRA with its own biases", _GPT2),
        ("LoRA with a bias on B", _GPT2),
        ("LoRA with a saved norm", {**_GPT2, "modules_to_save": ["ln_2"]}),
        ("LoRA with a saved linear", {**_GPT2, "modules_to_save": ["c_fc"]}),
        ("LoRA with trained tokens", _GPT2),
        ("PiSSA", _GPT2),
        ("LN tuning", {"target_modules": ["ln_1", "ln_f"]}),
    ],
    "gemma2": [
        ("DoRA", {}),
        ("DoRA on the embedding", {}),
        ("DoRA on the head", {}),
        ("LoRA with a saved norm", {}),
        ("LoRA with a saved embedding", {}),
        ("LoRA with a saved head", {}),
        ("LoRA with trained tokens", {}),
        ("Trained tokens", {}),
        ("LN tuning", {"target_modules": _GEMMA_NORMS}),
        ("IA3", {}),
    ],
    "phi3": [
        ("DoRA", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
        ("OFT", {"target_modules": ["qkv_proj", "down_proj"]}),
        ("IA3", {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
    "gpt_neox": [
        ("DoRA", {"target_modules": ["query_key_value", "dense"]}),
        ("LoRA with all biases", {"target_modules": ["query_key_value"]}),
        ("RoAd 1", {"target_modules": ["query_key_value"]}),
        ("LN tuning", {"target_modules": ["input_layernorm", "final_layer_norm"]}),
    ],
}


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("base", CASES)
def test_kinds_answer_together_as_in_peft_on_other_bases(base: str, kernel: str, tmp_path: Path) -> None:
    folder = base_of(base, tmp_path / "base")
    adapters = {
        f"{number} {kind}": make_kind(folder, tmp_path / str(number), kind, seed=number, **changed)
        for number, (kind, changed) in enumerate(CASES[base])
    }
    rig = build_rig(load(folder), adapters, kernel=kernel, num_blocks=400, max_num_batched_tokens=256)
    for adapter in adapters.values():
        read(adapter, rig.wrapped.modules, max_rank=64, max_size=2**24)
    found: dict[str, np.ndarray] = {}
    for name in (None, *adapters):
        seq = rig.add(str(name), PROMPT, name, max_tokens=4)
        seq.capture_logits = seq.wants_prompt_logits = True
    while rig.engine.has_work:
        for output in rig.step():
            if output.captured is not None:
                found[output.seq.request_id] = output.captured
    rig.close()
    with torch.inference_mode():
        unchanged = with_adapter(folder, None)(torch.tensor([PROMPT])).logits[0]
        for name, adapter in adapters.items():
            wanted = with_adapter(folder, adapter)(torch.tensor([PROMPT])).logits[0]
            spread = float(wanted.std())
            assert float((torch.from_numpy(found[name]) - wanted).abs().max()) < MOST * spread, name
            assert float((unchanged - wanted).abs().max()) > 10 * MOST * spread, f"{name} changes nothing"
