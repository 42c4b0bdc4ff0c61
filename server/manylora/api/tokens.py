"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM's server has them. An adapter's own tokens count."""

from functools import partial
from typing import Any, ClassVar, Final

import orjson
from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from manylora.api.auth import Caller
from manylora.api.chats import rendered
from manylora.api.defaults import chat_template_of, with_system_prompt
from manylora.api.fields import TOKENIZE_UNSUPPORTED, Unsupported
from manylora.api.json_body import documented
from manylora.api.lanes import INLINE_CHARACTERS, PYTHON, beside_loop
from manylora.api.naming import adapter_of, looked_up
from manylora.api.requests import INLINE_IDS, counted_ids, lane_of, read_body
from manylora.api.room import PromptEngine, Seen
from manylora.api.sampling import check_token_ids
from manylora.api.schemas import MAX_MESSAGES, Body, Int, Message, parse
from manylora.api.state import Services, ServicesDep
from manylora.engine.interface import AdapterRef, Mix
from manylora.errors import InvalidRequest
from manylora.tenants.interface import Principal

__all__ = ["DetokenizeRequest", "TokenizeRequest", "router"]

MAX_DETOKENIZED: Final = 262_144
router = APIRouter(tags=["tokens"])


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a chat as the model's template writes it."""

    unsupported: ClassVar[Unsupported] = TOKENIZE_UNSUPPORTED
    is_model_required: ClassVar[bool] = False

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    add_special_tokens: bool | None = Field(
        default=None, description="Of a text true, of a chat false, unless it says."
    )
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_either(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either 'prompt' or 'messages'.", param="prompt")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    is_model_required: ClassVar[bool] = False

    tokens: list[Int] = Field(max_length=MAX_DETOKENIZED, fail_fast=True)


@router.post(
    "/tokenize",
    openapi_extra=documented("TokenizeRequest"),
)
async def tokenize(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """The token ids of a text or a chat, and how many there are."""
    body = await read_body(request, partial(parse, TokenizeRequest))
    adapter = await _named(body, caller, services)
    engine = Seen.by(Mix.of(adapter), services.engine)
    text = body.prompt
    if body.messages is not None:
        template = chat_template_of(services.directory, adapter)
        messages = with_system_prompt(body.messages, services.directory, adapter)
        text = await rendered(messages, engine.codec, template=template, tenant=caller.tenant)
    assert text is not None, "the schema asks for one of the two"
    if len(text) <= INLINE_CHARACTERS:
        return _json(_tokens_of(text, body, engine))
    return _json(await beside_loop(lane_of(text), _tokens_of, text, body, engine))


def _tokens_of(text: str, body: TokenizeRequest, engine: PromptEngine) -> bytes:
    codec, context = engine.codec, engine.model.context_length
    is_chat = body.messages is not None
    has_special = not is_chat if body.add_special_tokens is None else body.add_special_tokens
    ids = counted_ids(text, engine, special=has_special, param="messages" if is_chat else "prompt")
    names = [codec.token_name(token_id) for token_id in ids] if body.return_token_strs else None
    return orjson.dumps({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": names})


@router.post(
    "/detokenize",
    openapi_extra=documented("DetokenizeRequest"),
)
async def detokenize(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """The text of token ids, special tokens included."""
    body = await read_body(request, partial(parse, DetokenizeRequest))
    engine = Seen.by(Mix.of(await _named(body, caller, services)), services.engine)
    if len(body.tokens) <= INLINE_IDS:
        return _json(_text_of(body, engine))
    return _json(await beside_loop(PYTHON, _text_of, body, engine))


def _text_of(body: DetokenizeRequest, engine: PromptEngine) -> bytes:
    ids = check_token_ids(body.tokens, engine.model, "tokens")
    return orjson.dumps({"prompt": engine.codec.decode(ids, skip_special_tokens=False)})


@router.get("/tokenizer_info")
async def tokenizer_info(caller: Caller, services: ServicesDep) -> dict[str, Any]:
    """The tokenizer's configuration: its class, special tokens and chat template."""
    return dict(services.engine.codec.info)


async def _named(body: Body, caller: Principal, services: Services) -> AdapterRef | None:
    """The adapter that the body names. Raises AdapterNotFound for a model that the caller may not name."""
    base, aliases = services.engine.model.name, services.settings.resolved_model_aliases
    find = partial(adapter_of, body, services.directory, caller.tenant, base, aliases)
    return await looked_up(find, services.following)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
