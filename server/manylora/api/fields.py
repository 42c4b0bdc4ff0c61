"""Fields of the OpenAI and vLLM APIs that this server knows and does not support, and what to do with them.

A neutral value (`null`, `[]`, `{}`, `false`, `{"type": "text"}`, `best_of` equal to `n`) counts as absent; any
other value is refused by name. Fields whose `false` or empty value would change the answer are not listed:
they are unknown, and refused whatever their value.
"""

from collections.abc import Container
from typing import Any, Final

from manylora.errors import UnsupportedField

__all__ = [
    "CHAT_UNSUPPORTED",
    "COMPLETION_UNSUPPORTED",
    "MESSAGE_UNSUPPORTED",
    "STREAM_OPTION_UNSUPPORTED",
    "unsupported_field",
    "without_neutral",
]

_BOTH: Final = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "best_of",
        "guided_choice",
        "guided_decoding_backend",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "guided_whitespace_pattern",
        "include_stop_str_in_output",
        "kv_transfer_params",
        "length_penalty",
        "logits_processors",
        "min_tokens",
        "mm_processor_kwargs",
        "moderation",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prompt_logprobs",
        "repetition_detection",
        "request_id",
        "response_format",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "safety_identifier",
        "structural_tag",
        "structured_outputs",
        "thinking_token_budget",
        "truncate_prompt_tokens",
        "use_beam_search",
        "vllm_xargs",
    }
)
COMPLETION_UNSUPPORTED: Final = _BOTH | {"prompt_embeds", "suffix"}
CHAT_UNSUPPORTED: Final = _BOTH | {
    "audio",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "echo",
    "function_call",
    "functions",
    "include_reasoning",
    "media_io_kwargs",
    "modalities",
    "prediction",
    "reasoning_effort",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
}
MESSAGE_UNSUPPORTED: Final = frozenset(
    {"annotations", "audio", "function_call", "reasoning", "reasoning_content", "refusal", "tool_calls"}
)
_ROUTE_OF: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
STREAM_OPTION_UNSUPPORTED: Final = frozenset({"continuous_usage_stats", "include_obfuscation"})


def without_neutral(
    raw: dict[str, Any], supported: Container[str], unsupported: frozenset[str], *, where: str = ""
) -> dict[str, Any]:
    """`raw` without nulls of supported fields and without neutral values of unsupported ones.

    Raises UnsupportedField for an unsupported field with any other value. Unknown fields stay, for the schema
    to refuse.
    """
    kept: dict[str, Any] = {}
    for name, value in raw.items():
        if name in unsupported:
            if not _is_neutral(name, value, raw):
                raise unsupported_field(f"{where}{name}")
        elif value is not None or name not in supported:
            kept[name] = value
    return kept


def unsupported_field(path: str) -> UnsupportedField:
    advice = f"Send it to {_ROUTE_OF[path]}." if path in _ROUTE_OF else "Leave it out."
    return UnsupportedField(f"The field '{path}' is not supported by this route. {advice}", param=path)


def _is_neutral(name: str, value: Any, raw: dict[str, Any]) -> bool:
    if name == "best_of" and isinstance(value, int) and not isinstance(value, bool):
        return value == (raw.get("n") or 1)
    return value is None or value is False or value in ([], {}) or value == {"type": "text"}
