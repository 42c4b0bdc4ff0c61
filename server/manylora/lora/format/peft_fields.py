"""Every key that PEFT has ever written into a LoRA adapter's config (up to 0.21), and what is done with it.

`docs/adapters.md` shows these tables to users; tests hold them against that page and against PEFT itself.
"""

# Read, and honoured in full.
SERVED = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
        "base_model_name_or_path",
    }
)  # fmt: skip

# Without influence on what a trained adapter computes.
NEUTRAL = {
    "auto_mapping": "says which class the base was",
    "corda_config": "settings of an initialisation",
    "eva_config": "settings of an initialisation",
    "fan_in_fan_out": "says how the base stores its weight; the adapter's tensors are the same either way",
    "inference_mode": "freezes parameters in PEFT",
    "loftq_config": "settings of an initialisation",
    "lora_dropout": "training only",
    "lora_ga_config": "settings of an initialisation",
    "megatron_core": "names a Python module, used only with megatron_config",
    "merge_weights": "how PEFT before 0.3 ran it",
    "peft_version": "which PEFT wrote the file",
    "qalora_group_size": "used only with use_qalora",
    "revision": "which revision the base was",
    "runtime_config": "never read back by PEFT",
    "velora_config": "changes the backward pass of training only",
}

# Changes what the adapter computes in a way that is not served: refused unless absent, null, false or empty.
REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) switches on in the middle of a prompt",
    "arrow_config": "Arrow routes between several adapters",
    "bias": "trained biases are no low-rank delta; train with bias='none'",
    "enable_lora": "merged projections of PEFT before 0.3 have another layout; convert it with a newer PEFT",
    "ensure_weight_tying": "an adapter tied between embedding and lm_head is not served; train without it",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "it builds another base out of repeated layers",
    "lora_bias": "a bias on B is no low-rank delta; train with lora_bias=False",
    "megatron_config": "Megatron's parallel layers are not served",
    "modules_to_save": "whole modules trained beside the adapter are no low-rank delta; use target_modules instead",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "it adapts bare parameters, not modules",
    "trainable_token_indices": "trained token embeddings are no low-rank delta; put the embedding into target_modules",
    "use_bdlora": "block-diagonal LoRA has another layout",
    "use_dora": "DoRA rescales each weight column; merge it, or train with use_dora=False",
    "use_qalora": "QALoRA pools its input in groups",
}

# Of those, the ones whose tensors have another layout: checking shapes against plain LoRA would only mislead.
OTHER_LAYOUT = frozenset({"enable_lora", "layer_replication", "target_parameters", "use_bdlora", "use_qalora"})

KNOWN = SERVED | NEUTRAL.keys() | REFUSED.keys()

# Initialisations that move part of the base's weight into the adapter, so that it is right on the changed base only.
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

OTHER_TASKS = frozenset({"SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})


def is_off(key: str, value: object) -> bool:
    """Whether a refused key has its harmless value."""
    return value in (None, False, 0, "", [], {}) or (key == "bias" and value == "none")
