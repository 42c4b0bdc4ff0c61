"""`/generate`, `/generate_stream`, `POST /` and `/info`: the protocol of Text Generation Inference and of LoRAX.

A body becomes a completion request of this server's own. What the two protocols call otherwise is here, and their
defaults: an answer is greedy unless something asks for chance, and may fill the context unless it is bounded.
"""

import secrets
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from manylora import __version__
from manylora.api.auth import Caller
from manylora.api.fields import NOTHING, Unsupported, renamed, unsupported_field, wanted
from manylora.api.json_body import documented, parse_json
from manylora.api.naming import is_path
from manylora.api.requests import MAX_ECHO_CHARACTERS
from manylora.api.run import Asked, answered
from manylora.api.schemas import MAX_N, MAX_STOPS, CompletionRequest, Int, checked
from manylora.api.state import ServicesDep
from manylora.api.strict import Strict
from manylora.api.structured import check_goes_with
from manylora.api.tgi_answers import UINT64, GenerateAnswer, Shape
from manylora.api.translation import valid
from manylora.errors import InvalidRequest, quoted
from manylora.identity import MAX_MIX_WEIGHT, MAX_MIXED

__all__ = ["GenerateRequest", "asked_by", "router"]

_BASE: Final = "__base_model__"  # LoRAX's name for no adapter
_UNSUPPORTED: Final[Unsupported] = {
    "watermark": NOTHING,
    "api_token": NOTHING,
    "apply_chat_template": NOTHING,
}
# What this server's own completion request calls each field, and what it is called here.
_NAMES: Final = {
    "adapter_id": "parameters.adapter_id",
    "adapters": "parameters.merged_adapters.ids",
    "prompt_logprobs": "parameters.decoder_input_details",
    "prompt": "inputs",
    "max_tokens": "parameters.max_new_tokens",
    "temperature": "parameters.temperature",
    "top_p": "parameters.top_p",
    "top_k": "parameters.top_k",
    "typical_p": "parameters.typical_p",
    "seed": "parameters.seed",
    "stop": "parameters.stop",
    "ignore_eos": "parameters.ignore_eos_token",
    "repetition_penalty": "parameters.repetition_penalty",
    "frequency_penalty": "parameters.frequency_penalty",
    "presence_penalty": "parameters.presence_penalty",
    "truncate_prompt_tokens": "parameters.truncate",
    "n": "parameters.best_of",
}
# What holds, and not the model's own, where neither the request nor its adapter says anything.
_OTHERWISE: Final = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "include_stop_str_in_output": True}


class Grammar(Strict):
    """`parameters.grammar`, as TGI has it."""

    type: Literal["json", "regex", "json_schema"]
    value: Any = Field(description="A schema, a regular expression, or `{name, schema}`.")


class ResponseFormat(Strict):
    """`parameters.response_format`, as LoRAX has it."""

    type: Literal["json_object", "json_schema", "text"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class MergedAdapters(Strict):
    """`parameters.merged_adapters`, as LoRAX has it."""

    ids: list[str] = Field(min_length=1, max_length=MAX_MIXED, fail_fast=True, description="Adapters of this server.")
    weights: list[float] = Field(min_length=1, max_length=MAX_MIXED, fail_fast=True)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = Field(default=None, ge=0, le=1, description="Not for `linear`, nor the next one.")
    majority_sign_method: Literal["total", "frequency"] | None = None

    @property
    def parts(self) -> list[dict[str, Any]]:
        """As this server's own `adapters`."""
        return [{"name": n, "weight": w} for n, w in zip(self.ids, self.weights, strict=True)]


class Parameters(Strict):
    """`parameters` of both protocols."""

    adapter_id: str | None = Field(default=None, description="An adapter of this server; `__base_model__` for none.")
    merged_adapters: MergedAdapters | None = Field(default=None, description="Several adapters, each with a weight.")
    adapter_source: str | None = Field(default=None, description="`local`, which every adapter here is.")
    max_new_tokens: Int | None = Field(default=None, ge=1, description="Left out: the rest of the context.")
    do_sample: bool = False
    temperature: float | None = Field(default=None, ge=0)
    top_k: Int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    seed: Int | None = Field(default=None, ge=0, lt=UINT64)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: list[str] = Field(default=[], fail_fast=True, description="The answer ends with the one that it comes to.")
    ignore_eos_token: bool = False
    truncate: Int | None = Field(default=None, ge=1, description="Only so many of the prompt's last tokens are kept.")
    return_full_text: bool = False
    best_of: Int | None = Field(default=None, ge=1)
    details: bool = False
    decoder_input_details: bool = False
    top_n_tokens: Int | None = Field(default=None, ge=0)
    return_k_alternatives: Int | None = Field(default=None, ge=0)
    grammar: Grammar | None = None
    schema_: dict[str, Any] | str | None = Field(default=None, alias="schema", description="A JSON schema.")
    response_format: ResponseFormat | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether anything asks for chance."""
        cuts = self.top_k is not None or (self.top_p or 1) < 1 or (self.typical_p or 1) < 1
        return self.temperature != 0 and (self.do_sample or cuts or self.temperature not in (None, 1))


class GenerateRequest(Strict):
    """`POST /generate`, `POST /generate_stream` and `POST /`."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters = Parameters()
    stream: bool = Field(default=False, description="Of `POST /` alone.")
    add_special_tokens: bool = True


class _Completion(CompletionRequest):
    """A completion that may fill the context where nothing bounds it."""

    default_max_tokens: ClassVar[int | None] = None


def asked_by(raw: Any, *, shape: Shape, streams: bool | None) -> Asked:
    """What a body asks for. `streams` is what the route does, None where the body says it. Raises InvalidRequest."""
    body = _checked(raw)
    is_streamed = body.stream if streams is None else streams
    if streams is False and body.stream:
        raise InvalidRequest("'stream' is not for this route. Send it to /generate_stream.", param="stream")
    asked = body.parameters
    _check_together(body, is_streamed)
    try:
        completion = checked(_Completion, _in_our_words(body, is_streamed))
    except InvalidRequest as error:
        raise renamed(error, _names(asked)) from None
    said = shape.for_request(
        inputs=body.inputs if asked.return_full_text else "",
        has_details=asked.details or asked.decoder_input_details,
        num_top=asked.top_n_tokens or 0,
        num_alternatives=asked.return_k_alternatives or 0,
    )
    otherwise = {**_OTHERWISE, "temperature": 1.0 if asked.is_sampled else 0.0, "seed": secrets.randbits(63)}
    return Asked(completion, lambda run: GenerateAnswer(run, said), names=_names(asked), otherwise=otherwise)


def _checked(raw: Any) -> GenerateRequest:
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    kept = wanted(raw, GenerateRequest.model_fields, {})
    if isinstance(kept.get("parameters"), dict):
        known = [field.alias or name for name, field in Parameters.model_fields.items()]
        kept["parameters"] = wanted(kept["parameters"], known, _UNSUPPORTED, where="parameters.")
    return valid(GenerateRequest, kept)


def _check_together(body: GenerateRequest, is_streamed: bool) -> None:
    asked = body.parameters
    best_of = asked.best_of or 1
    if asked.adapter_source not in (None, "local"):
        raise InvalidRequest(
            f"'parameters.adapter_source' is '{quoted(asked.adapter_source)}'. Adapters are uploaded or imported first "
            "(POST /v1/adapters) and then named: send 'local', or leave it out.",
            param="parameters.adapter_source",
        )
    if asked.adapter_id is not None and is_path(asked.adapter_id):
        raise InvalidRequest(
            f"'parameters.adapter_id' is '{quoted(asked.adapter_id)}', a path or a repository. Upload or import the "
            "adapter first (POST /v1/adapters), and send its name.",
            param="parameters.adapter_id",
        )
    has_tokens = is_streamed or asked.details or asked.decoder_input_details
    for name in ("top_n_tokens", "return_k_alternatives"):
        if getattr(asked, name) and not has_tokens:
            where = f"parameters.{name}"
            raise InvalidRequest(f"'{where}' is told among 'parameters.details'. Send both.", param=where)
    if asked.merged_adapters is not None:
        _check_merged(asked.merged_adapters)
    if best_of > 1 and not asked.is_sampled:
        raise InvalidRequest("'parameters.best_of' above 1 needs 'do_sample': true.", param="parameters.best_of")
    if best_of > 1 and asked.seed is not None:
        raise InvalidRequest("'parameters.seed' goes with a 'best_of' of 1 only.", param="parameters.seed")
    if best_of > 1 and is_streamed:
        raise InvalidRequest("'parameters.best_of' above 1 is not streamed.", param="parameters.best_of")
    if asked.decoder_input_details and is_streamed:
        raise InvalidRequest(
            "'parameters.decoder_input_details' is not streamed.", param="parameters.decoder_input_details"
        )
    if asked.return_full_text and len(body.inputs) * best_of > MAX_ECHO_CHARACTERS:
        raise InvalidRequest(
            f"'parameters.return_full_text' would repeat more than {MAX_ECHO_CHARACTERS} characters. Leave it out.",
            param="parameters.return_full_text",
        )


def _check_merged(merged: MergedAdapters) -> None:
    """Raises InvalidRequest for what is not the weighted sum of the adapters."""
    where = "parameters.merged_adapters"
    if len(merged.ids) != len(merged.weights):
        raise InvalidRequest(
            f"'{where}' has {len(merged.ids)} ids and {len(merged.weights)} weights. Send one for each.",
            param=f"{where}.weights",
        )
    if not all(abs(weight) <= MAX_MIX_WEIGHT for weight in merged.weights):
        raise InvalidRequest(
            f"'{where}.weights' must be from {-MAX_MIX_WEIGHT:g} to {MAX_MIX_WEIGHT:g}.", param=f"{where}.weights"
        )
    if merged.merge_strategy != "linear":
        raise InvalidRequest(
            f"'{where}.merge_strategy' is '{merged.merge_strategy}', which makes another adapter and is not done for a "
            "request. Merge them once (`manylora merge --method`, or PEFT's add_weighted_adapter), upload the result "
            "(POST /v1/adapters) and name it, or send 'linear'.",
            param=f"{where}.merge_strategy",
        )
    for name in ("density", "majority_sign_method"):
        if getattr(merged, name) is not None:
            raise InvalidRequest(f"'{where}.{name}' means nothing for 'linear'. Leave it out.", param=f"{where}.{name}")


def _in_our_words(body: GenerateRequest, is_streamed: bool) -> dict[str, Any]:
    """What is sent, and nothing more: what is left out is for the adapter to say, and then for `_OTHERWISE`."""
    asked = body.parameters
    is_said = asked.is_sampled or asked.temperature == 0
    best_of = asked.best_of or 1
    has_tokens = is_streamed or asked.details or asked.decoder_input_details or best_of > 1
    merged = asked.merged_adapters
    return {
        "adapters": [] if merged is None else merged.parts,
        "adapter_id": None if asked.adapter_id in (None, "", _BASE) else asked.adapter_id,
        "prompt": body.inputs,
        "stream": is_streamed,
        "max_tokens": asked.max_new_tokens,
        "temperature": asked.temperature if is_said else None,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "typical_p": asked.typical_p,
        "seed": asked.seed if asked.seed is None or asked.seed < UINT64 // 2 else asked.seed - UINT64,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "stop": asked.stop or None,
        "ignore_eos": asked.ignore_eos_token or None,  # which LoRAX's client sends with whatever it asks
        "truncate_prompt_tokens": asked.truncate,
        "add_special_tokens": body.add_special_tokens,
        "n": best_of,
        "logprobs": max(asked.top_n_tokens or 0, asked.return_k_alternatives or 0) if has_tokens else None,
        "prompt_logprobs": 0 if asked.decoder_input_details else None,
        "structured_outputs": _structure(asked),
    }


def _structure(asked: Parameters) -> dict[str, Any] | None:
    """What the answer must look like. Raises InvalidRequest where more than one field says so."""
    ways = {"grammar": asked.grammar, "schema": asked.schema_, "response_format": asked.response_format}
    found = [name for name, value in ways.items() if value is not None]
    if len(found) > 1:
        where = f"parameters.{found[1]}"
        raise InvalidRequest(
            f"'parameters.{found[0]}' and '{where}' both say what the answer must look like. Send one.", param=where
        )
    if asked.grammar is not None:
        return _of_grammar(asked.grammar)
    if asked.response_format is not None:
        form = asked.response_format
        if form.type == "text":
            check_goes_with(form, {"json_schema": ("schema_",)}, "parameters.response_format")
            return None
        return {"json_object": True} if form.schema_ is None else {"json": form.schema_}
    return None if asked.schema_ is None else {"json": asked.schema_}


def _of_grammar(grammar: Grammar) -> dict[str, Any]:
    if grammar.type != "json_schema":
        return {grammar.type: grammar.value}
    described = grammar.value if isinstance(grammar.value, dict) else {}
    if "schema" not in described:
        where = "parameters.grammar.value.schema"
        raise InvalidRequest(f"The field '{where}' is required with the type 'json_schema'.", param=where)
    unknown = next((name for name in described if name not in ("name", "schema")), None)
    if unknown is not None:
        raise unsupported_field(f"parameters.grammar.value.{unknown}")
    return {"json": described["schema"]}


def _names(asked: Parameters) -> dict[str, str]:
    """What a field of the completion request is called here."""
    way = "parameters.response_format.schema" if asked.response_format else "parameters.schema"
    if asked.grammar is not None:
        way = "parameters.grammar.value" + (".schema" if asked.grammar.type == "json_schema" else "")
    top = "parameters.return_k_alternatives" if asked.return_k_alternatives else "parameters.top_n_tokens"
    return {
        "structured_outputs.json": way,
        "structured_outputs.regex": way,
        "structured_outputs": way,
        "logprobs": top,
        **_NAMES,
    }


# routes

router = APIRouter(tags=["TGI and LoRAX"])
_BODY: Final = documented("GenerateRequest")


@router.post("/generate", openapi_extra=_BODY)
async def generate(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Continue a text, whole."""
    return await answered(
        request, caller, services, lambda data: asked_by(parse_json(data), shape=Shape(), streams=False)
    )


@router.post("/generate_stream", openapi_extra=_BODY)
async def generate_stream(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Continue a text, token by token."""
    return await answered(
        request, caller, services, lambda data: asked_by(parse_json(data), shape=Shape(), streams=True)
    )


@router.post("/", openapi_extra=_BODY)
async def compat_generate(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Continue a text, whole, as a list of one answer, or with `stream` token by token."""
    return await answered(
        request, caller, services, lambda data: asked_by(parse_json(data), shape=Shape(is_listed=True), streams=None)
    )


@router.get("/info")
async def info(caller: Caller, services: ServicesDep) -> dict[str, Any]:
    """What is served, and its limits."""
    model = services.engine.model
    return {
        "model_id": model.name,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": services.engine.max_choices,
        "max_best_of": MAX_N,
        "max_stop_sequences": MAX_STOPS,
        "max_input_length": model.context_length - 1,
        "max_input_tokens": model.context_length - 1,
        "max_total_tokens": model.context_length,
        "router": "manylora",
        "version": __version__,
    }
