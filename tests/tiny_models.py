"""Tiny random models of many architectures, with a real byte-level tokenizer, saved as Hugging Face folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN = SPECIAL_TOKENS.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = ("The quick brown fox jumps over the lazy dog.", "我爱北京天安门", "SELECT name FROM users;", "naïve café 🙂")

_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": END_OF_TURN,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_WITHOUT_GROUPS = {k: v for k, v in _SHARED.items() if k != "num_key_value_heads"}

# Untied, since Gemma scales its embeddings up: a tied random model would only repeat its last token.
_WINDOWED = _SHARED | {"sliding_window": 10}
_CONFIGS: Mapping[str, tuple[type[PretrainedConfig], Mapping[str, Any]]] = {
    "llama": (LlamaConfig, _SHARED),
    "qwen2": (Qwen2Config, _SHARED),
    "qwen3": (Qwen3Config, _SHARED | {"head_dim": 24}),
    "mistral": (MistralConfig, _WINDOWED),
    "gemma2": (Gemma2Config, _WINDOWED | {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, _WINDOWED | {"head_dim": 16}),
    "phi3": (Phi3Config, _SHARED),
    "gpt2": (
        GPT2Config,
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 0,
            "eos_token_id": END_OF_TURN,
            "pad_token_id": 0,
        },
    ),
    "gpt_neox": (GPTNeoXConfig, _WITHOUT_GROUPS),
}
ARCHITECTURES = tuple(_CONFIGS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` entries: any text can be written, and most characters take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[END_OF_TURN],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_model(
    architecture: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save a random model of one of `ARCHITECTURES` in `folder`, with its tokenizer; returns the folder.

    `overrides` replace fields of the architecture's config.
    """
    config_class, fields = _CONFIGS[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**{**fields, **overrides}), dtype=dtype)
        draw_weights(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def draw_weights(model: PreTrainedModel) -> None:
    """Wider than usual, where every prompt would get the same answer; norms and biases off their ones and zeros."""
    # A wide embedding that is also the head would make the model repeat its last token.
    embedding_std = 0.25 if getattr(model.config, "tie_word_embeddings", False) else 1.0
    for name, weight in model.named_parameters():
        if "wpe" in name:
            weight.normal_(0.0, 0.5)
        elif "embed" in name or "wte" in name:
            weight.normal_(0.0, embedding_std)
        elif weight.dim() > 1:
            weight.normal_(0.0, 1.4 * weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.1)
        else:
            weight.add_(torch.randn_like(weight) * 0.1)
