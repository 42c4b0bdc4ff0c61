"""A model's chat template, which is asked how it reads messages before it is believed.

Some templates read a message's content as a string, some as a list of parts, some as one for one role and as the other
for another; and some leave messages out, such as a system message that does not come first. So a conversation of the
same roles is rendered first with a marker in each message's place: the form is the one in which all markers appear.
Tools and documents are tried in the same way: a template that does not know them leaves them out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from inspect import signature
from typing import Any, Final

from manylora.chat import tool_prompt
from manylora.chat.format import PLAIN_CHAT, ChatFormat, ChatOptions, Syntax, reasoning_of, syntax_of
from manylora.chat.strangers import StrangersTemplates
from manylora.errors import InvalidRequest, quoted

__all__ = ["ChatTemplate"]

_MARKER = re.compile("probe([0-9]+)probe")
_NUM_REMEMBERED = 1024
_REMEMBERED_LENGTH = 64  # messages
_FORMATS_REMEMBERED = 64
_STRANGERS_REMEMBERED = 128  # each may hold a template on
_MARK = "probe0probe"
_PROBE_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": _MARK,
        "description": _MARK,
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": []},
    },
}
_PROBE_DOCUMENT: Final = {"title": _MARK, "text": _MARK, "contents": _MARK, "doc_id": "0"}
_MISTRAL_ID: Final = re.compile("[A-Za-z0-9]{9}")


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the form of a message depends on."""

    role: Any
    has_name: bool
    has_call_id: bool
    num_calls: int

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "_Shape":
        return cls(
            message.get("role"), "name" in message, "tool_call_id" in message, len(message.get("tool_calls") or ())
        )


class ChatTemplate:
    """Renders messages `{role, content}`, whose content is a string, in the form that the template reads.

    Thread-safe. Raises InvalidRequest where there is no template, where it refuses the messages and where it would
    leave one of them out. An assistant's message may have `tool_calls`, whose arguments are objects; of such a message
    it is enough that the calls appear. `ChatOptions.template` is a stranger's and rendered in a process that can be
    spared, which takes a while and raises Unavailable where that process does not run. `with_tool_prompt` tells a
    template that knows no tools of them in words.
    """

    def __init__(self, tokenizer: Any, *, with_tool_prompt: bool = False) -> None:
        self._tokenizer = tokenizer
        self._with_tool_prompt = with_tool_prompt
        self._strangers = StrangersTemplates()
        self._remembered = lru_cache(_NUM_REMEMBERED)(self._in_parts)
        self._remembered_of_strangers = lru_cache(_STRANGERS_REMEMBERED)(self._in_parts)
        self.format = lru_cache(_FORMATS_REMEMBERED)(self._format)
        named = set(signature(tokenizer.apply_chat_template).parameters) | set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
        self._not_variables = named | {"messages"}

    @property
    def exists(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def fault(self) -> str | None:
        """Why no chat can be served, if so: the template was tried with one message of a user."""
        try:
            self.render([{"role": "user", "content": "hi"}])
        except InvalidRequest as error:
            return error.message
        return None

    def _format(self, template: str | None) -> ChatFormat:
        """What the base's template, or another in its place, says of the base's chats."""
        if template is None and not self.exists:
            return ChatFormat()
        options = ChatOptions(template=template)
        has_tools = self._shows(replace(options, tools=(_PROBE_TOOL,)))
        source = self._source(template, has_tools)
        added = {str(token): (int(i), bool(token.special)) for i, token in self._tokenizer.added_tokens_decoder.items()}
        syntax: Syntax | None = syntax_of(source)
        if not has_tools and self._with_tool_prompt:
            syntax = "hermes"
        return ChatFormat(
            takes_tools=has_tools or self._with_tool_prompt,
            tells_tools=self._with_tool_prompt and not has_tools,
            takes_documents=self._shows(replace(options, documents=(_PROBE_DOCUMENT,))),
            reasoning=reasoning_of(source, added),
            syntax=syntax,
            special_marks=frozenset(text for text, (_, is_special) in added.items() if is_special),
            has_response_template=template is None and bool(getattr(self._tokenizer, "response_template", None)),
        )

    def _shows(self, options: ChatOptions) -> bool:
        """Whether a chat shows the marker that the options hold."""
        try:
            return _MARK in self._apply([{"role": "user", "content": "hi"}], options)
        except InvalidRequest:
            return False

    def _source(self, template: str | None, has_tools: bool) -> str:
        if template is not None:
            return template
        try:
            return str(self._tokenizer.get_chat_template(None, [_PROBE_TOOL] if has_tools else None))
        except ValueError:  # several, none of them for this
            return ""

    def render(self, messages: Sequence[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> str:
        """The text of a chat."""
        if options.template is None and not self.exists:
            raise InvalidRequest("This model has no chat template. Use /v1/completions.", param="messages")
        reserved = next((name for name in options.variables if name in self._not_variables), None)
        if reserved is not None:
            where = f"chat_template_kwargs.{quoted(reserved)}"
            raise InvalidRequest(f"'{where}' is the server's own to set. Leave it out.", param=where)
        form = self.format(options.template)
        if form.tells_tools:
            messages = tool_prompt.told(messages, options.tools)
            options = replace(options, tools=())
        elif form.syntax in ("mistral", "mistral_args"):
            messages = [_with_mistral_ids(message) for message in messages]
        shapes = tuple(map(_Shape.of, messages))
        is_usual = len(shapes) <= _REMEMBERED_LENGTH and not options.variables
        remembered = self._remembered if options.template is None else self._remembered_of_strangers
        in_parts = (remembered if is_usual else self._in_parts)(shapes, _Probed.of(options))
        given = [{**m, "content": _part(m["content"])} if m.get("role") in in_parts else m for m in messages]
        return self._apply(given, options)

    def _in_parts(self, shapes: tuple[_Shape, ...], probed: "_Probed") -> frozenset[Any]:
        """The roles whose content is to be given as parts. Raises InvalidRequest."""
        roles = frozenset(shape.role for shape in shapes)
        refusal: InvalidRequest | None = None
        missing: list[int] = []
        tried: set[frozenset[Any]] = set()
        for attempt in (frozenset[Any](), None, roles):  # None: as parts for the roles that were missing
            in_parts = frozenset(shapes[number].role for number in missing) if attempt is None else attempt
            if in_parts in tried:
                continue
            tried.add(in_parts)
            try:
                now_missing = self._missing(shapes, in_parts, probed)
            except InvalidRequest as error:
                refusal = refusal or error
                continue
            if not now_missing:
                return in_parts
            missing = missing or now_missing
        if missing:
            raise InvalidRequest(
                f"The model's chat template leaves out 'messages[{missing[0]}]', of the role "
                f"'{quoted(str(shapes[missing[0]].role))}'. Send the chat without it, or say it in another message.",
                param=f"messages[{missing[0]}]",
            )
        assert refusal is not None, "nothing was missing, so every attempt was refused"
        raise refusal

    def _missing(self, shapes: tuple[_Shape, ...], in_parts: frozenset[Any], probed: "_Probed") -> list[int]:
        """The numbers of the messages that do not appear."""
        text = self._apply([_probe(shape, number, in_parts) for number, shape in enumerate(shapes)], probed.options())
        seen = set(map(int, _MARKER.findall(text)))
        return [number for number in range(len(shapes)) if number not in seen]

    def close(self) -> None:
        """End the processes that strangers' templates are rendered in."""
        self._strangers.close()

    def _apply(self, messages: list[dict[str, Any]], options: ChatOptions) -> str:
        if options.template is not None:
            return self._strangers.render(messages, options, self._tokenizer.special_tokens_map)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=list(options.tools) or None,
                    documents=list(options.documents) or None,
                    tokenize=False,
                    add_generation_prompt=options.for_answer and not options.continue_final,
                    continue_final_message=options.continue_final,
                    **options.variables,
                )
            )
        except Exception as error:  # noqa: BLE001 - a template is the model's own program, and can fail in any way
            reason = quoted(str(error) or type(error).__name__)
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {reason}", param="messages"
            ) from None


@dataclass(frozen=True, slots=True)
class _Probed:
    """What the form of messages depends on beside themselves."""

    has_tools: bool
    template: str | None
    variables: Any = None  # where there are some, nothing is remembered

    @classmethod
    def of(cls, options: ChatOptions) -> "_Probed":
        return cls(bool(options.tools), options.template, options.variables or None)

    def options(self) -> ChatOptions:
        tools = ({**_PROBE_TOOL, "function": {**_PROBE_TOOL["function"], "name": "x", "description": "x"}},)
        return ChatOptions(tools if self.has_tools else (), (), self.variables or {}, self.template)


def _part(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _probe(shape: _Shape, number: int, in_parts: frozenset[Any]) -> dict[str, Any]:
    marker = f"probe{number}probe"
    said = "" if shape.num_calls else marker
    message: dict[str, Any] = {"content": _part(said) if shape.role in in_parts else said}
    if shape.role is not None:
        message["role"] = shape.role
    if shape.has_name:
        message["name"] = "name"
    if shape.has_call_id:
        message["tool_call_id"] = "call00000"
    if shape.num_calls:
        called = {"name": marker, "arguments": {}}
        message["tool_calls"] = [
            {"id": f"call{call:05}", "type": "function", "function": called} for call in range(shape.num_calls)
        ]
    return message


def _with_mistral_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Calls under ids of nine letters and digits, on which the template insists; one id becomes one other."""
    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = _mistral_id(message["tool_call_id"])
    if "tool_calls" in message:
        changed["tool_calls"] = [{**call, "id": _mistral_id(call["id"])} for call in message["tool_calls"]]
    return changed


def _mistral_id(call_id: str) -> str:
    return call_id if _MISTRAL_ID.fullmatch(call_id) else sha256(call_id.encode(errors="replace")).hexdigest()[:9]
