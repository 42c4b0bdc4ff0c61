"""What a GGUF file says of its model, as a transformers config: all of it, or a refusal that names the rest.

transformers reads the keys that it knows and passes over the others: a rotary embedding that is scaled, a window or a
soft cap would be left out without a word. Here every key of the architecture is put into the config where it has a
place for it, and is then held against the finished config.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.errors import ModelUnusable

__all__ = ["ROPE_TENSORS", "GgufFile", "config_of", "read_file"]

# The vocabulary: long, and the tokenizer's business.
_VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
# llama.cpp keeps divisors of the rotary frequencies as tensors.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_SHOWN = 6

# Key -> the config's name for it; the first that the class of config has.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual", "parallel_attn"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_NONE_WHEN_ZERO = _CAPS | {"attention.sliding_window"}
# Keys without a place in a config, with the values that say what every model does.
_ALWAYS: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.finetuned": (True, False),
}
_LISTS = frozenset({"layer_types", "eos_token_id", "architectures"})  # any other has a value for each layer
_NOTES = frozenset({"tensor_data_layout"})
_PARTLY_ROTARY = frozenset({"phi3", "stablelm", "nemotron"})
# Gemma's 27B models scale by the width of a head as it would be if the heads shared the hidden size, and GGUF says so
# by their number of layers only.
_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file without its weights. `metadata` has no vocabulary; `tensors` are names; `rope` is those of the
    rotary embedding, each [rotary width / 2].
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: frozenset[str]
    rope: Mapping[str, npt.NDArray[np.float32]]

    def of_architecture(self) -> dict[str, Any]:
        """The keys of the architecture, without its name."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    def refusal(self, reason: str) -> ModelUnusable:
        return ModelUnusable(f"{self.path} {reason} Serve the original Hugging Face checkpoint instead.")


def read_file(path: Path) -> GgufFile:
    """Header and rotary tensors. Raises ValueError or LookupError for a damaged file, ModelUnusable for a part."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if key not in _VOCABULARY}
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise ModelUnusable(
            f"{path} is one of {parts} parts. Join them with `llama-gguf-split --merge`, and give the whole file."
        )
    rope = {
        tensor.name: np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(-1)
        for tensor in reader.tensors
        if tensor.name in ROPE_TENSORS
    }
    names = frozenset(str(tensor.name) for tensor in reader.tensors)
    return GgufFile(path, str(metadata["general.architecture"]), metadata, names, rope)


def config_of(file: GgufFile, read: Mapping[str, Any]) -> Any:
    """The config of the file's model; `read` is what transformers read out of it.

    Raises ModelUnusable with the keys that the config has no place for.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(read["model_type"])
    if kind not in CONFIG_MAPPING:
        raise file.refusal(f"holds a model of type {kind!r}, which transformers does not have.")
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    said = file.of_architecture()
    # A class of config has the ids of its first model's tokenizer as defaults.
    unnamed = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    values = {**unnamed, **read, **_fields(said, known), **_gemma(said, kind, known)}
    values.pop("model_type")
    values = {key: value for key, value in values.items() if not isinstance(value, list) or key in _LISTS}
    used: set[str] = set()
    if "rope_parameters" in known:
        rope, used = _rope(file, said, values, kind)
        for old in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
            values.pop(old, None)
        values["rope_parameters"] = rope
        if "original_max_position_embeddings" in known:  # where there is such a field, it overrules the parameters'
            original = rope.get("original_max_position_embeddings") or said.get("context_length")
            values["original_max_position_embeddings"] = original
    try:
        config = AutoConfig.for_model(kind, **values)
    except Exception as error:  # a class of config checks its own values, and raises what it likes
        said_by_it = " ".join(str(error).split())[:300]
        raise file.refusal(f"says of its {kind} model what transformers refuses ({said_by_it}).") from error
    unused = sorted(key for key in said.keys() - used - _NOTES if not _is_met(key, said[key], config, known))
    unused += sorted(name for name in file.rope if name not in used)
    if unused:
        shown = [f"{name} = {_short(said[name])}" if name in said else name for name in unused[:_SHOWN]]
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        raise file.refusal(
            f"says {', '.join(shown)}{more} of its {file.architecture} model, which cannot be followed here: its "
            "answers would be wrong."
        )
    return config


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _alike(value: Any) -> Any:
    """One value for all layers where the file has the same for each; None where they differ."""
    if not isinstance(value, list):
        return value
    return value[0] if value and all(one == value[0] for one in value) else None


def _fields(said: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, names in _FIELDS.items():
        name = next((name for name in names if name in known), None)
        value = _alike(said.get(key))
        if name is not None and value is not None:
            found[name] = float(value) if key in _CAPS else value
            if key in _NONE_WHEN_ZERO and not value:
                found[name] = None
    return found


def _gemma(said: Mapping[str, Any], kind: str, known: set[str]) -> dict[str, Any]:
    """What attention is scaled by, and which layers have the window."""
    found: dict[str, Any] = {}
    if "query_pre_attn_scalar" in known:
        if said.get("attention.scale"):
            found["query_pre_attn_scalar"] = round(1 / said["attention.scale"] ** 2)
        elif said.get("block_count") == _GEMMA_27B.get(kind):
            found["query_pre_attn_scalar"] = said["embedding_length"] // said["attention.head_count"]
    pattern = said.get("attention.sliding_window_pattern")
    if pattern is not None and "layer_types" in known:
        found["layer_types"] = _layer_types(pattern, said["block_count"])
    return found


def _layer_types(pattern: Any, num_layers: int) -> list[str]:
    """Each layer's type, from a flag for each, or from the distance between layers without the window."""
    if isinstance(pattern, list):
        windowed = [bool(flag) for flag in pattern]
    else:
        windowed = [pattern > 0 and (layer + 1) % pattern != 0 for layer in range(num_layers)]
    return ["sliding_attention" if has_window else "full_attention" for has_window in windowed]


def _head_dim(values: Mapping[str, Any]) -> int:
    return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def _rope(
    file: GgufFile, said: Mapping[str, Any], values: Mapping[str, Any], kind: str
) -> tuple[dict[str, Any], set[str]]:
    """The rotary embedding's parameters, and the keys and tensors that are in them."""
    used = {"rope.freq_base"}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base", 10_000.0))}
    width, head = said.get("rope.dimension_count"), _head_dim(values)
    if width == head:
        used.add("rope.dimension_count")
    elif width is not None and kind in _PARTLY_ROTARY and int(head * (width / head)) == width:
        used.add("rope.dimension_count")
        rope["partial_rotary_factor"] = width / head
    elif width is None and "partial_rotary_factor" in values:
        rope["partial_rotary_factor"] = values["partial_rotary_factor"]
    scaling, more = _scaling(file, said)
    rope |= scaling
    used |= more
    if kind == "gemma3_text":  # layers with the window have a rotary embedding of their own, which is never scaled
        local = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base_swa", 10_000.0))}
        return {"full_attention": rope, "sliding_attention": local}, used | {"rope.freq_base_swa"}
    return rope, used


def _scaling(file: GgufFile, said: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """What is beside the base frequency, and the keys and tensors that say it.

    As in llama.cpp, a factor without a type is linear, and YaRN's attention factor is what the file says times
    1 + 0.1 ln(factor).
    """
    kind = said.get("rope.scaling.type", "linear")
    factor = float(said.get("rope.scaling.factor", said.get("rope.scale_linear", 1.0)) or 1.0)
    original = said.get("rope.scaling.original_context_length") or said.get("context_length")
    attention = float(said.get("rope.scaling.attn_factor", 1.0))
    used = {"rope.scaling.type"}
    if file.rope:
        if kind == "yarn" or factor != 1.0:
            return {}, set()
        return _divided(file, said, original, attention)
    plain = {"rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length"}
    if kind == "yarn":
        found = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(said.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(said.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
        used |= plain | {f"rope.scaling.{name}" for name in ("attn_factor", "yarn_beta_fast", "yarn_beta_slow")}
        return found, used | _neutral(said, {"rope.scaling.yarn_ext_factor": 1.0})
    if attention != 1.0 or kind not in ("linear", "none"):
        return {}, set()
    used |= plain | {"rope.scaling.attn_factor"} | _neutral(said, {"rope.scaling.yarn_log_multiplier": 0.0})
    if kind == "none" or factor == 1.0:
        return {}, used
    return {"rope_type": "linear", "factor": factor}, used


def _neutral(said: Mapping[str, Any], values: Mapping[str, float]) -> set[str]:
    return {key for key, value in values.items() if said.get(key) == value}


def _divided(
    file: GgufFile, said: Mapping[str, Any], original: Any, attention: float
) -> tuple[dict[str, Any], set[str]]:
    """Frequencies divided one by one: LongRoPE's two sets, or the one of Llama 3.1 and later, for every length."""
    short: npt.NDArray[np.float32] | None
    long: npt.NDArray[np.float32] | None
    if "rope_freqs.weight" in file.rope:
        short = long = file.rope["rope_freqs.weight"]
        original = said.get("context_length")  # one set of divisors: nothing changes before the end
        names = {"rope_freqs.weight"}
    else:
        short, long = (file.rope.get(f"rope_factors_{length}.weight") for length in ("short", "long"))
        names = {"rope_factors_short.weight", "rope_factors_long.weight"}
    if short is None or long is None:
        return {}, set()
    found = {
        "rope_type": "longrope",
        "short_factor": [float(number) for number in short],
        "long_factor": [float(number) for number in long],
        "original_max_position_embeddings": original,
        "factor": 1.0,
        "attention_factor": attention,
    }
    keys = ("type", "factor", "attn_factor", "original_context_length")
    return found, names | {f"rope.scaling.{key}" for key in keys}


def _is_met(key: str, value: Any, config: Any, known: set[str]) -> bool:
    """Whether the finished config says what the file says."""
    if key in _ALWAYS and value in _ALWAYS[key]:
        return True
    if key == "attention.sliding_window_pattern":
        return "layer_types" in known and config.layer_types == _layer_types(value, config.num_hidden_layers)
    if key == "context_length" and not set(_FIELDS[key]) & known:
        return True  # no embedding of positions: it limits nothing
    found = _READERS[key](config) if key in _READERS else _read(key, config, known)
    wanted = _alike(value)
    if found is None or wanted is None:
        return found is None and key in _NONE_WHEN_ZERO and value == 0
    return math.isclose(float(found), float(wanted), rel_tol=1e-5)


def _read(key: str, config: Any, known: set[str]) -> Any:
    name = next((name for name in _FIELDS.get(key, ()) if name in known), None)
    return None if name is None else getattr(config, name)


def _width_of_heads(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _num_kv_heads(config: Any) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return int(heads or config.num_attention_heads)


def _inner_width(config: Any) -> int:
    names = ("intermediate_size", "n_inner", "ffn_hidden_size")
    return int(next((n for name in names if (n := getattr(config, name, None))), 4 * config.hidden_size))


def _attention_scale(config: Any) -> float:
    return float((getattr(config, "query_pre_attn_scalar", None) or _width_of_heads(config)) ** -0.5)


_READERS: Mapping[str, Callable[[Any], float]] = {
    "attention.key_length": _width_of_heads,
    "attention.value_length": _width_of_heads,
    "attention.head_count_kv": _num_kv_heads,
    "feed_forward_length": _inner_width,
    "attention.scale": _attention_scale,
}
