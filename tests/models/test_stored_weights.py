"""What an adapter says of its base's own numbers is held against the base's checkpoint."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CodeGenConfig, GPTJConfig, MixtralConfig, PhiConfig

from manylora.catalog.upload import Rules
from manylora.errors import InvalidAdapter
from manylora.identity import TENSOR_FILE
from manylora.lora.format.contents import num_different
from manylora.lora.format.reader import Adapter, TensorView
from manylora.models.stored_weights import StoredWeights
from manylora.models.wrapping import adaptable_modules
from tests.engine.harness import load
from tests.tiny_adapters import make_adapter
from tests.tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer

BIASED: dict[str, Any] = {
    "phi": PhiConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64),
    "codegen": CodeGenConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
}


def make_base(kind: str, folder: Path) -> Path:
    if kind == "tied":
        return make_tiny_model("llama", folder, tie_word_embeddings=True)
    if kind not in BIASED:
        return make_tiny_model(kind, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BIASED[kind])
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def read(base: Path, adapter: Path) -> Adapter:
    modules = adaptable_modules(load(base))
    return Rules(modules, 64, 2**30, StoredWeights(base, modules)).read(adapter)


def change(adapter: Path, ending: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(adapter / TENSOR_FILE)
    (name,) = [name for name in tensors if name.endswith(ending)]
    save_file({**tensors, name: how(tensors[name]).contiguous()}, adapter / TENSOR_FILE, {"format": "pt"})


CASES = [
    ("llama", ["embed_tokens", "q_proj"], "embed_tokens.base_layer.weight"),
    ("llama", ["lm_head", "q_proj"], "lm_head.base_layer.weight"),
    ("tied", ["embed_tokens", "q_proj"], "embed_tokens.base_layer.weight"),
    ("tied", ["lm_head"], "lm_head.base_layer.weight"),
    ("gpt2", ["wte", "c_attn"], "wte.base_layer.weight"),
    ("gpt_neox", ["embed_in", "query_key_value"], "embed_in.base_layer.weight"),
    ("phi", ["lm_head"], "lm_head.base_layer.bias"),
    ("phi", ["lm_head"], "lm_head.base_layer.weight"),
    ("gptj", ["lm_head"], "lm_head.base_layer.bias"),
    ("codegen", ["lm_head"], "lm_head.base_layer.bias"),
]


@pytest.mark.parametrize(("kind", "targets", "ending"), CASES)
def test_an_equal_copy_is_left_aside_and_another_is_refused(
    kind: str, targets: list[str], ending: str, tmp_path: Path
) -> None:
    base = make_base(kind, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=2, targets=targets)
    tensors = load_file(adapter / TENSOR_FILE)
    if not any(name.endswith(ending) for name in tensors):  # PEFT saves those only that it knows by name
        weights = load(base).state_dict()
        (name,) = [name for name in weights if name.endswith(ending.replace(".base_layer", ""))]
        tensors[f"base_model.model.{name.replace('.weight', '.base_layer.weight')}"] = weights[name].clone()
        save_file(tensors, adapter / TENSOR_FILE, {"format": "pt"})

    warnings = read(base, adapter).warnings

    assert any(ending in warning and "equal to it" in warning for warning in warnings), warnings
    change(adapter, ending, lambda tensor: tensor * 1.01)
    with pytest.raises(InvalidAdapter) as caught:
        read(base, adapter)
    assert [(p.code, ending in p.where) for p in caught.value.problems] == [("base_mismatch", True)]
    assert "numbers are not those of this base's" in caught.value.problems[0].message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_that_was_rounded_is_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=2, targets=["embed_tokens"])
    change(adapter, "base_layer.weight", lambda tensor: tensor.to(dtype))

    assert any("equal to it" in warning for warning in read(base, adapter).warnings)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_only_a_rounding_makes_a_copy_equal(stored: torch.dtype, trained: torch.dtype, saved: torch.dtype) -> None:
    base = (torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 0.02).to(stored)
    copy = base.to(trained).to(saved)
    assert num_different(view_of(copy), view_of(base)) == 0
    for place, factor in (((3, 4), 1.01), ((7, 7), 0.99)):
        other = copy.clone()
        other[place] *= factor
        assert num_different(view_of(other), view_of(base)) > 0
    assert num_different(view_of(copy), view_of(base * 1.01)) > 0


def test_numbers_that_were_trained_a_little_are_others() -> None:
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert num_different(view_of(base + 1e-3), view_of(base)) == base.numel()
    assert num_different(view_of(base * 1.001), view_of(base)) > 1000
    one = base.clone()
    one[5, 6] *= 1.0001
    assert num_different(view_of(one), view_of(base)) == 1


def view_of(tensor: torch.Tensor) -> TensorView:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    data = memoryview(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return TensorView(names[tensor.dtype], tuple(tensor.shape), data)


def test_one_row_that_was_trained_is_enough(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=2, targets=["embed_tokens"])

    def train(tensor: torch.Tensor) -> torch.Tensor:
        tensor[5] += 0.1
        return tensor

    change(adapter, "base_layer.weight", train)
    with pytest.raises(InvalidAdapter, match="64 of its 20480 numbers"):
        read(base, adapter)


def test_without_the_base_nothing_is_claimed(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=2, targets=["embed_tokens"])

    told = Rules(adaptable_modules(load(base)), 64, 2**30).read(adapter).warnings

    assert any("was not compared" in warning for warning in told)


@pytest.mark.parametrize(
    "experts",
    [
        {"target_modules": ["w1", "w2", "w3"], "name": "block_sparse_moe.experts.{}.w1"},
        {"target_modules": ["q_proj", "gate_proj"], "name": "mlp.experts.{}.gate_proj"},
    ],
)
def test_adapters_on_single_experts_get_one_message(experts: dict[str, Any], tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=2, targets=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": experts["target_modules"]}))
    tensors = load_file(adapter / TENSOR_FILE)
    for number in range(60):
        path = f"base_model.model.model.layers.0.{experts['name'].format(number)}"
        tensors |= {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, adapter / TENSOR_FILE, {"format": "pt"})

    with pytest.raises(InvalidAdapter) as caught:
        read(base, adapter)

    (problem,) = caught.value.problems
    assert "60 modules of single experts" in problem.message
    assert "merge_and_unload" in problem.message


def test_experts_that_a_base_has_not_are_refused_with_one_message(tmp_path: Path) -> None:
    """As PEFT writes them for `all-linear` on a mixture, by `target_parameters`."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    modules = adaptable_modules(base)  # without those of the mixture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        tuned.save_pretrained(tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        Rules(modules, 64, 2**30).read(tmp_path)
    (problem,) = caught.value.problems
    assert problem.code == "unmatched_module"
    assert "4 tensors of experts" in problem.message
