"""Tools for a base whose template knows none: told in the system message, called and answered in text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["told"]

_INTRODUCTION: Final = "You can call functions. These are there, one a line, with JSON schemas of their arguments:"
_HOW: Final = (
    "To call one, answer with its name and its arguments as JSON between tags:\n"
    '<tool_call>\n{"name": "the name", "arguments": {"an argument": "its value"}}\n</tool_call>\n'
    "What it returns comes between <tool_response> tags. If none helps, answer in words."
)


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat without anything that only a template for tools can read: plain messages that say it in words."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = f"{_INTRODUCTION}\n<tools>\n{lines}\n</tools>\n{_HOW}"
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message["tool_calls"]
    ]
    content = "\n".join([*([message["content"]] if message["content"] else []), *calls])
    return {"role": message["role"], "content": content}
