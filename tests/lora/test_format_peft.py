"""Adapters that PEFT itself wrote, read back: the deltas are PEFT's own."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, VeloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Conv1D,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
)

from manylora.errors import InvalidAdapter
from manylora.lora.format.config import canonical
from manylora.lora.format.reader import Adapter, ModuleKind, ModuleSpec, digest_of, read, read_trusted
from tests.lora.malformed import TINY_LLAMA, tiny_modules
from tests.lora.plain import plain_modules

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**TINY_LLAMA),
    "tied llama": lambda: LlamaConfig(**{**TINY_LLAMA, "tie_word_embeddings": True}),
    "phi3": lambda: Phi3Config(**TINY_LLAMA, pad_token_id=0),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
}


def specs_of(model: torch.nn.Module) -> dict[str, ModuleSpec]:
    specs = {}
    for path, module in model.named_modules():
        kind: ModuleKind
        if isinstance(module, torch.nn.Linear):
            kind, inside, outside = "linear", module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            kind, (inside, outside) = "conv1d", module.weight.shape
        elif isinstance(module, torch.nn.Embedding):
            kind, inside, outside = "embedding", module.num_embeddings, module.embedding_dim
        else:
            continue
        specs[path] = ModuleSpec(path, kind, inside, outside)
    return specs


def save(
    architecture: str, folder: Path, lora: LoraConfig, *, is_trained: bool = True, **how: Any
) -> tuple[dict[str, ModuleSpec], dict[str, Any]]:
    """Writes a randomised adapter with PEFT; gives the base's modules and PEFT's delta weight per module."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    specs = specs_of(base)
    with warnings.catch_warnings():  # PEFT warns of tied weights and of embeddings that it saves as well
        warnings.simplefilter("ignore")
        model = get_peft_model(base, lora)
        for name, parameter in model.named_parameters():
            if is_trained and "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder, **how)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return specs, deltas


def check(folder: Path, specs: dict[str, ModuleSpec]) -> Adapter:
    return read(folder, specs, max_rank=64, max_size=2**24)


def assert_same_deltas(adapter: Adapter, specs: dict[str, ModuleSpec], deltas: dict[str, Any]) -> None:
    assert set(adapter.matched) == set(deltas)
    for module in plain_modules(adapter):
        delta = module.scale * (module.b.to_float32() @ module.a.to_float32())
        # PEFT gives the delta in the layout of the base's weight, which only nn.Linear stores [out, in].
        theirs = deltas[module.path] if specs[module.path].kind == "linear" else deltas[module.path].T
        np.testing.assert_allclose(delta, theirs, rtol=1e-4, atol=1e-5)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "whole paths": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "q_proj"]}),
    "pattern": ("llama", {"target_modules": r".*layers\.(0|1)\..*(q|v)_proj$"}),
    "pattern with a look-ahead": ("llama", {"target_modules": r"^(model(?=\.).*\.(o_proj|k_proj))$"}),
    "some layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "excluded names": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]}),
    "excluded pattern": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}),
    "lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied embedding": ("tied llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied head": ("tied llama", {"target_modules": ["lm_head", "q_proj"]}),
    "rsLoRA": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "r": 8}),
    "rank pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "v_proj": 6, r"layers\.\d+\.mlp\.up_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 40, "self_attn.v_proj": 10, "up.proj": 5},
        },
    ),
    "rank pattern with rsLoRA": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"proj": 2, "q_proj": 5, ".*gate_proj": 7},
            "use_rslora": True,
        },
    ),
    "Phi-3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "alpha_pattern": {"qkv_proj": 3}}),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
    "GPT-2 lm_head": ("gpt2", {"target_modules": ["c_fc", "lm_head", "wpe"], "layers_to_transform": None}),
    "GPT-2 all linear": ("gpt2", {"target_modules": "all-linear", "layers_pattern": None}),
    "GPT-2 some layers": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["h"]}),
    "GPT-NeoX": ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h", "embed_in", "lm_head"]}),
    "GPT-NeoX all linear": ("gpt_neox", {"target_modules": "all-linear"}),
    "MiCA": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "EVA": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "eva", "eva_config": EvaConfig()}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "VeLoRA": ("llama", {"target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_delta_is_pefts_own(tmp_path: Path, case: str) -> None:
    architecture, changes = CASES[case]
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **changes})
    specs, deltas = save(architecture, tmp_path, lora)
    assert_same_deltas(check(tmp_path, specs), specs, deltas)


@pytest.mark.parametrize("written", ["all-linear", "ALL-LINEAR"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_all_linear_left_in_the_config_means_what_peft_makes_of_it(
    tmp_path: Path, architecture: str, written: str
) -> None:
    specs, deltas = save(architecture, tmp_path, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    edit(tmp_path, target_modules=written)
    assert_same_deltas(check(tmp_path, specs), specs, deltas)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def llama(folder: Path, **changes: Any) -> tuple[dict[str, ModuleSpec], dict[str, Any]]:
    arguments = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM", **changes}
    return save("llama", folder, LoraConfig(**arguments), save_embedding_layers=False)


def test_modules_of_the_tiny_base_are_those_of_the_real_model() -> None:
    assert tiny_modules() == specs_of(AutoModelForCausalLM.from_config(CONFIGS["llama"]()))


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: re.sub(r"lora_(A|B)\.weight$", r"lora_\1.default.weight", name),
        lambda name: re.sub(r"lora_embedding_(A|B)$", r"lora_embedding_\1.my-adapter", name),
    ],
)
def test_tensor_names_with_and_without_prefix_and_adapter_name_mean_the_same(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    specs, deltas = llama(tmp_path)
    rename(tmp_path, change)
    assert_same_deltas(check(tmp_path, specs), specs, deltas)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_served_dtype_is_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    specs, _ = llama(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    for module in plain_modules(check(tmp_path, specs)):
        if module.kind == "linear":
            name = f"base_model.model.{module.path}.lora_A.weight"
            np.testing.assert_array_equal(module.a.to_float32(), tensors[name].float().numpy())


def test_copy_of_the_embedding_that_peft_saves_is_left_aside_with_a_warning(tmp_path: Path) -> None:
    arguments = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    specs, deltas = save("llama", tmp_path, arguments)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    adapter = check(tmp_path, specs)
    assert_same_deltas(adapter, specs, deltas)
    assert any("copy of the base's weight" in warning for warning in adapter.warnings)


def test_config_facts_are_those_that_peft_wrote(tmp_path: Path) -> None:
    specs, _ = llama(tmp_path, rank_pattern={"q_proj": 6}, lora_alpha=20)
    edit(tmp_path, base_model_name_or_path="org/base")
    adapter = check(tmp_path, specs)
    assert (adapter.rank, adapter.alpha, adapter.base_model_name_or_path) == (6, 20.0, "org/base")
    assert adapter.target_modules == ["embed_tokens", "q_proj"]
    assert adapter.size_bytes == sum(
        (tmp_path / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )


def test_config_of_an_early_peft_is_read(tmp_path: Path) -> None:
    specs, deltas = llama(tmp_path)
    early = {
        "base_model_name_or_path": "org/base", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 8.0, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "embed_tokens"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(early))
    assert_same_deltas(check(tmp_path, specs), specs, deltas)


def test_switched_off_key_of_a_later_peft_is_a_warning_only(tmp_path: Path) -> None:
    specs, _ = llama(tmp_path)
    edit(tmp_path, use_next_years_lora=False)
    assert any("use_next_years_lora" in warning for warning in check(tmp_path, specs).warnings)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [3, 4], "modules_to_save": ["o_proj"]}, "alora_invocation_tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_adapter_that_peft_wrote_is_refused_by_name_alone(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    specs, _ = llama(tmp_path, **{"target_modules": ["q_proj"], **changes})
    with pytest.raises(InvalidAdapter) as caught:
        check(tmp_path, specs)
    assert [(p.code, p.where) for p in caught.value.problems] == [
        ("unsupported_feature", f"adapter_config.json: {named}")
    ]


def test_untrained_adapter_has_no_effect(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    specs, _ = save("llama", tmp_path, lora, is_trained=False)
    with pytest.raises(InvalidAdapter) as caught:
        check(tmp_path, specs)
    assert [p.code for p in caught.value.problems] == ["no_effect"]


def test_trusted_read_gives_the_same_modules(tmp_path: Path) -> None:
    """To the last bit: what an upload packed and what is read again later answer alike."""
    specs, deltas = llama(tmp_path, rank_pattern={"q_proj": 6}, alpha_pattern={"layers.1.self_attn.q_proj": 7})
    trusted = read_trusted(tmp_path, specs, digest="known")
    assert_same_deltas(trusted, specs, deltas)
    assert trusted.digest == "known"

    def content(adapter: Adapter) -> list[tuple[str, int, float, bytes, bytes]]:
        return [(m.path, m.rank, m.scale, bytes(m.a.data), bytes(m.b.data)) for m in plain_modules(adapter)]

    assert content(trusted) == content(check(tmp_path, specs))


def test_digest_does_not_depend_on_the_files_layout(tmp_path: Path) -> None:
    specs, _ = llama(tmp_path)
    first = check(tmp_path, specs).digest
    assert digest_of(tmp_path) == first
    path = tmp_path / "adapter_model.safetensors"
    save_file(dict(reversed(load_file(path).items())), path, metadata={"note": "written again"})
    edit(tmp_path, target_modules=["embed_tokens", "q_proj"])
    edit(tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert digest_of(tmp_path) == first


@pytest.mark.parametrize(
    ("table", "is_told_apart"),
    [
        ({"layers.0.self_attn.q_proj": 4, "q_proj": 8}, True),
        ({"model.layers.0.self_attn.q_proj": 4, r"^model\.layers\.0\.self_attn\.q_proj$": 8}, True),
        ({"self.attn.q_proj": 4, "self_attn.q_proj": 8}, True),
        ({r"layers\.0\..*": 4, r".*q_proj": 8}, True),
        ({"layers.0.self_attn.q_proj": 8, "q_proj": 8}, False),
        ({r"layers\.0\..*": 8, r".*q_proj": 8}, False),
        ({"layers.0.self_attn.q_proj": 4, "layers.1.self_attn.q_proj": 8}, False),
        ({"xq_proj": 4, "q_proj": 8}, False),
        ({"^q_proj": 4, "self_attn.q_proj": 8}, False),
    ],
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_digest_tells_orders_apart_in_which_other_keys_come_first(
    tmp_path: Path, field: str, table: dict[str, int], is_told_apart: bool
) -> None:
    llama(tmp_path)
    digests = []
    for items in (sorted(table.items()), sorted(table.items(), reverse=True)):
        edit(tmp_path, **{field: dict(items)})
        digests.append(digest_of(tmp_path))
    assert (digests[0] != digests[1]) == is_told_apart


def test_digest_of_a_stored_adapter_stays_what_it_was() -> None:
    """Written down by the version that sorted every table: only orders that make a difference have another one now."""
    sorted_ones = {"r": 8, "rank_pattern": {"a.q": 1, "b.q": 2}, "alpha_pattern": {"a.q": 4, "q": 8}}
    assert canonical(sorted_ones) == b'{"alpha_pattern":{"a.q":4,"q":8},"r":8,"rank_pattern":{"a.q":1,"b.q":2}}'
    assert canonical({**sorted_ones, "rank_pattern": {"b.q": 2, "a.q": 1}}) == canonical(sorted_ones)
    assert canonical({**sorted_ones, "alpha_pattern": {"q": 8, "a.q": 4}}) != canonical(sorted_ones)


def test_digest_depends_on_config_and_values(tmp_path: Path) -> None:
    llama(tmp_path)
    digests = {digest_of(tmp_path)}
    edit(tmp_path, lora_alpha=99)
    digests.add(digest_of(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, path)
    digests.add(digest_of(tmp_path))
    assert len(digests) == 3
