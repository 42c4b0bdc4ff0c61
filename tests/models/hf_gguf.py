"""GGUF files out of tiny Hugging Face models, as llama.cpp's converter lays them out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}
_OTHERS = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    raw: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """Write the model in `folder` to `path`, which it returns.

    `keys` are of the architecture, `raw` whole; both replace what comes out of the config, and `None` leaves a key
    out. `tensors` are added, those in `leave_out` are not written.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture)
    values = {f"{architecture}.{key}": value for key, value in {**_keys(config), **(keys or {})}.items()}
    for key, value in {**values, **(raw or {})}.items():
        if value is not None:
            _add(writer, key, value)
    _add_tokenizer(writer, folder, raw or {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, array in {**_tensors(model, architecture), **(tensors or {})}.items():
        if name not in leave_out:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _keys(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
    }
    if hasattr(config, "num_key_value_heads"):
        found["attention.head_count_kv"] = config.num_key_value_heads
    if hasattr(config, "rms_norm_eps"):
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    else:
        found["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    if rope:
        rope = rope.get("full_attention", rope)
        found["rope.freq_base"] = float(rope["rope_theta"])
        found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
        found |= {"attention.key_length": head, "attention.value_length": head}
    for name, key in _OTHERS.items():
        if (value := getattr(config, name, None)) is not None:
            found[key] = value
    return found


def _add_tokenizer(writer: GGUFWriter, folder: Path, raw: Mapping[str, Any]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    writer.add_tokenizer_model("gpt2")
    if "tokenizer.ggml.pre" not in raw:
        writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in vocabulary])
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _tensors(model: Any, architecture: str) -> dict[str, npt.NDArray[np.float32]]:
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, end = name.rpartition(".")
        renamed = names.get_name(stem)
        assert renamed is not None, name
        array = parameter.numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            config = model.config
            array = _paired(array, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        elif architecture.startswith("gemma") and "norm" in name:
            array = array + 1
        elif architecture == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        found[f"{renamed}.{end}"] = np.ascontiguousarray(array)
    return found


def _paired(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp turns neighbouring numbers of a head, transformers those half a head apart."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
