"""How tokens are to be chosen, from the fields of a checked body: what depends on the model is checked here."""

from collections.abc import Sequence

from manylora.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from manylora.engine.interface import ModelInfo, SamplingParams
from manylora.errors import InvalidRequest

__all__ = ["check_token_ids", "sampling_params"]


def sampling_params(request: GenerationRequest, model: ModelInfo) -> SamplingParams:
    """Everything but `max_tokens`, which depends on the prompt, and what has to be made ready first: the grammar and
    the tokens of `bad_words`. Raises InvalidRequest.
    """
    logprobs = _num_logprobs(request, model)
    top_k = model.default_top_k if request.top_k is None else request.top_k
    return SamplingParams(
        max_tokens=1,
        temperature=_or(request.temperature, model.default_temperature),
        top_p=_or(request.top_p, model.default_top_p),
        top_k=0 if top_k < 0 or top_k >= model.vocab_size else top_k,
        min_p=_or(request.min_p, 0.0),
        typical_p=_or(request.typical_p, 1.0),
        seed=request.seed,
        stop=request.stops,
        stop_token_ids=check_token_ids(request.stop_token_ids, model, "stop_token_ids"),
        ignore_eos=request.ignore_eos,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, model.default_repetition_penalty),
        logit_bias=_logit_bias(request.logit_bias, model),
        logprobs=logprobs,
        prompt_logprobs=_num_prompt_logprobs(request, logprobs, model),
        n=request.n,
        allowed_token_ids=check_token_ids(request.allowed_token_ids, model, "allowed_token_ids"),
        min_tokens=request.min_tokens,
        skip_special_tokens=request.skip_special_tokens,
        include_stop=request.include_stop_str_in_output,
        prompt_ranks=request.prompt_logprobs is not None,
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
    return _at_most(number, param, model)


def _num_prompt_logprobs(request: GenerationRequest, logprobs: int | None, model: ModelInfo) -> int | None:
    """Of the prompt, as many as either of the two fields asks for that do."""
    echoed = logprobs if isinstance(request, CompletionRequest) and request.echo else None
    asked = [each for each in (_at_most(request.prompt_logprobs, "prompt_logprobs", model), echoed) if each is not None]
    return max(asked, default=None)


def _at_most(number: int | None, param: str, model: ModelInfo) -> int | None:
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
