"""What a row means: an `Example`, a chat whose last message is the answer wanted, whatever the row's shape.

    {"prompt": str, "completion": str}              one question, one answer
    {"messages": [{"role", "content"}, …]}          a chat, as OpenAI's; perhaps with `tools`, and `weight` on answers
    {"text": str, "label": str}                     classification; the answer is the label
    {"instruction", "input", "output"}              Alpaca's; perhaps with `system` and `history`
    {"conversations": [{"from", "value"}, …]}       ShareGPT's; perhaps with `system` and `tools`
    {"input": {"messages"}, "preferred_output", "non_preferred_output"}     OpenAI's preferences: two answers
    {"prompt", "chosen", "rejected"}                TRL's: each a text, or messages

and, of what is trained to do other things than to write:

    {"anchor", "positive"}                          texts that belong together; perhaps a `negative` that does not
    {"tokens": [str], "tags": [str]}                words, each with its label; `ner_tags` that are texts, too
    {"question", "context", "answer"}               the answer's words, out of the context; or SQuAD's `answers`
    {"audio": path, "text": str}                    a file of sound and what is said in it; perhaps in which `language`
    {"image": path, "label": str}                   a file of an image, or a data URL, and its label

This module imports no torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

__all__ = ["FILES", "LABELLED", "WRITTEN", "Example", "Message", "RowFault", "Shape", "example_of", "shape_of"]

Shape = Literal["completion", "chat", "label", "preference", "pair", "tags", "question", "sound", "image"]
WRITTEN: Final[tuple[Shape, ...]] = ("completion", "chat", "label", "preference")
"""Shapes of rows from which a model learns to write."""
LABELLED: Final[tuple[Shape, ...]] = ("label", "image")
"""Shapes of rows that each have one label."""
FILES: Final[tuple[Shape, ...]] = ("sound", "image")
"""Shapes of rows that each name a file, in the first message."""
_FIELDS: Final[dict[Shape, tuple[str, ...]]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
    "preference": ("input", "preferred_output", "non_preferred_output"),
    "pair": ("anchor", "positive"),
    "tags": ("tokens", "tags"),
    "question": ("question", "context"),
    "sound": ("audio", "text"),
    "image": ("image", "label"),
}
_ALPACA: Final = ("instruction", "output")
_SHAREGPT: Final = "conversations"
_TRL: Final = ("prompt", "chosen", "rejected")
_TAGS: Final = "ner_tags"
_ROLES: Final = ("system", "user", "assistant", "tool")
_OTHER_ROLES: Final = {"developer": "system"}
_SPEAKERS: Final = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip


class RowFault(ValueError):
    """What is wrong with a row, as the end of a sentence that begins with its number."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `calls` is JSON, what an assistant calls; `is_learnt` is of an assistant's alone."""

    role: str
    content: str
    is_learnt: bool = True
    calls: str = ""
    call_id: str = ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        more: dict[str, Any] = {"tool_calls": json.loads(self.calls)} if self.calls else {}
        more |= {"tool_call_id": self.call_id} if self.call_id else {}
        return {"role": self.role, "content": self.content, **more}


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a chat whose last message is the answer wanted. `row` is 1-based; `tools` is JSON, empty without any.

    `rejected` is the answer in its place that the wanted one is preferred to, where rows are preferences, and of a pair
    the text that does not belong to the first. `tags` are of the words of the one text. Of a question the text is asked
    of is the last of the prompt, and the answer begins at its character number `start`.
    """

    row: int
    messages: tuple[Message, ...]
    label: str | None = None
    tools: str = ""
    rejected: Message | None = None
    tags: tuple[str, ...] = ()
    start: int = 0

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    @property
    def has_tools(self) -> bool:
        said = self.messages if self.rejected is None else (*self.messages, self.rejected)
        return bool(self.tools) or any(message.calls for message in said)


def shape_of(row: Mapping[str, Any]) -> Shape:
    """Raises RowFault for a row of none of the shapes."""
    for shape, fields in _FIELDS.items():
        if all(field in row for field in fields):
            return shape
    if all(field in row for field in _ALPACA):
        return "completion"
    if _SHAREGPT in row:
        return "chat"
    if all(field in row for field in _TRL):
        return "preference"
    if "tokens" in row and _TAGS in row:
        return "tags"
    have = ", ".join(sorted(map(str, row))) or "nothing"
    raise RowFault(
        f"has the fields {have}; needed are prompt and completion, or messages, or text and label, or Alpaca's "
        "instruction and output, or ShareGPT's conversations, or input, preferred_output and non_preferred_output, or "
        "anchor and positive, or tokens and tags, or question, context and answer, or audio and text, or "
        "image and label"
    )


def example_of(number: int, row: Mapping[str, Any], shape: Shape) -> Example:
    """The example that a row of that shape is. Raises RowFault."""
    if shape == "chat":
        found = _from_sharegpt(row) if "messages" not in row and _SHAREGPT in row else row
        _need(found, ("messages",))
        return _chat(number, found["messages"], found.get("tools"))
    if shape == "preference":
        return _preference(number, row)
    if shape == "completion" and "prompt" not in row and _ALPACA[0] in row:
        return _alpaca(number, row)
    if shape in _OTHERS:
        return _OTHERS[shape](number, row)
    question, answer = _texts(row, _FIELDS[shape])
    if shape == "label":
        if not question.strip():
            raise RowFault("text is empty")
        answer = answer.strip()  # "good " and "good" are one class
    messages = (Message("user", question), Message("assistant", answer))
    return Example(number, messages, label=answer if shape == "label" else None)


def _paired(number: int, row: Mapping[str, Any]) -> Example:
    anchor, positive = _texts(row, _FIELDS["pair"])
    negative = row.get("negative")
    other = None if negative is None else Message("assistant", _string(negative, "negative"))
    if not anchor.strip() or (other is not None and not other.content.strip()):
        raise RowFault(f"{'negative' if anchor.strip() else 'anchor'} is empty")
    return Example(number, (Message("user", anchor), Message("assistant", positive)), rejected=other)


def _tagged(number: int, row: Mapping[str, Any]) -> Example:
    words, tags = row.get("tokens"), row.get("tags", row.get(_TAGS))
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags) or not words:
        raise RowFault("tokens and tags must be lists of one length, and not empty")
    said = [_string(word, "tokens[]") for word in words]
    if not all(said) or any(len(word.split()) != 1 for word in said):
        raise RowFault("each of tokens must be one word, without a space")
    named = tuple(_string(tag, "tags[]") for tag in tags)
    if not all(named):
        raise RowFault("each of tags must be a text that is not empty")
    return Example(number, (Message("user", " ".join(said)), Message("assistant", " ".join(named))), tags=named)


def _asked(number: int, row: Mapping[str, Any]) -> Example:
    """A question; one whose answer is empty has none in its text."""
    _need(row, _FIELDS["question"])
    question, context = (_string(row[name], name) for name in _FIELDS["question"])
    answer, start = row.get("answer"), row.get("start")
    if isinstance(listed := row.get("answers"), dict):  # SQuAD's, of which the first is learnt
        texts, starts = listed.get("text"), listed.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RowFault("answers must have text and answer_start, lists of one length")
        answer, start = (texts[0], starts[0]) if texts else ("", 0)
    if not question.strip() or not context.strip():
        raise RowFault(f"{'context' if question.strip() else 'question'} is empty")
    answer = _string(answer, "answer")
    if start is None:
        start = context.find(answer)
    if not isinstance(start, int) or isinstance(start, bool) or start < 0 or not context.startswith(answer, start):
        raise RowFault("answer does not stand in context, or not where start says")
    return Example(
        number, (Message("user", question), Message("user", context), Message("assistant", answer)), start=start
    )


def _pictured(number: int, row: Mapping[str, Any]) -> Example:
    image, label = _texts(row, _FIELDS["image"])
    if not image.strip():
        raise RowFault("image is empty")
    label = label.strip()
    return Example(number, (Message("user", image), Message("assistant", label)), label=label)


def _heard(number: int, row: Mapping[str, Any]) -> Example:
    audio, text = _texts(row, _FIELDS["sound"])
    if not audio.strip():
        raise RowFault("audio is empty")
    language = row.get("language")
    spoken = () if language is None else (Message("user", _string(language, "language")),)
    return Example(number, (Message("user", audio), *spoken, Message("assistant", text.strip())))


_OTHERS: Final[Mapping[Shape, Callable[[int, Mapping[str, Any]], Example]]] = {
    "pair": _paired, "tags": _tagged, "question": _asked, "sound": _heard, "image": _pictured,
}  # fmt: skip


def _need(row: Mapping[str, Any], fields: Sequence[str]) -> None:
    missing = [field for field in fields if row.get(field) is None]
    if missing:
        raise RowFault(f"missing {' and '.join(missing)}")


def _texts(row: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    """The fields' strings, of which the last one, the answer, is not empty."""
    _need(row, fields)
    found = [_string(row[field], field) for field in fields]
    if not found[-1].strip():
        raise RowFault(f"{fields[-1]} is empty")
    return found


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{name} must be a string, not {type(value).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in value):  # which JSON can spell, and no UTF-8 and no tokenizer has
        raise RowFault(f"{name} holds half a character (a lone surrogate)")
    return value


def _alpaca(number: int, row: Mapping[str, Any]) -> Example:
    instruction, output = _texts(row, _ALPACA)
    more = _string(row.get("input") or "", "input")
    system = _string(row.get("system") or "", "system")
    messages = [Message("system", system)] if system else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowFault("history must be a list of pairs, each a question and its answer")
    for index, (question, answer) in enumerate(history):
        asked, said = (_string(text, f"history[{index}]") for text in (question, answer))
        messages += [Message("user", asked), Message("assistant", said, is_learnt=False)]
    question = f"{instruction}\n{more}" if more else instruction
    return Example(number, (*messages, Message("user", question), Message("assistant", output)))


def _from_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a chat of OpenAI's shape, with whatever is wrong in it left to be found there."""
    turns = row[_SHAREGPT]
    if not isinstance(turns, list):
        raise RowFault("conversations must be a list of turns, each with from and value")
    messages: list[dict[str, Any]] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for index, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise RowFault(f"conversations[{index}].from must be one of {', '.join(_SPEAKERS)}")
        said = _string(turn.get("value"), f"conversations[{index}].value")
        if speaker == "function_call":
            called = _json(said, f"conversations[{index}].value")
            calls = called if isinstance(called, list) else [called]
            message = {"role": "assistant", "content": "", "tool_calls": [{"function": call} for call in calls]}
        else:
            message = {"role": _SPEAKERS[speaker], "content": said}
        messages.append({**message, "weight": turn["weight"]} if "weight" in turn else message)
    tools = row.get("tools")
    return {"messages": messages, "tools": _json(tools, "tools") if isinstance(tools, str) and tools else tools}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowFault(f"{name} is no JSON") from None


def _chat(number: int, messages: object, tools: object) -> Example:
    if not isinstance(messages, list) or len(messages) < 2:
        raise RowFault("messages must be a list of at least two: a question and the assistant's answer")
    found = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    last = found[-1]
    if last.role != "assistant":
        raise RowFault("the last message must be the assistant's: it is the answer to learn")
    if not last.content.strip() and not last.calls:
        raise RowFault("the assistant's last message is empty")
    while found and not (found[-1].role == "assistant" and found[-1].is_learnt):
        found.pop()  # nothing is learnt behind the last answer that is
    if not found:
        raise RowFault("every assistant's message has the weight 0, so there is nothing to learn")
    return Example(number, tuple(found), tools=_tools(tools))


def _preference(number: int, row: Mapping[str, Any]) -> Example:
    """Of what was said before only the last answer is compared, so nothing else in it is learnt."""
    names = _FIELDS["preference"]
    if "input" not in row and _TRL[1] in row:
        row = _from_trl(row)
    _need(row, names)
    asked = row["input"]
    if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list) or not asked["messages"]:
        raise RowFault("input must be an object with messages, a list of at least one")
    before = [_message(message, f"input.messages[{index}]") for index, message in enumerate(asked["messages"])]
    if before[-1].role == "assistant":
        raise RowFault("the last of input.messages must not be the assistant's: its answers are in the two outputs")
    wanted, rejected = (_only_answer(row[name], name) for name in names[1:])
    if wanted == rejected:
        raise RowFault("preferred_output and non_preferred_output are the same, so nothing is preferred")
    messages = (*(replace(message, is_learnt=False) for message in before), wanted)
    return Example(number, messages, tools=_tools(asked.get("tools")), rejected=rejected)


def _only_answer(value: object, name: str) -> Message:
    if not isinstance(value, list) or len(value) != 1:
        raise RowFault(f"{name} must be a list of one message, the assistant's")
    message = _message(value[0], f"{name}[0]")
    if message.role != "assistant":
        raise RowFault(f"{name}[0] must be the assistant's")
    if not message.content.strip() and not message.calls:
        raise RowFault(f"{name}[0] is empty")
    return replace(message, is_learnt=True)


def _from_trl(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as OpenAI's preference, with whatever is wrong in it left to be found there."""
    asked, *answers = (row[name] for name in _TRL)
    said = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers]
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    found = {"messages": messages, "tools": row.get("tools")}
    return dict(zip(_FIELDS["preference"], (found, *said), strict=True))


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f"{where} must be an object with role and content, both strings")
    role, calls = message.get("role"), _calls(message, where)
    content = _content(message.get("content"), where, may_lack=bool(calls))
    role = _OTHER_ROLES.get(str(role), role)
    if role not in _ROLES:
        raise RowFault(f"{where}.role must be one of {', '.join(_ROLES)}")
    if calls and role != "assistant":
        raise RowFault(f"{where}.tool_calls is only in an assistant's message")
    weight = message.get("weight")
    if weight is not None and (weight not in (0, 1) or role != "assistant"):
        raise RowFault(f"{where}.weight must be 0 or 1, and on an assistant's message")
    call_id = message.get("tool_call_id")
    return Message(role, content, weight != 0, calls, _string(call_id, f"{where}.tool_call_id") if call_id else "")


def _content(value: object, where: str, *, may_lack: bool) -> str:
    if value is None and may_lack:
        return ""
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(_string(part.get("text"), f"{where}.content") for part in value)
    if not isinstance(value, str):
        raise RowFault(f"{where} must be an object with role and content, both strings")
    return _string(value, f"{where}.content")


def _calls(message: Mapping[str, Any], where: str) -> str:
    """The calls of a message as JSON with arguments that are objects; empty without any."""
    calls = message.get("tool_calls") or ([{"function": c}] if (c := message.get("function_call")) else [])
    if not isinstance(calls, list):
        raise RowFault(f"{where}.tool_calls must be a list")
    return _dumped(
        [_call(call, f"{where}.tool_calls[{index}]", index) for index, call in enumerate(calls)], f"{where}.tool_calls"
    )


def _call(call: object, where: str, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault(f"{where}.function must be an object with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{where}.function.arguments")
    if not isinstance(arguments, dict):
        raise RowFault(f"{where}.function.arguments must be a JSON object")
    named = call.get("id") if isinstance(call, dict) else None
    call_id = _string(named, f"{where}.id") if named else f"call_{index}"
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: object) -> str:
    """Tools as JSON, each as OpenAI describes one; functions alone are taken too."""
    if tools is None or tools == []:
        return ""
    if not isinstance(tools, list):
        raise RowFault("tools must be a list")
    found = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(f"tools[{index}] must be an object with a function that has a name")
        found.append({"type": "function", "function": function})
    return _dumped(found, "tools")


def _dumped(found: list[dict[str, Any]], name: str) -> str:
    try:
        text = json.dumps(found, ensure_ascii=False) if found else ""
    except TypeError:  # a time, a number of another library, out of parquet
        raise RowFault(f"{name} hold a value that JSON does not have") from None
    return _string(text, name)
