"""A tiny random model of every causal language model type that transformers can build, saved as a checkpoint's folder.

Each type's own config, its sizes made small. Every threshold (window, chunk, original context) lies well inside the
context, so that a prompt of some dozen tokens passes all of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny_models import END_OF_TURN, VOCAB_SIZE, draw_weights, make_tokenizer

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Families of vision-language models, whose checkpoints hold a text part that is a decoder.
VISION_TYPES = (
    "aria",
    "aya_vision",
    "cohere2_vision",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "idefics3",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llama_3",
)
CONTEXT = 128
WINDOW = 10
ORIGINAL = 32
CHUNK = 16
_HIDDEN, _HEADS, _GROUPS, _HEAD_DIM, _WIDE, _LAYERS = 32, 4, 2, 8, 48, 2

_SIZES: dict[str, int] = {
    name: size
    for size, names in (
        (
            VOCAB_SIZE,
            "vocab_size unpadded_vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size "
            "encoder_hash_byte_group_vocab",
        ),
        (
            _HIDDEN,
            "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim emb_dim input_embedding_size "
            "output_embedding_size attention_hidden_size embedding_dim lru_width adapter_in_dim out_hidden_size "
            "vision_output_dim projector_input_dim projector_output_dim projector_hidden_size backbone_hidden_size "
            "shape_embed_dim pronunciation_embed_dim nemo_conv_channels depthwise_separable_out_channel "
            "ext_pw_out_channel",
        ),
        (
            _LAYERS,
            "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_encoder_layers "
            "num_decoder_layers",
        ),
        (
            _HEADS,
            "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
            "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads "
            "index_n_heads linear_num_value_heads linear_num_heads",
        ),
        (
            _GROUPS,
            "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups linear_num_key_heads",
        ),
        (
            _HEAD_DIM,
            "head_dim d_head dim_head kv_channels attention_head_size swa_head_dim global_head_dim attention_head_dim "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
            "index_head_dim rotary_dim mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim "
            "ssm_state_size state_size laurel_rank",
        ),
        (
            2 * _HEAD_DIM,
            "qk_head_dim kv_lora_rank q_lora_rank o_lora_rank index_topk hidden_size_per_layer_input chunk_size "
            "mamba_chunk_size mamba_headdim",
        ),
        (
            _WIDE,
            "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
            "shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size "
            "shared_intermediate_size ffn_hidden_size expert_ffn_hidden_size dim_ff dff intermediate_size_mlp "
            "dense_intermediate_size d_inner feed_forward_size router_hidden_size alignment_intermediate_size",
        ),
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts mamba_dt_rank time_step_rank"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts zero_expert_num"),
        (1, "n_group topk_group first_k_dense_replace"),
        (0, "num_kv_shared_layers bos_token_id pad_token_id start_token_id decoder_start_token_id"),
        (END_OF_TURN, "eos_token_id"),
        (3, "sep_token_id cls_token_id"),
        (
            CONTEXT,
            "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length "
            "context_length",
        ),
        (WINDOW, "sliding_window sliding_window_size attention_window_size window_size"),
        (CHUNK, "attention_chunk_size floor_scale log_scaling_n_floor"),
        (ORIGINAL, "original_max_position_embeddings"),
    )
    for name in names.split()
}
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")

# What a type wants beside that, or instead: mostly fields that its default config leaves out.
_COORDINATES = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]}  # of half of a head's turns
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _COORDINATES, "full_attention": None},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": _GROUPS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": _WIDE},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention"],
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": _WIDE},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 2 * _HEAD_DIM}}},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 2 * _HEAD_DIM}}},
    "glm4v_moe_text": {"rope_parameters": {**_COORDINATES, "partial_rotary_factor": 1.0}},
    "glm4v_text": {"rope_parameters": _COORDINATES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1], "floor_scale": 8192},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": _HEAD_DIM},
    "nemotron": {"num_key_value_heads": _GROUPS},
    "phi3": {"sliding_window": None},
    "phi4_multimodal_audio": {"num_blocks": _LAYERS},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen2_5_vl_text": {"rope_parameters": _COORDINATES},
    "qwen2_vl_text": {"rope_parameters": _COORDINATES},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xmod": {"default_language": "en_XX"},
    # Two layers with the shared block, whose inputs are the embedding's and the layer's side by side.
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 2 * _HIDDEN,
        "attention_head_dim": 2 * _HEAD_DIM,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": _HEADS,
        "attention_hidden_size": 2 * _HIDDEN,
        "attention_head_dim": 2 * _HEAD_DIM,
        "n_mamba_heads": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# Linears that a type's own code runs on other rows than a step's, too: adapters on them are refused by name.
NOT_ADAPTED: Mapping[str, tuple[str, ...]] = {"zaya": ("v_proj_delayed",)}

# Types without experts to adapt: PEFT's own adapters do not run on DBRX's, whose weights another module reads; of the
# others, which are no mixtures, attention has weights of three dimensions.
NO_EXPERTS = ("dbrx", "reformer", "xlnet")


# Families whose whole does not run in transformers, a text alone neither; what is compared with is their text part.
TEXT_ALONE = ("llama4",)


class Unbuildable(Exception):
    """transformers cannot make a tiny random model of this type from its config alone."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's own config with small sizes. Raises whatever its class raises."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_shrunk(config_class()))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def make_zoo_model(model_type: str, folder: Path, *, sees: bool = False, **overrides: Any) -> Path:
    """Save a tiny random model of a type in `folder` with a tokenizer; `overrides` replace fields of its config.

    `sees`: the model of images and text of that type. Raises Unbuildable.
    """
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        config = tiny_config(model_type)
        for name, value in overrides.items():
            setattr(config, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=torch.float32)
            draw_weights(model)
        with torch.inference_mode():
            what_runs(model.eval())(input_ids=torch.arange(4, 8)[None])
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def what_runs(model: Any) -> Any:
    """The model, or its text part where transformers runs nothing else of it."""
    return model.language_model if model.config.model_type in TEXT_ALONE and hasattr(model, "language_model") else model


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    own = config.to_dict()
    found: dict[str, Any] = {}
    for name, value in own.items():
        part = vars(config).get(name)
        if isinstance(value, dict) and isinstance(part, PretrainedConfig):
            found[name] = _shrunk(part)
        elif name == "per_layer_config":
            found[name] = {}
        elif isinstance(value, dict):
            found[name] = _shrunk_values(value)
        elif name in _SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = _SIZES[name]
    if own.get("kv_lora_rank") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = _HEADS
    found.update(_one_layer_of_each(own))
    special = dict(_SPECIAL.get(str(config.model_type), {}))
    for name in [n for n, value in special.items() if value is None and n in _LAYER_LISTS]:
        found.pop(name, None)
        del special[name]
    return found | special


def _shrunk_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A plain mapping (the parameters of the rotary embedding), its thresholds made small."""
    return {
        name: _shrunk_values(value) if isinstance(value, dict) else _SIZES.get(name, value)
        for name, value in values.items()
    }


def _one_layer_of_each(own: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: own[name] for name in _LAYER_LISTS if isinstance(own.get(name), list) and own[name]}
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=False)))
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    count = {"num_hidden_layers": len(kinds)} if "num_hidden_layers" in own else {}
    return {name: [kind[i] for kind in kinds] for i, name in enumerate(lists)} | count
