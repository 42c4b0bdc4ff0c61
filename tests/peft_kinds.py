"""Adapters of every kind that the installed PEFT can make for a decoder, written by PEFT itself with random numbers."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from manylora.identity import TENSOR_FILE
from manylora.lora.format import tensors as safetensors_file
from manylora.lora.format.methods.prompts import PROMPTS
from manylora.lora.format.problems import Problems
from manylora.lora.format.spec import AdaptedModule, Adapter, Dense, Input, LowRank, Output, Prefix, Term, TokenRows
from manylora.lora.format.tensors import TensorView

# Linears of a small Llama, whose sizes are 64 (hidden), 32 (keys, values) and 96 (inside the MLP).
_ATTENTION = ["q_proj", "v_proj"]
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_VIRTUAL = {"num_virtual_tokens": 3}
_SQUARE = ["q_proj", "o_proj"]


_MORE = frozenset({"bias", "lora_bias", "modules_to_save", "trainable_token_indices", "use_dora"})


@dataclass(frozen=True)
class Kind:
    """One configuration of one of PEFT's methods.

    `strength`: how far random numbers are from what training starts at. `settings` are of the method's config class.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 0.3

    @property
    def acts_on_prompts(self) -> bool:
        """Whether it does more than change the rows of a step, so that it is served alone and in no mix."""
        return self.method in PROMPTS or "alora_invocation_tokens" in self.settings

    @property
    def has_more_than_low_rank(self) -> bool:
        """Of a LoRA adapter: whether it changes anything in another way."""
        return bool(_MORE & self.settings.keys())


def _lora(**settings: Any) -> Kind:
    return Kind("LORA", {"r": 4, "lora_alpha": 8, "target_modules": _LINEARS, **settings})


def _virtual(method: str, **settings: Any) -> Kind:
    return Kind(method, {**_VIRTUAL, **settings}, strength=1.0)


KINDS: Final[Mapping[str, Kind]] = {
    "LoRA": _lora(),
    "LoRA on all linears": _lora(target_modules="all-linear"),
    "LoRA by a pattern": _lora(target_modules=r".*layers\.0\.mlp\.down_proj", r=8),
    "LoRA on some layers": _lora(target_modules=_ATTENTION, layers_to_transform=[1]),
    "LoRA with exclusions": _lora(exclude_modules=["k_proj", "down_proj"]),
    "LoRA with ranks by pattern": _lora(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 9}),
    "LoRA with alphas by pattern": _lora(alpha_pattern={"down_proj": 24, "v_proj": 1}),
    "LoRA on the embedding": _lora(target_modules=["embed_tokens", "q_proj"]),
    "LoRA on the head": _lora(target_modules=["lm_head", "q_proj"]),
    "rsLoRA": _lora(use_rslora=True),
    "LoRA, gaussian": _lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "PiSSA": _lora(init_lora_weights="pissa"),
    "PiSSA, fast": _lora(init_lora_weights="pissa_niter_4"),
    "OLoRA": _lora(init_lora_weights="olora"),
    "DoRA": _lora(use_dora=True),
    "DoRA with rsLoRA": _lora(use_dora=True, use_rslora=True, target_modules="all-linear"),
    "DoRA on the embedding": _lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "DoRA on the head": _lora(use_dora=True, target_modules=["lm_head", "v_proj"]),
    "LoRA with all biases": _lora(bias="all"),
    "LoRA with its own biases": _lora(bias="lora_only"),
    "LoRA with a bias on B": _lora(lora_bias=True),
    "QALoRA": _lora(use_qalora=True, qalora_group_size=16),
    "LoRA with a saved linear": _lora(target_modules=_ATTENTION, modules_to_save=["down_proj"]),
    "LoRA with a saved head": _lora(modules_to_save=["lm_head"]),
    "LoRA with a saved embedding": _lora(modules_to_save=["embed_tokens"]),
    "LoRA with saved embedding and head": _lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA with a saved norm": _lora(modules_to_save=["input_layernorm", "norm"]),
    "LoRA with trained tokens": _lora(trainable_token_indices=[7, 12, 250]),
    "LoRA with tokens of a named embedding": _lora(trainable_token_indices={"embed_tokens": [7, 44]}),
    "LoRA on parameters": _lora(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]),
    "LoRA with repeated layers": _lora(layer_replication=[[0, 2], [1, 2]]),
    "aLoRA": _lora(alora_invocation_tokens=[33, 250]),
    "BD-LoRA": _lora(
        target_modules=["q_proj", "o_proj"],
        use_bdlora={"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj"], "nblocks": 2},
    ),
    "AdaLoRA": Kind("ADALORA", {"init_r": 6, "target_r": 4, "total_step": 10, "target_modules": _LINEARS}),
    "AdaMSS": Kind("ADAMSS", {"r": 8, "num_subspaces": 2, "target_modules": _ATTENTION}),
    "BEFT": Kind("BEFT", {"target_modules": _ATTENTION}),
    "BOFT": Kind("BOFT", {"boft_block_size": 4, "target_modules": _LINEARS}),
    "BOFT by blocks": Kind("BOFT", {"boft_block_num": 8, "boft_block_size": 0, "target_modules": _ATTENTION}),
    "C3A": Kind("C3A", {"block_size": 32, "target_modules": _LINEARS}),
    "DEFT": Kind("DEFT", {"r": 4, "target_modules": _LINEARS}),
    "DEFT by QR": Kind("DEFT", {"r": 4, "decomposition_method": "qr", "target_modules": _ATTENTION}),
    "DeLoRA": Kind("DELORA", {"r": 4, "target_modules": _LINEARS}),
    "FourierFT": Kind("FOURIERFT", {"n_frequency": 40, "target_modules": _LINEARS}),
    "FRoD": Kind("FROD", {"target_modules": _SQUARE}),
    "GLoRA": Kind("GLORA", {"r": 4, "target_modules": _LINEARS}),
    "GraLoRA": Kind("GRALORA", {"r": 8, "target_modules": _LINEARS}),
    "GraLoRA, hybrid": Kind("GRALORA", {"r": 8, "hybrid_r": 4, "target_modules": _LINEARS}),
    "HiRA": Kind("HIRA", {"r": 4, "target_modules": _LINEARS}),
    "HRA": Kind("HRA", {"r": 4, "target_modules": _LINEARS}),
    "HRA, orthogonal": Kind("HRA", {"r": 4, "apply_GS": True, "target_modules": _ATTENTION}),
    "IA3": Kind("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "IA3 on the inputs of a group": Kind(
        "IA3", {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"]}
    ),
    "Lily": Kind("LILY", {"r": 4, "target_modules": _LINEARS}),
    "LN tuning": Kind("LN_TUNING", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "LoHa": Kind("LOHA", {"r": 3, "target_modules": _LINEARS}, strength=0.6),
    "LoKr": Kind("LOKR", {"r": 2, "target_modules": _LINEARS}),
    "LoKr, both decomposed": Kind("LOKR", {"r": 2, "decompose_both": True, "target_modules": _LINEARS}),
    "MiSS": Kind("MISS", {"r": 8, "target_modules": _LINEARS}),
    "MiSS, bat": Kind("MISS", {"r": 8, "init_weights": "bat", "target_modules": _LINEARS}),
    "MiSS, mini": Kind("MISS", {"r": 8, "init_weights": "mini", "mini_r": 8, "target_modules": _LINEARS}),
    "OFT": Kind("OFT", {"oft_block_size": 16, "target_modules": _LINEARS}),
    "OFT, exact": Kind("OFT", {"oft_block_size": 8, "use_cayley_neumann": False, "target_modules": _LINEARS}),
    "OFT, shared": Kind("OFT", {"oft_block_size": 8, "block_share": True, "target_modules": _LINEARS}),
    "OFT, constrained": Kind("OFT", {"oft_block_size": 8, "coft": True, "eps": 2.0, "target_modules": _ATTENTION}, 1.0),
    "OSF": Kind("OSF", {"target_modules": _ATTENTION}),
    "PEANuT": Kind("PEANUT", {"r": 4, "target_modules": _LINEARS}),
    "PSOFT": Kind("PSOFT", {"r": 4, "target_modules": _LINEARS}),
    "PVeRA": Kind("PVERA", {"r": 8, "target_modules": _LINEARS}),
    "RandLora": Kind("RANDLORA", {"r": 4, "randlora_alpha": 64, "target_modules": _LINEARS}),
    "RoAd 1": Kind("ROAD", {"variant": "road_1", "group_size": 16, "target_modules": _LINEARS}),
    "RoAd 2": Kind("ROAD", {"variant": "road_2", "group_size": 16, "target_modules": _LINEARS}),
    "RoAd 4": Kind("ROAD", {"variant": "road_4", "group_size": 16, "target_modules": _LINEARS}),
    "SHiRA": Kind("SHIRA", {"r": 4, "random_seed": 1, "target_modules": _LINEARS}),
    "Super-tuning": Kind("SUPERTUNING", {"sparsity": 0.9, "target_modules": _ATTENTION}),
    "TinyLoRA": Kind("TINYLORA", {"u": 8, "target_modules": _LINEARS}, strength=1.0),
    "Trained tokens": Kind("TRAINABLE_TOKENS", {"token_indices": [7, 12, 250], "target_modules": ["embed_tokens"]}),
    "UniLoRA": Kind("UNILORA", {"r": 4, "theta_d_length": 64, "save_indices": True, "target_modules": _LINEARS}),
    "UniLoRA without its indices": Kind("UNILORA", {"r": 4, "theta_d_length": 64, "target_modules": _ATTENTION}),
    "VB-LoRA": Kind("VBLORA", {"r": 4, "num_vectors": 16, "vector_length": 16, "target_modules": _ATTENTION}),
    "VB-LoRA, top k alone": Kind(
        "VBLORA",
        {"num_vectors": 16, "vector_length": 16, "save_only_topk_weights": True, "target_modules": _ATTENTION},
    ),
    "VeRA": Kind("VERA", {"r": 8, "target_modules": _LINEARS}, strength=1.0),
    "VeRA without its projections": Kind("VERA", {"r": 8, "save_projection": False, "target_modules": _ATTENTION}),
    "WaveFT": Kind("WAVEFT", {"n_frequency": 40, "target_modules": _LINEARS}),
    "Prompt tuning": _virtual("PROMPT_TUNING"),
    "P-tuning": _virtual("P_TUNING", encoder_hidden_size=16),
    "P-tuning with an LSTM": _virtual("P_TUNING", encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
    "Prefix tuning": _virtual("PREFIX_TUNING"),
    "Prefix tuning, projected": _virtual("PREFIX_TUNING", prefix_projection=True, encoder_hidden_size=16),
    "Multitask prompt tuning": _virtual("MULTITASK_PROMPT_TUNING", num_tasks=2),
    "Cartridge": _virtual("CARTRIDGE"),
    "CPT": _virtual(
        "CPT", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], num_virtual_tokens=3
    ),
    "Llama-Adapter": Kind("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 1, "target_modules": "self_attn"}),
    "Poly": Kind("POLY", {"r": 4, "target_modules": _ATTENTION}),
    "Shadow": Kind("SHADOW", {"target_modules": _ATTENTION}),
}
# Those that are not served, each with a word of the reason that is given.
REFUSED: Final[Mapping[str, str]] = {
    "PiSSA, fast": "path_initial_model_for_weight_conversion",
    "LoRA with repeated layers": "repeated layers",
    "BD-LoRA": "another layout",
    "AdaMSS": "not in the file",
    "Lily": "hidden states",
    "PSOFT": "signs of a decomposition",
    "UniLoRA without its indices": "save_indices=True",
    "VeRA without its projections": "save_projection=True",
    "Multitask prompt tuning": "virtual tokens",
    "Llama-Adapter": "inside the attention",
    "Poly": "mixes skills",
    "Shadow": "a model of its own",
}
OUTCOMES: Final = Path(__file__).parent / "peft_kinds.json"
METHODS: Final = frozenset(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def tensors_of(folder: Path) -> dict[str, TensorView]:
    """An adapter's file."""
    found = safetensors_file.parse(safetensors_file.map_file(folder / TENSOR_FILE), Problems())
    assert found is not None
    return found


def per_token(module: AdaptedModule, term: Term) -> int:
    """How many numbers of a term a token is multiplied by, or has added."""
    is_embedding = module.kind == "embedding"
    match term:
        case LowRank():
            return prod(term.b.shape) + (term.rank if is_embedding else prod(term.a.shape))
        case Dense():
            return term.matrix.shape[0] if is_embedding else prod(term.matrix.shape)
        case TokenRows():
            return term.rows.shape[1] if is_embedding else prod(term.rows.shape)
        case Prefix():
            return 0  # its positions are looked back at
        case _:
            return sum(prod(matrix.shape) for matrix in term.matrices)


def outcome_of(name: str, adapter: Adapter | None, size_bytes: int) -> dict[str, Any]:
    """What `docs/adapters.md` says of a kind: what it becomes, its work for each token, the memory for each byte."""
    if adapter is None:
        return {"method": KINDS[name].method, "becomes": "", "per_token": None, "memory": ""}
    terms = [term for module in adapter.modules for term in module.terms]
    words = {
        LowRank: "low rank", Dense: "dense", TokenRows: "rows", Input: "input", Output: "output",
        Prefix: "virtual tokens",
    }  # fmt: skip
    found = {type(term) for term in terms}
    taken = sum(matrix.num_bytes for term in terms for matrix in term.matrices)
    return {
        "method": KINDS[name].method,
        "becomes": ", ".join(word for kind, word in words.items() if kind in found),
        "per_token": sum(per_token(module, term) for module in adapter.modules for term in module.terms),
        "memory": f"{taken / size_bytes:.1f}",
    }


def config_of(kind: Kind) -> PeftConfig:
    settings = deepcopy(
        kind.settings
    )  # PEFT writes into lists that it is given, such as `modules_to_save` of a tied head
    config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[kind.method](task_type="CAUSAL_LM", **settings)
    return config


def make_kind(model_dir: Path, folder: Path, name: str, *, seed: int = 0, **changed: Any) -> Path:
    """Save an adapter of one of `KINDS` for the model in `model_dir`; `changed` are settings in place of its own."""
    torch.manual_seed(seed)
    kind = KINDS[name]
    kind = Kind(kind.method, {**kind.settings, **changed}, kind.strength)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings():  # of what PEFT sets right by itself
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config_of(kind))
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    spread = kind.strength * max(float(weight.float().std()) if weight.numel() > 1 else 0.0, 0.2)
                    weight.add_(torch.randn_like(weight) * spread)
        tuned.save_pretrained(folder)
    return folder
