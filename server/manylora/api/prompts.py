"""From a body's prompts or messages to token ids."""

from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from manylora.api.sampling import check_token_ids
from manylora.api.schemas import ChatRequest, CompletionRequest, Prompt
from manylora.engine.interface import EngineClient
from manylora.errors import InvalidRequest

__all__ = ["EncodedPrompt", "encode_chat", "encode_prompts"]

# Longer texts are tokenised on a worker thread, so that they do not hold up the streams.
_INLINE_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt: its ids, and its text as `echo` repeats it."""

    ids: tuple[int, ...]
    text: str = ""


async def encode_prompts(request: CompletionRequest, engine: EngineClient) -> list[EncodedPrompt]:
    """Every prompt of a completions request. Raises InvalidRequest."""
    return [await _encode(prompt, engine, echo=request.echo) for prompt in request.prompts]


async def _encode(prompt: Prompt, engine: EngineClient, *, echo: bool) -> EncodedPrompt:
    if not prompt:
        raise InvalidRequest("'prompt' is empty. Send at least one token.", param="prompt")
    if isinstance(prompt, list):
        ids = check_token_ids(prompt, engine.model, "prompt")
        return EncodedPrompt(ids, engine.codec.decode(ids, skip_special_tokens=False) if echo else "")
    if len(prompt) <= _INLINE_CHARACTERS:
        encoded = engine.codec.encode(prompt)
    else:
        encoded = await anyio.to_thread.run_sync(engine.codec.encode, prompt)
    if not encoded:
        raise InvalidRequest("'prompt' has no tokens for this model.", param="prompt")
    return EncodedPrompt(tuple(encoded), prompt if echo else "")


async def encode_chat(request: ChatRequest, engine: EngineClient) -> EncodedPrompt:
    """The rendered chat. Raises InvalidRequest when the model's template refuses the messages."""
    messages: list[dict[str, Any]] = [message.for_template() for message in request.messages]
    try:
        if sum(len(message.content) for message in request.messages) <= _INLINE_CHARACTERS:
            ids = engine.codec.chat(messages)
        else:
            ids = await anyio.to_thread.run_sync(engine.codec.chat, messages)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=error.param or "messages") from None
    if not ids:
        raise InvalidRequest("'messages' have no tokens for this model.", param="messages")
    return EncodedPrompt(tuple(ids))
