"""Fields of the APIs of OpenAI, vLLM and others that this server knows and does not serve, and what to do with them.

Each has its neutral values: those that ask for nothing, most often its default in the API that it comes from. They
count as absent, as `null` does for any field whatever; any other value is refused by name.
"""

import re
from collections.abc import Container, Mapping
from typing import Any, Final, TypeAlias

from manylora.errors import InvalidRequest, UnsupportedField, quoted

__all__ = [
    "CHAT_UNSUPPORTED",
    "CLASSIFY_UNSUPPORTED",
    "COMPLETION_UNSUPPORTED",
    "EMBEDDING_UNSUPPORTED",
    "MESSAGE_UNSUPPORTED",
    "NOTHING",
    "PART_UNSUPPORTED",
    "RERANK_UNSUPPORTED",
    "STREAM_OPTION_UNSUPPORTED",
    "TOKENIZE_UNSUPPORTED",
    "Unsupported",
    "asks_for_nothing",
    "renamed",
    "unsupported_field",
    "wanted",
]

Unsupported: TypeAlias = Mapping[str, tuple[Any, ...]]
"""Names with their neutral values besides null. Of several fields at fault the one that comes first is named."""

# Real clients send these in fields of any type.
NOTHING: Final[tuple[Any, ...]] = (False, [], {}, "", {"type": "text"})
_NOTHING: Final = NOTHING
# Of switches that are on by default, `false` asks for something.
_ON: Final = (True,)

_BOTH: Final[Unsupported] = {
    "structural_tag": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "json_schema": _NOTHING,
    "regex": _NOTHING,
    "ebnf": _NOTHING,
    "best_of": _NOTHING,  # and the value of `n`, see `_is_neutral`
    "early_stopping": _NOTHING,
    "kv_transfer_params": _NOTHING,
    "length_penalty": (1, *_NOTHING),
    "logits_processors": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "moderation": _NOTHING,
    "no_stop_trim": _NOTHING,
    "num_beams": (1, *_NOTHING),
    "prompt_cache_key": _NOTHING,
    "prompt_cache_options": _NOTHING,
    "prompt_cache_retention": ("in_memory", "in-memory", *_NOTHING),
    "repetition_detection": _NOTHING,
    "request_id": _NOTHING,
    "return_hidden_states": _NOTHING,
    "rid": _NOTHING,
    "safety_identifier": _NOTHING,
    "session_params": _NOTHING,
    "spaces_between_special_tokens": _ON,
    "thinking_token_budget": _NOTHING,
    "use_beam_search": _NOTHING,
    "vllm_xargs": _NOTHING,
}
COMPLETION_UNSUPPORTED: Final[Unsupported] = {
    **_BOTH,
    "prompt_embeds": _NOTHING,
    "suffix": _NOTHING,
}
CHAT_UNSUPPORTED: Final[Unsupported] = {
    # `functions` before what only goes with it, so that the error names the field that matters.
    "functions": _NOTHING,
    "function_call": ("auto", "none", *_NOTHING),
    **_BOTH,
    "audio": _NOTHING,
    "echo": _NOTHING,
    "media_io_kwargs": _NOTHING,
    "modalities": (["text"], *_NOTHING),
    "prediction": _NOTHING,
    "reasoning": _NOTHING,
    "separate_reasoning": _ON,
    "stream_reasoning": _ON,
    "verbosity": ("medium", *_NOTHING),
    "web_search_options": _NOTHING,
}
MESSAGE_UNSUPPORTED: Final[Unsupported] = {
    "function_call": _NOTHING,
    "annotations": _NOTHING,
    "audio": _NOTHING,
    "images": _NOTHING,
    "parsed": _NOTHING,
    "partial": _NOTHING,
    "prefix": _NOTHING,
    "provider_specific_fields": _NOTHING,
    "reasoning_details": _NOTHING,
    "thinking_blocks": _NOTHING,
}
PART_UNSUPPORTED: Final[Unsupported] = {"annotations": _NOTHING}
EMBEDDING_UNSUPPORTED: Final[Unsupported] = {
    "messages": _NOTHING,
    "normalize": _ON,
    "embed_dtype": ("float32", *_NOTHING),
    "embedding_type": _NOTHING,
    "endianness": ("little", "native", *_NOTHING),
    "input_type": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "request_id": _NOTHING,
    "rid": _NOTHING,
    "safety_identifier": _NOTHING,
    "use_activation": _ON,
}
CLASSIFY_UNSUPPORTED: Final[Unsupported] = {
    "messages": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "prompt_name": _NOTHING,
    "request_id": _NOTHING,
}
RERANK_UNSUPPORTED: Final[Unsupported] = {
    "max_chunks_per_doc": _NOTHING,
    "max_tokens_per_doc": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "rank_fields": (["text"], *_NOTHING),
    "request_id": _NOTHING,
    "softmax": _NOTHING,
}
TOKENIZE_UNSUPPORTED: Final[Unsupported] = {
    "tools": _NOTHING,
    "add_generation_prompt": _ON,
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": _NOTHING,
    "media_io_kwargs": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
}
STREAM_OPTION_UNSUPPORTED: Final[Unsupported] = {"include_obfuscation": _NOTHING}

_ROUTE_OF: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
_IN_WORDS: Final = {
    "functions": "It is what 'tools' was before.",
    "function_call": "It is what 'tool_choice' and 'tool_calls' were before.",
    **dict.fromkeys(
        ("previous_response_id", "conversation"), "Nothing is stored here: send what was said before in 'input'."
    ),
    "background": "An answer is given at once, whole or as a stream.",
}


def wanted(
    raw: Mapping[str, Any], supported: Container[str], unsupported: Unsupported, *, where: str = ""
) -> dict[str, Any]:
    """`raw` without nulls and without neutral values of unsupported fields: what is asked for.

    Raises UnsupportedField for an unsupported field with any other value, and for one that nobody knows.
    """
    kept = {name: value for name, value in raw.items() if value is not None and name not in unsupported}
    if len(kept) < len(raw):
        for name, neutral in unsupported.items():
            if name in raw and not _is_neutral(name, raw[name], neutral, raw):
                raise unsupported_field(f"{where}{name}")
    for name in kept:
        if name not in supported:
            raise unsupported_field(f"{where}{name}")
    return kept


def unsupported_field(path: str) -> UnsupportedField:
    path = quoted(path)
    name = path.rpartition(".")[2]
    why = f" {_IN_WORDS[name]}" if name in _IN_WORDS else ""
    advice = f"Send it to {_ROUTE_OF[path]}." if path in _ROUTE_OF else "Leave it out."
    return UnsupportedField(f"The field '{path}' is not supported by this route.{why} {advice}", param=path)


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The error in the words of who calls fields otherwise: `names` has their name for each of ours."""
    path = error.param or ""
    ours = next((name for name in names if path == name or path.startswith((f"{name}.", f"{name}["))), None)
    if ours is None:
        return error
    error.param = names[ours] + path[len(ours) :]
    error.message = re.sub(rf"'{re.escape(ours)}(?=['.\[])", f"'{names[ours]}", error.message)
    if error.message.startswith(f"{path}:"):
        error.message = error.param + error.message[len(path) :]
    return error


def asks_for_nothing(value: Any) -> bool:
    """A value that real clients send in a field that they have no use for."""
    return _is_neutral("", value, _NOTHING, {})


def _is_neutral(name: str, value: Any, neutral: tuple[Any, ...], raw: Mapping[str, Any]) -> bool:
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if inner is not None}
    if name == "best_of" and value == (raw.get("n") or 1) and not isinstance(value, bool):
        return True
    return value is None or any(_is_same(value, one) for one in neutral)


def _is_same(value: Any, other: Any) -> bool:
    """JSON's equality: 1.0 is 1, and `true` is no number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
