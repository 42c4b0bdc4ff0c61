"""How much of the context a request's prompts and answers have."""

from dataclasses import dataclass, replace
from typing import Protocol

from manylora.api.schemas import GenerationRequest, InferenceRequest
from manylora.engine.interface import (
    CompiledGrammar,
    EngineClient,
    Grammar,
    Mix,
    ModelInfo,
    SamplingParams,
    TextCodec,
)
from manylora.errors import ContextLengthExceeded, InvalidRequest

__all__ = ["PromptEngine", "Seen", "fit_to_context", "room_for_answer", "too_long"]


class PromptEngine(Protocol):
    """The part of `EngineClient` that prompts are made with."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def codec(self) -> TextCodec: ...

    @property
    def max_choices(self) -> int: ...

    async def compile(self, grammar: Grammar, tenant: str) -> CompiledGrammar: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """An engine as requests of some adapters see it. Implements `PromptEngine`."""

    engine: EngineClient
    model: ModelInfo
    codec: TextCodec

    @classmethod
    def by(cls, mix: Mix, engine: EngineClient) -> PromptEngine:
        """Virtual tokens take a part of the context, and an adapter may have a vocabulary of its own.

        Raises Conflict where the base's tokenizer cannot have that.
        """
        taken, own, model = mix.num_virtual_tokens, mix.vocabulary, engine.model
        if not taken and own is None:
            return engine
        model = replace(
            model,
            context_length=model.context_length - taken,
            num_virtual_tokens=taken,
            vocab_size=mix.vocab_size(model.vocab_size),
        )
        return cls(engine, model, engine.codec.with_vocabulary(own))

    @property
    def max_choices(self) -> int:
        return self.engine.max_choices

    async def compile(self, grammar: Grammar, tenant: str) -> CompiledGrammar:
        return await self.engine.compile(grammar, tenant)


def fit_to_context(
    params: SamplingParams, request: GenerationRequest, num_prompt_tokens: int, model: ModelInfo, unasked: int | None
) -> SamplingParams:
    """`params` with the `max_tokens` asked for, or the default. Raises ContextLengthExceeded."""
    room = room_for_answer(request, num_prompt_tokens, model)
    asked = request.token_limit
    most_unasked = request.default_max_tokens if unasked is None else unasked
    default = room if most_unasked is None else most_unasked
    most = default if asked is None else asked
    if asked is None or request.may_fill_context:
        most = min(most, room)
    if params.min_tokens > most:
        raise InvalidRequest(
            f"'min_tokens' is {params.min_tokens} and the answer has at most {most} tokens.", param="min_tokens"
        )
    return replace(params, max_tokens=most)


def room_for_answer(
    request: InferenceRequest, num_prompt_tokens: int, model: ModelInfo, *, param: str | None = None
) -> int:
    """Tokens that the context leaves for the answer, at least 1. Raises what `too_long` makes."""
    room = model.context_length - num_prompt_tokens
    asked = request.token_limit
    is_filled = isinstance(request, GenerationRequest) and request.may_fill_context
    if num_prompt_tokens > model.most_prompt_tokens or (asked is not None and asked > room and not is_filled):
        raise too_long(request, str(num_prompt_tokens), model, param=param)
    return room


def too_long(
    request: InferenceRequest, taken: str, model: ModelInfo, *, param: str | None = None
) -> ContextLengthExceeded:
    """The refusal of a prompt that takes `taken` of the context; `param`: its field, where the body has several."""
    asked = request.token_limit
    if model.kind == "pool":
        completion, remedy = "", "Shorten it, or have it cut with 'truncate_prompt_tokens': -1."
    else:
        completion = f", the answer up to {asked}" if asked else " and leaves no room for an answer"
        remedy = "Shorten the prompt or ask for fewer tokens."
    virtual, context = model.num_virtual_tokens, model.context_length + model.num_virtual_tokens
    behind = f", behind {virtual} virtual ones of the adapter," if virtual else ""
    return ContextLengthExceeded(
        f"The model's context is {context} tokens; the prompt takes {taken}{behind}{completion}. {remedy}",
        param=param or request.prompt_field,
    )
