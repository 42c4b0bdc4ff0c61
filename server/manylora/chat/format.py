"""How a base writes its chats: what its template takes, how it marks what it thinks, and how it writes down a call."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

__all__ = [
    "NO_OVERRIDES",
    "PLAIN_CHAT",
    "ChatFormat",
    "ChatOptions",
    "FormatOverrides",
    "Syntax",
    "reasoning_of",
    "syntax_of",
]

Syntax: TypeAlias = Literal[
    "hermes", "llama3_json", "mistral", "mistral_args", "pythonic", "deepseek_v3", "deepseek_v31", "qwen3_coder"
]
"""How calls of tools are written:

hermes          <tool_call>{"name": …, "arguments": {…}}</tool_call>, one after the other
llama3_json     {"name": …, "parameters": {…}} as the whole answer, several with `;` between
mistral         [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
mistral_args    [TOOL_CALLS]name[ARGS]{…}, one after the other
pythonic        [name(argument=value, …), …] as the whole answer
deepseek_v3     <｜tool▁calls▁begin｜>, of each call <｜tool▁call▁begin｜>function<｜tool▁sep｜>name, its arguments
                in a fence of JSON and <｜tool▁call▁end｜>, and <｜tool▁calls▁end｜>
deepseek_v31    the same with <｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>
qwen3_coder     <tool_call><function=name><parameter=argument>value</parameter>…</function></tool_call>, one after the
                other, a tag or a value a line
"""

# In the order in which they are looked for. Each is whole or not there.
_REASONING: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
# Of templates whose calls are marked as those of hermes are, and are no JSON.
_OTHER_MARKUP: Final = ("<function=", "<arg_key>", "<parameter=")
_DEEPSEEK_MARKS: Final = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a chat is rendered with.

    `tools` are as OpenAI describes them. `variables` are the template's own, such as `enable_thinking`. `template`
    stands in for the base's, and is a stranger's. `for_answer` begins the assistant's turn; `continue_final` leaves the
    last message open.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    for_answer: bool = True
    continue_final: bool = False


PLAIN_CHAT: Final = ChatOptions()


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a template and a vocabulary say of a base's chats.

    `reasoning` are the marks before and after what it thinks. `syntax` is None where nobody knows how it writes calls.
    `tells_tools`: the template knows none, and is told of them in words. `special_marks` are special tokens, which the
    text of an answer leaves out unless it is asked for. With `has_response_template`, the tokenizer itself brings what
    reads its answers.
    """

    takes_tools: bool = False
    tells_tools: bool = False
    takes_documents: bool = False
    reasoning: tuple[str, str] | None = None
    syntax: Syntax | None = None
    special_marks: frozenset[str] = frozenset()
    has_response_template: bool = False

    @property
    def needs_special_tokens(self) -> bool:
        """Whether an answer can be read only with its special tokens."""
        marks = [*(self.reasoning or ()), *_CALL_MARKS.get(self.syntax or "", ())]
        return self.has_response_template or any(mark in self.special_marks for mark in marks)


_CALL_MARKS: Final = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]"),
    "deepseek_v3": _DEEPSEEK_MARKS,
    "deepseek_v31": _DEEPSEEK_MARKS,
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
}


@dataclass(frozen=True, slots=True)
class FormatOverrides:
    """What is told of a base's chats, so that nobody has to find it out: see the settings of these names.

    `reasoning_marks` is `auto`, `none`, or the two marks with a space between.
    """

    tool_parser: Syntax | Literal["auto"] = "auto"
    tool_prompt: bool = False
    reasoning_marks: str = "auto"

    def applied(self, found: ChatFormat) -> ChatFormat:
        changes: dict[str, Any] = {}
        if self.tool_parser != "auto" and not found.tells_tools:
            changes |= {"syntax": self.tool_parser, "has_response_template": False}
        if self.reasoning_marks != "auto":
            start, _, end = self.reasoning_marks.partition(" ")
            changes["reasoning"] = (start, end) if end else None
        return replace(found, **changes) if changes else found


NO_OVERRIDES: Final = FormatOverrides()


def reasoning_of(template: str, tokens: Iterable[str]) -> tuple[str, str] | None:
    """The marks around what the model thinks, from its template and its added tokens."""
    known = set(tokens)
    for start, end in _REASONING:
        if {start, end} <= known or end in template:
            return start, end
    return None


def syntax_of(template: str) -> Syntax | None:
    """How calls are written, from the template that writes down those of earlier turns."""
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    if "<｜tool▁sep｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "<tool_call>" in template:
        if "<function=" in template and "<parameter=" in template:
            return "qwen3_coder"
        return None if any(mark in template for mark in _OTHER_MARKUP) else "hermes"
    if "[func_name1(" in template:  # of Llama 3.2, Llama 4 and those tuned as they are
        return "pythonic"
    if '"parameters": ' in template and "tool_call" in template:
        return "llama3_json"
    return None
