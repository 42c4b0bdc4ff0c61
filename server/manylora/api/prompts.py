"""From a body's prompts or messages to token ids.

What surely does not fit is refused before it is encoded, and every id is checked, wherever it comes from: a tokenizer
can have tokens that the model has no row for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from manylora.api.lanes import LONG_TEXT, PYTHON, SHORT_TEXT, beside_loop
from manylora.api.sampling import check_token_ids, room_for_answer, too_long
from manylora.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from manylora.engine.interface import EngineClient, TextCodec
from manylora.errors import InvalidRequest, quoted

__all__ = ["EncodedPrompt", "encode_chat", "encode_prompts"]

# Up to here the work takes a millisecond, and a thread's turn is not worth waiting for.
_INLINE_CHARACTERS: Final = 4096
_INLINE_IDS: Final = 16_384
_INLINE_MESSAGES: Final = 32
# Up to here it is done soon, so it need not stand behind the long ones.
_SHORT_CHARACTERS: Final = 2**18
# Encodings take a hundred bytes for a character, so that many prompts are encoded some at a time.
_BATCH_CHARACTERS: Final = 2**20


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt: its ids, and its text as `echo` repeats it."""

    ids: tuple[int, ...]
    text: str = ""


async def encode_prompts(request: CompletionRequest, engine: EngineClient) -> list[EncodedPrompt]:
    """Every prompt of a completions request. Raises InvalidRequest."""
    prompts = request.prompts
    if not all(prompts):
        raise InvalidRequest("'prompt' is empty. Send at least one token.", param="prompt")
    size = sum(map(len, prompts))
    if isinstance(prompts[0], str):
        texts = [text for text in prompts if isinstance(text, str)]
        encoded = await _encode(request, texts, size, engine)
        if not all(encoded):
            raise InvalidRequest("'prompt' has no tokens for this model.", param="prompt")
        return [EncodedPrompt(ids, text if request.echo else "") for ids, text in zip(encoded, texts, strict=True)]
    if size <= _INLINE_IDS and not request.echo:
        return _given(request, engine)
    return await beside_loop(PYTHON, _given, request, engine)


def _given(request: CompletionRequest, engine: EngineClient) -> list[EncodedPrompt]:
    """Prompts that came as ids. Those of all are checked before the first is decoded for `echo`."""
    prompts = []
    for prompt in request.prompts:
        assert isinstance(prompt, list), "prompts are all text or all ids"
        room_for_answer(request, len(prompt), engine.model)
        prompts.append(check_token_ids(prompt, engine.model, "prompt"))
    decode = engine.codec.decode
    return [EncodedPrompt(ids, decode(ids, skip_special_tokens=False) if request.echo else "") for ids in prompts]


async def encode_chat(request: ChatRequest, engine: EngineClient) -> EncodedPrompt:
    """The rendered chat. Raises InvalidRequest when the model's template refuses the messages."""
    messages, size = request.messages, sum(len(message.content) for message in request.messages)
    try:
        if size <= _INLINE_CHARACTERS and len(messages) <= _INLINE_MESSAGES:
            text = _render(request, engine.codec)
        else:
            text = await beside_loop(PYTHON, _render, request, engine.codec)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=error.param or "messages") from None
    [ids] = await _encode(request, [text], len(text), engine)
    if not ids:
        raise InvalidRequest("'messages' have no tokens for this model.", param="messages")
    return EncodedPrompt(ids)


def _render(request: ChatRequest, codec: TextCodec) -> str:
    messages: list[dict[str, Any]] = [message.for_template() for message in request.messages]
    return codec.render_chat(messages)


async def _encode(
    request: GenerationRequest, texts: Sequence[str], num_characters: int, engine: EngineClient
) -> list[tuple[int, ...]]:
    """The ids of each text; `num_characters` is the length of all."""
    if num_characters <= _INLINE_CHARACTERS:
        encode, special = engine.codec.encode, isinstance(request, CompletionRequest)
        return [_checked(encode(text, add_special_tokens=special), request, engine) for text in texts]
    lane = SHORT_TEXT if num_characters <= _SHORT_CHARACTERS else LONG_TEXT
    return await beside_loop(lane, _encode_long, request, texts, engine)


def _encode_long(request: GenerationRequest, texts: Sequence[str], engine: EngineClient) -> list[tuple[int, ...]]:
    codec, special = engine.codec, isinstance(request, CompletionRequest)
    for text in texts:
        if codec.surely_exceeds(text, engine.model.context_length):
            raise too_long(request, f"more than that with {len(text)} characters", engine.model)
    return [
        _checked(ids, request, engine)
        for batch in _batches(texts)
        for ids in codec.encode_many(batch, add_special_tokens=special)
    ]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch


def _checked(ids: list[int], request: GenerationRequest, engine: EngineClient) -> tuple[int, ...]:
    """The ids of a text, if the model has a row for each and room for them."""
    room_for_answer(request, len(ids), engine.model)
    highest = max(ids, default=0)
    if highest >= engine.model.vocab_size:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise InvalidRequest(
            f"'{param}' has the token {quoted(repr(engine.codec.token_text(highest)))} (id {highest}), which the "
            f"tokenizer knows and the model does not: its ids end at {engine.model.vocab_size - 1}. Leave it out.",
            param=param,
        )
    return tuple(ids)
