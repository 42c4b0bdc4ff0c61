"""From a checked body to `SamplingParams`: defaults and limits that depend on the model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from manylora.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from manylora.engine.interface import ModelInfo, SamplingParams
from manylora.errors import ContextLengthExceeded, InvalidRequest

__all__ = [
    "COMPLETION_MAX_TOKENS",
    "check_echo",
    "check_token_ids",
    "fit_to_context",
    "room_for_answer",
    "sampling_params",
    "too_long",
]

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
MAX_ECHO_LOGPROBS: Final = 1_048_576
MAX_ECHO_CHARACTERS: Final = 8_388_608


def sampling_params(request: GenerationRequest, model: ModelInfo) -> SamplingParams:
    """Everything but `max_tokens`, which `fit_to_context` sets for each prompt. Raises InvalidRequest."""
    logprobs = _num_logprobs(request, model)
    top_k = model.default_top_k if request.top_k is None else request.top_k
    return SamplingParams(
        max_tokens=1,
        temperature=_or(request.temperature, model.default_temperature),
        top_p=_or(request.top_p, model.default_top_p),
        top_k=0 if top_k < 0 or top_k >= model.vocab_size else top_k,
        min_p=_or(request.min_p, 0.0),
        seed=request.seed,
        stop=request.stops,
        stop_token_ids=check_token_ids(request.stop_token_ids, model, "stop_token_ids"),
        ignore_eos=request.ignore_eos,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, model.default_repetition_penalty),
        logit_bias=_logit_bias(request.logit_bias, model),
        logprobs=logprobs,
        prompt_logprobs=logprobs if isinstance(request, CompletionRequest) and request.echo else None,
        n=request.n,
    )


def fit_to_context(
    params: SamplingParams, request: GenerationRequest, num_prompt_tokens: int, model: ModelInfo
) -> SamplingParams:
    """`params` with the `max_tokens` asked for, or the default. Raises ContextLengthExceeded."""
    room = room_for_answer(request, num_prompt_tokens, model)
    asked = request.token_limit
    default = room if isinstance(request, ChatRequest) else min(COMPLETION_MAX_TOKENS, room)
    return replace(params, max_tokens=default if asked is None else asked)


def room_for_answer(request: GenerationRequest, num_prompt_tokens: int, model: ModelInfo) -> int:
    """Tokens that the context leaves for the answer, at least 1. Raises ContextLengthExceeded."""
    room = model.context_length - num_prompt_tokens
    asked = request.token_limit
    if room < 1 or (asked is not None and asked > room):
        raise too_long(request, str(num_prompt_tokens), model)
    return room


def too_long(request: GenerationRequest, taken: str, model: ModelInfo) -> ContextLengthExceeded:
    """The refusal of a prompt that takes `taken` of the context."""
    asked = request.token_limit
    completion = f", the answer up to {asked}" if asked is not None else " and leaves no room for an answer"
    return ContextLengthExceeded(
        f"The model's context is {model.context_length} tokens; the prompt takes {taken}{completion}. "
        "Shorten the prompt or ask for fewer tokens.",
        param="messages" if isinstance(request, ChatRequest) else "prompt",
    )


def check_echo(params: SamplingParams, request: CompletionRequest, prompts: Sequence[tuple[int, int]]) -> None:
    """`prompts` are (number of tokens, characters that `echo` repeats). Raises InvalidRequest."""
    if params.prompt_logprobs is not None:
        scored = sum(num_tokens for num_tokens, _ in prompts) * params.n * (1 + params.prompt_logprobs)
        if scored > MAX_ECHO_LOGPROBS:
            raise InvalidRequest(
                f"'echo' with 'logprobs' asks for {scored} log-probabilities of the prompt; at most "
                f"{MAX_ECHO_LOGPROBS} are given. Send fewer or shorter prompts, or a smaller 'logprobs' or 'n'.",
                param="logprobs",
            )
    repeated = sum(num_characters for _, num_characters in prompts) * params.n
    if request.echo and repeated > MAX_ECHO_CHARACTERS:
        raise InvalidRequest(
            f"'echo' would repeat {repeated} characters; at most {MAX_ECHO_CHARACTERS} are given. Send fewer or "
            "shorter prompts, or a smaller 'n'.",
            param="echo",
        )


def check_token_ids(token_ids: Sequence[int], model: ModelInfo, param: str) -> tuple[int, ...]:
    """The ids, all of them in the vocabulary. Raises InvalidRequest."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < model.vocab_size:
        raise InvalidRequest(f"'{param}' holds a token id that is not in 0 to {model.vocab_size - 1}.", param=param)
    return tuple(token_ids)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _num_logprobs(request: GenerationRequest, model: ModelInfo) -> int | None:
    if isinstance(request, ChatRequest):
        number, param = (request.top_logprobs or 0) if request.logprobs else None, "top_logprobs"
    else:
        assert isinstance(request, CompletionRequest)
        number, param = request.logprobs, "logprobs"
    if number is not None and number > model.max_logprobs:
        raise InvalidRequest(f"'{param}' is at most {model.max_logprobs}.", param=param)
    return number


def _logit_bias(bias: dict[int, float], model: ModelInfo) -> tuple[tuple[int, float], ...]:
    if bias and max(bias) >= model.vocab_size:
        raise InvalidRequest(
            f"'logit_bias' has the key '{max(bias)}', which is not a token id in 0 to {model.vocab_size - 1}.",
            param="logit_bias",
        )
    return tuple(bias.items())
