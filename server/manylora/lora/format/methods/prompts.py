"""Methods whose adapters stand before each prompt: virtual tokens, as embeddings or as keys and values."""

from collections.abc import Mapping
from typing import Any, Final, Self

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format import config
from manylora.lora.format.problems import Problems, listed, shown
from manylora.lora.format.spec import AdaptedModule, Base, ModuleSpec, Prefix
from manylora.lora.format.tensors import TensorView

__all__ = ["MAX_VIRTUAL_TOKENS", "PROMPTS", "PromptReading"]

Tensors = Mapping[str, TensorView]

MAX_VIRTUAL_TOKENS: Final = 4096  # positions before each prompt of one adapter
_TENSOR: Final = "prompt_embeddings"
# What is saved is what the encoder makes, so how it was made says nothing.
_KNOWN: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "cpt_mask", "cpt_token_ids", "cpt_tokens_type_mask",
        "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
        "inference_mode", "init_weights", "modules_to_save", "num_attention_heads", "num_frozen_tokens", "num_layers",
        "num_transformer_submodules", "num_virtual_tokens", "opt_loss_decay_factor", "opt_projection_epsilon",
        "opt_projection_format_epsilon", "opt_weighted_loss_type", "peft_type", "peft_version", "prefix_projection",
        "prompt_tuning_init", "prompt_tuning_init_text", "revision", "task_type", "token_dim", "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)  # fmt: skip
# PEFT's methods, and what the registry calls them.
PROMPTS: Final[Mapping[str, str]] = {
    "CARTRIDGE": "cartridge",
    "CPT": "cpt",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
    "PROMPT_TUNING": "prompt_tuning",
}
_OF_PAST: Final = frozenset({"CARTRIDGE", "PREFIX_TUNING"})


class PromptReading:
    """A config of virtual tokens, read. Implements `kinds.Reading`."""

    alpha = 0.0
    invocation: tuple[int, ...] = ()

    def __init__(self, method: str, count: int, base_name: str | None) -> None:
        self.kind = PROMPTS[method]
        self.target_modules: list[str] = []
        self.base_model_name_or_path = base_name
        self._count = count
        self._brings_past = method in _OF_PAST

    @classmethod
    def of(cls, raw: dict[str, Any], problems: Problems, warnings: list[str]) -> Self | None:
        """From the config's JSON object; None, with the reasons in `problems`, where it is unusable."""
        config.check_keys(raw, _KNOWN, problems, warnings)
        count, name = raw.get("num_virtual_tokens"), raw.get("base_model_name_or_path")
        if type(count) is not int or not 1 <= count <= MAX_VIRTUAL_TOKENS:
            problems.add(
                "bad_config",
                f"{CONFIG_FILE}: num_virtual_tokens",
                f"It must be a whole number from 1 to {MAX_VIRTUAL_TOKENS}, not {shown(count)}.",
            )
            return None
        if not config.is_off(raw.get("modules_to_save")):
            problems.add(
                "unsupported_feature",
                f"{CONFIG_FILE}: modules_to_save",
                "Not served: virtual tokens with modules of their own. Train a LoRA adapter with these modules.",
            )
        if raw.get("num_transformer_submodules") not in (None, 1):
            problems.add(
                "unsupported_feature",
                f"{CONFIG_FILE}: num_transformer_submodules",
                "Not served: virtual tokens for an encoder and a decoder. Train it for text generation (CAUSAL_LM).",
            )
        return cls(raw["peft_type"], count, name if isinstance(name, str) else None)

    def modules(
        self, tensors: Tensors, base: Base, problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The virtual tokens of an upload, as a term of the embedding; every problem goes to `problems`."""
        return self.accepted(tensors, base.modules, problems, warnings)

    def accepted(
        self, tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The virtual tokens, as a term of the embedding, of an upload or an adapter that was accepted before."""
        spec = next((spec for spec in modules.values() if spec.kind == "embedding"), None)
        where = f"{TENSOR_FILE}: {_TENSOR}"
        if spec is None or spec.past is None:
            problems.add(
                "unsupported_feature",
                f"{CONFIG_FILE}: peft_type",
                "Not served on this base: it is an encoder, or its layers keep something else than keys and values of "
                "one size. Train a LoRA adapter.",
            )
            return ()
        view = tensors.get(_TENSOR)
        if view is None:
            problems.add("missing_tensor", where, "The file has no virtual tokens. Save it with save_pretrained.")
            return ()
        others = sorted(tensors.keys() - {_TENSOR})
        if others:
            problems.add(
                "unexpected_tensor",
                f"{TENSOR_FILE}: {shown(others[0])}",
                f"{len(others)} tensors are no virtual tokens: {listed(others, 3)}. Save the adapter alone, with "
                "PEFT's save_pretrained.",
            )
            return ()
        layers, heads, size = spec.past
        past = 2 * layers * heads * size
        shape = (self._count, past if self._brings_past else spec.out_features)
        if view.shape != shape:
            what = f"keys and values of {layers} layers with {heads} heads of {size}" if self._brings_past else "tokens"
            problems.add(
                "base_mismatch",
                where,
                f"Its shape is {shown(list(view.shape))}; the config's number of virtual tokens and this base's {what} "
                f"take {shown(list(shape))}. Train it on this base.",
            )
            return ()
        own = (None, view) if self._brings_past else (view, None)
        return (AdaptedModule(spec.path, spec.kind, (Prefix(self._count, past, *own),)),)

    def is_index(self, name: str) -> bool:
        """No tensor does."""
        return False
