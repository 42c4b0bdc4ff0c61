"""A checked chat becomes the text that the model gets; how answers are read, and what calls they are held to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from manylora.api.lanes import INLINE_CHARACTERS, PYTHON, TEMPLATES, beside_loop
from manylora.api.schemas import ChatRequest, Message
from manylora.api.structured import Asked, placed
from manylora.chat.format import ChatFormat, ChatOptions
from manylora.chat.pieces import Reader
from manylora.chat.reading import Reading
from manylora.engine.interface import Grammar, TextCodec
from manylora.errors import InvalidGrammar, InvalidRequest

__all__ = ["RenderedChat", "rendered", "rendered_beside", "rendered_chat"]

R = TypeVar("R")
_INLINE_MESSAGES: Final = 32


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat's text. `reader` makes what reads one answer, where that is more than text.

    `thoughts_end` is the mark up to which the model thinks first, if the text ends in its thoughts.
    """

    text: str
    form: ChatFormat
    reader: Callable[[], Reader] | None = None
    thoughts_end: str | None = None

    @property
    def needs_special_tokens(self) -> bool:
        """Whether answers can only be read with special tokens in their text."""
        return self.reader is not None and self.form.needs_special_tokens

    def held(self, request: ChatRequest, asked: Asked | None) -> Asked | None:
        """What answers are held to: calls, where the request holds any, beside what it says of the text.

        Raises InvalidRequest where the two do not go together, or the base's calls cannot be held to anything.
        """
        if request.used_tools.are_held:
            asked = self._calls(request, asked)
        if asked is not None and self.thoughts_end is not None:
            return Asked(Grammar.after_thoughts(self.thoughts_end, asked.grammar), asked.param, asked.schema)
        return asked

    def _calls(self, request: ChatRequest, asked: Asked | None) -> Asked:
        tools = request.used_tools
        param = "tool_choice" if tools.must_call else "tools"
        if self.form.syntax is None:
            raise InvalidRequest(
                "How this base writes calls is known to its tokenizer alone, so that none can be insisted on and no "
                "arguments held to a schema. Leave out 'strict', and send 'tool_choice' auto.",
                param=param,
            )
        is_json = asked is not None and asked.grammar.kind == "json_schema"
        if asked is not None and not is_json:
            which = "'tool_choice', which asks for a call and it" if tools.must_call else "strict tools, whose calls it"
            raise InvalidRequest(
                f"'{asked.param}' does not go with {which} would rule out. Send a JSON schema, or 'tool_choice' none.",
                param=asked.param,
            )
        rules = tools.rules(asked.grammar.source if asked is not None and is_json else None)
        described = [{"function": {"parameters": tool.function.schema_of_arguments}} for tool in tools.offered]
        try:
            return Asked(rules.grammar(self.form.syntax), "tools", described)
        except InvalidGrammar as error:
            raise placed(error, "tools", described) from None


def rendered_chat(request: ChatRequest, codec: TextCodec) -> RenderedChat:
    """Raises InvalidRequest when the model's template refuses the messages or knows nothing of what came with them."""
    form, tools = codec.chat_format(request.chat_template), request.used_tools
    _check_takes(request, form)
    described = tools.for_template()
    options = ChatOptions(
        tools=described,
        documents=request.documents,
        variables=_variables(request),
        template=request.chat_template,
        for_answer=request.add_generation_prompt is not False,
        continue_final=request.continue_final_message,
    )
    text = codec.render_chat([message.for_template() for message in request.messages], options)
    is_thinking = form.reasoning is not None and _ends_in_thoughts(request, text, form.reasoning)
    ending = form.reasoning[1] if form.reasoning is not None and is_thinking else None
    if form.has_response_template:
        return RenderedChat(text, form, lambda: codec.response_reader(text, described, only_one=tools.only_one), ending)
    if form.reasoning is None and not described:
        return RenderedChat(text, form)
    reading = Reading(form.reasoning, is_thinking, form.syntax, tools.names, tools.only_one, tools.schemas)
    return RenderedChat(text, form, reading.reader, ending)


async def rendered_beside(request: ChatRequest, codec: TextCodec, tenant: str) -> RenderedChat:
    """What `rendered_chat` gives, beside the event loop where that takes long. Raises InvalidRequest and QueueFull."""
    is_plain = not (request.tools or request.documents or request.chat_template_kwargs)
    owner = None if request.chat_template is None else tenant
    return await _in_turn(owner, is_plain, request.messages, rendered_chat, request, codec)


async def rendered(
    messages: Sequence[Message], codec: TextCodec, *, template: str | None = None, tenant: str = ""
) -> str:
    """The text of a chat, by the base's template or a stranger's for this tenant. Raises InvalidRequest as it does."""
    owner = None if template is None else tenant
    return await _in_turn(owner, True, messages, _render, messages, codec, template)


async def _in_turn(
    owner: str | None, is_plain: bool, messages: Sequence[Message], render: Callable[..., R], *args: Any
) -> R:
    """What `render` gives; with much to do, beside the event loop. `owner`: whose turn a stranger's template takes."""
    size = sum(len(message.content) for message in messages)
    try:
        if owner is not None:
            return await TEMPLATES.run(owner, render, *args)
        if is_plain and size <= INLINE_CHARACTERS and len(messages) <= _INLINE_MESSAGES:
            return render(*args)
        return await beside_loop(PYTHON, render, *args)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=error.param or "messages") from None


def _render(messages: Sequence[Message], codec: TextCodec, template: str | None) -> str:
    return codec.render_chat([message.for_template() for message in messages], ChatOptions(template=template))


def _check_takes(request: ChatRequest, form: ChatFormat) -> None:
    has_calls = any(message.tool_calls for message in request.messages)
    if (request.used_tools.offered or has_calls) and not form.takes_tools:
        raise InvalidRequest(
            "This base's chat template knows no tools. Started with --tool-prompt, the server tells the base of them "
            "in words.",
            param="tools" if request.used_tools.offered else "messages",
        )
    if request.used_tools.offered and form.syntax is None and not form.has_response_template:
        raise InvalidRequest(
            "This base's chat template takes tools, but how the base writes its calls is not known here. The server's "
            "setting --tool-parser says it.",
            param="tools",
        )
    if request.documents and not form.takes_documents:
        raise InvalidRequest(
            "This base's chat template has no place for documents. Put their text into a message.", param="documents"
        )


def _variables(request: ChatRequest) -> Mapping[str, Any]:
    variables = dict(request.chat_template_kwargs)
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
        if request.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    return variables


def _ends_in_thoughts(request: ChatRequest, text: str, marks: tuple[str, str]) -> bool:
    """Whether the model is to go on with what it thinks: the template has begun that, or the message that goes on."""
    start, end = marks
    if request.continue_final_message:
        said = request.messages[-1].content
        return said.rfind(start) > said.rfind(end)
    return text.rstrip().endswith(start)
