"""Every kind of LoRA adapter that PEFT can make for a decoder, in one mixed batch, against PEFT itself in float32."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, generate, with_adapter
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model

PROMPT = [7, 33, 250, 12, 5, 91, 180, 44, 3]

# An embedding's A is as wide as the vocabulary, so it takes larger numbers to matter.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "lm_head": {"targets": ["lm_head", "q_proj"]},
        "lm_head alone": {"targets": ["lm_head"]},
        "embedding": {"targets": ["embed_tokens", "v_proj"], "strength": 8.0},
        "embedding alone": {"targets": ["embed_tokens"], "strength": 8.0},
        "rsLoRA": {"use_rslora": True, "rank": 16},
        "ranks by pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 33}, "alpha": 12},
        "alphas by pattern": {"alpha_pattern": {"down_proj": 24, "layers.0.self_attn.v_proj": 1}},
        "some layers": {"targets": ["q_proj", "gate_proj"], "layers_to_transform": [1], "strength": 2.0},
        "excluded": {"exclude_modules": ["k_proj", "down_proj"]},
        "one module": {"targets": r".*layers\.0\.mlp\.down_proj", "rank": 64, "strength": 2.0},
    },
    "tied": {
        "embedding": {"targets": ["embed_tokens", "q_proj"], "strength": 8.0},
        "all linear": {},
    },
    "gpt2": {
        "Conv1D": {"targets": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        "embedding": {"targets": ["wte", "c_attn"], "fan_in_fan_out": True, "strength": 8.0},
    },
    "phi3": {
        "fused parts": {"targets": ["qkv_proj", "gate_up_proj"]},
        "one of the fused": {"targets": ["gate_up_proj"], "layers_to_transform": [0], "strength": 2.0},
    },
    "gemma2": {
        "scaled embedding": {"targets": ["embed_tokens", "o_proj"], "strength": 8.0},
        "lm_head": {"targets": ["lm_head"], "strength": 4.0},
    },
    "gpt_neox": {
        "fused attention": {"targets": ["query_key_value", "dense"]},
        "both ends": {"targets": ["embed_in", "lm_head"], "strength": 8.0},
    },
}


def base_of(name: str, folder: Path) -> Path:
    return (
        make_tiny_model("llama", folder, tie_word_embeddings=True) if name == "tied" else make_tiny_model(name, folder)
    )


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("base", KINDS)
def test_every_kind_of_adapter_answers_as_in_peft(base: str, kernel: str, tmp_path: Path) -> None:
    folder = base_of(base, tmp_path / "base")
    adapters = {
        kind: make_adapter(folder, tmp_path / str(seed), seed=seed, **how)
        for seed, (kind, how) in enumerate(KINDS[base].items())
    }
    rig = build_rig(load(folder), adapters, kernel=kernel, num_blocks=200)
    for kind in (None, *adapters):
        rig.add(str(kind), PROMPT, kind, max_tokens=12)
    rig.run()
    rig.close()

    unchanged = generate(with_adapter(folder, None), PROMPT, 12)
    for kind, adapter in adapters.items():
        tuned = with_adapter(folder, adapter)
        assert generate(tuned, PROMPT, 12) != unchanged, f"'{kind}' changes nothing, so this shows nothing"
        check_greedy(tuned, PROMPT, rig.tokens(kind))
    check_greedy(with_adapter(folder, None), PROMPT, rig.tokens("None"))
