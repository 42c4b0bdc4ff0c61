"""The two inference bodies as they arrive: shape and ranges. What depends on the model is checked in `sampling`.

Fields of other servers' APIs that are not here are dealt with in `fields` before a body reaches its schema.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from manylora.api.errors import invalid_from
from manylora.api.fields import (
    CHAT_UNSUPPORTED,
    COMPLETION_UNSUPPORTED,
    MESSAGE_UNSUPPORTED,
    STREAM_OPTION_UNSUPPORTED,
    unsupported_field,
    without_neutral,
)
from manylora.errors import InvalidRequest

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "Message", "Prompt", "StreamOptions", "parse"]

MAX_N: Final = 128
MAX_PROMPTS: Final = 256
MAX_STOPS: Final = 32
MAX_STOP_LENGTH: Final = 1024
MAX_STOP_TOKENS: Final = 1024
MIN_CACHE_SALT_LENGTH: Final = 32  # what can be guessed keeps nobody out
MAX_CACHE_SALT_LENGTH: Final = 256
_INT64: Final = 2**63

Prompt: TypeAlias = str | list[int]
T = TypeVar("T", bound="GenerationRequest")


def _integral(value: object) -> object:
    """JSON has one number type: 16.0 is an integer too. `true` is none."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


Int = Annotated[int, BeforeValidator(_integral)]
Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)]


class _Strict(BaseModel):
    """Unknown fields are refused, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool = False


class GenerationRequest(_Strict):
    """What completions and chat have in common. None is absent."""

    unsupported: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    adapter_id: str | None = Field(default=None, description="LoRAX's way to name an adapter.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = Field(default=None, ge=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Int | None = Field(default=None, ge=-1, description="-1 and 0 keep every token.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: Int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] = Field(default=[], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: Int = Field(default=1, ge=1, le=MAX_N)
    cache_salt: str | None = Field(default=None, description="A secret: who sends the same one shares cached prompts.")
    user: str | None = Field(default=None, max_length=512)
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto"] | None = None

    @field_validator("stop", mode="plain", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _check_stop(cls, value: Any) -> list[str] | None:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("must be a string or a list of strings")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"takes at most {MAX_STOPS} strings")
        if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"must hold strings of 1 to {MAX_STOP_LENGTH} characters")
        return stops

    @field_validator("cache_salt")
    @classmethod
    def _check_cache_salt(cls, value: str | None) -> str | None:
        if value is not None and not MIN_CACHE_SALT_LENGTH <= len(value) <= MAX_CACHE_SALT_LENGTH:
            raise ValueError(
                f"must have {MIN_CACHE_SALT_LENGTH} to {MAX_CACHE_SALT_LENGTH} characters: it is a secret, so draw it "
                "at random, as `openssl rand -base64 32` does"
            )
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise InvalidRequest("'max_tokens' and 'max_completion_tokens' differ. Send one.", param="max_tokens")
        return self

    def annotations(self) -> dict[str, Any]:
        """The fields that have no effect but a place in the request's log line."""
        return self.model_dump(include={"user", "metadata", "store", "service_tier"}, exclude_none=True)

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    unsupported: ClassVar[frozenset[str]] = COMPLETION_UNSUPPORTED

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Int | None = Field(default=None, ge=0, description="0 runs the prompt alone, to score it with `echo`.")
    echo: bool = False
    logprobs: Int | None = Field(default=None, ge=0)

    @field_validator("prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            for is_kind in (_is_text, _is_token_id, _is_token_ids):
                if all(map(is_kind, value)):
                    return value
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of lists of token ids, and not empty"
        )

    @property
    def prompts(self) -> list[Prompt]:
        """One entry for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Any] = self.prompt
        return [prompts] if isinstance(prompts[0], int) else prompts

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if len(self.prompts) > MAX_PROMPTS:
            raise InvalidRequest(f"'prompt' holds more than {MAX_PROMPTS} prompts. Send fewer.", param="prompt")
        return self


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_token_id, value))


class Message(_Strict):
    """One message of a chat. `name` and `tool_call_id` are handed to the model's chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="plain", json_schema_input_type=str | list[dict[str, str]])
    @classmethod
    def _join_parts(cls, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise ValueError("must be a string or a list of text parts")
        texts = [part.get("text") if _is_text_part(part) else None for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError('only parts of the form {"type": "text", "text": "…"} are supported')
        return "".join(str(text) for text in texts)

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it; the newer role `developer` is what templates call `system`."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and part.keys() == {"type", "text"}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[frozenset[str]] = CHAT_UNSUPPORTED

    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: Int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return self


def parse(schema: type[T], body: bytes) -> T:
    """The checked request. Raises InvalidRequest, whose `param` names the first field at fault."""
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    if raw.get("model") is None and "adapter_id" not in raw:
        raise InvalidRequest("The field 'model' is required: name the base or an adapter.", param="model")
    try:
        return schema.model_validate(_cleaned(raw, schema))
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False)) from None


def _cleaned(raw: dict[str, Any], schema: type[GenerationRequest]) -> dict[str, Any]:
    kept = without_neutral(raw, schema.model_fields, schema.unsupported)
    for name, only in (("service_tier", "auto"), ("store", False)):
        if kept.get(name, only) != only:
            raise unsupported_field(name)
    options, messages = kept.get("stream_options"), kept.get("messages")
    if isinstance(options, Mapping):
        kept["stream_options"] = without_neutral(
            dict(options), StreamOptions.model_fields, STREAM_OPTION_UNSUPPORTED, where="stream_options."
        )
    if isinstance(messages, list):
        kept["messages"] = [
            without_neutral(message, Message.model_fields, MESSAGE_UNSUPPORTED, where=f"messages[{i}].")
            if isinstance(message, dict)
            else message
            for i, message in enumerate(messages)
        ]
    return kept
