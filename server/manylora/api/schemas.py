"""The two inference bodies as they arrive: shape and ranges. What depends on the model is checked in `sampling`.

Fields of other servers' APIs that are not here are dealt with in `fields` before a body reaches its schema. The first
thing wrong is the answer: a body can be wrong a million times over, and nobody reads more than one.
"""

from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from manylora.api.errors import invalid_from
from manylora.api.fields import (
    CHAT_UNSUPPORTED,
    COMPLETION_UNSUPPORTED,
    STREAM_OPTION_UNSUPPORTED,
    Unsupported,
    asks_for_nothing,
    unsupported_field,
    wanted,
)
from manylora.api.json_body import parse_json
from manylora.api.messages import Message, cleaned_message
from manylora.api.mixed import LoraScale, Mixed, MixedAdapter
from manylora.api.strict import Strict
from manylora.api.structured import ANSWER_FIELDS, ResponseFormat, StructuredOutputs
from manylora.api.tools import MAX_TOOLS, Tool, ToolChoice, Tools
from manylora.errors import InvalidRequest, quoted
from manylora.identity import MAX_MIXED

__all__ = [
    "Body",
    "ChatRequest",
    "CompletionRequest",
    "GenerationRequest",
    "InferenceRequest",
    "Message",
    "Prompt",
    "StreamOptions",
    "Texts",
    "checked",
    "checked_prompts",
    "checked_stops",
    "one_by_one",
    "parse",
]

DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's, of completions
MAX_N: Final = 128
MAX_CHAT_TEMPLATE: Final = 65_536
MAX_PROMPTS: Final = 256
MAX_INPUTS: Final = 2048
MAX_STOPS: Final = 32
MAX_STOP_LENGTH: Final = 1024
MAX_STOP_TOKENS: Final = 1024
MAX_LOGIT_BIAS: Final = 4096
MAX_ALLOWED_TOKENS: Final = 16_384
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_LENGTH: Final = 64
MAX_MESSAGES: Final = 2048
MAX_USER: Final = 512
MAX_METADATA: Final = 16
MAX_METADATA_KEY: Final = 64
MAX_METADATA_VALUE: Final = 512
MIN_CACHE_SALT_LENGTH: Final = 32  # what can be guessed keeps nobody out
MAX_CACHE_SALT_LENGTH: Final = 256
_INT64: Final = 2**63

# In which a value that real clients send for nothing counts as absent, as it does in fields that are not served.
_TOKEN_FIELDS: Final = (
    "allowed_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "min_tokens",
    "priority",
    "prompt_logprobs",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "truncate_prompt_tokens",
)

Prompt: TypeAlias = str | list[int]
ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
T = TypeVar("T", bound="Body")


def _integral(value: object) -> object:
    """JSON has one number type: 16.0 is an integer too. `true` is none."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


Int = Annotated[int, BeforeValidator(_integral)]
MetadataKey = Annotated[str, Field(max_length=MAX_METADATA_KEY)]
MetadataValue = Annotated[str, Field(max_length=MAX_METADATA_VALUE)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA, fail_fast=True)]
Texts = Annotated[dict[str, str], Field(fail_fast=True)]


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(default=False, description="Every event has the usage up to it.")


class Body(Strict):
    """What every body that names a model or an adapter has in common."""

    unsupported: ClassVar[Unsupported] = {}
    is_model_required: ClassVar[bool] = True

    model: str | None = None
    adapter_id: str | None = Field(default=None, description="LoRAX's way to name an adapter.")


class InferenceRequest(Body):
    """What every body that the model is run for has in common. None is absent."""

    adds_special_tokens: ClassVar[bool] = True
    prompt_field: ClassVar[str] = "prompt"

    adapters: list[MixedAdapter] = Field(
        default=[], max_length=MAX_MIXED, fail_fast=True, description="Several adapters, each with a weight."
    )
    lora: list[LoraScale] = Field(
        default=[], max_length=MAX_MIXED, fail_fast=True, description="llama.cpp's way to say the same."
    )
    truncate_prompt_tokens: Int | None = Field(
        default=None,
        ge=-1,
        description="The prompt's last so many tokens, an encoder's first; -1: what there is room for.",
    )
    add_special_tokens: bool | None = None
    priority: Int = Field(
        default=0, ge=-_INT64, lt=_INT64, description="Of a tenant's requests those with the lowest come first."
    )
    cache_salt: str | None = Field(default=None, description="A secret: who sends the same one shares cached prompts.")
    user: str | None = Field(default=None, max_length=MAX_USER)
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be -1, or the number of tokens that are kept, at least 1")
        return value

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
    def _check_mixed(self) -> Self:
        assert self.mixed is not None, "it raises where they do not fit"
        return self

    @property
    def mixed(self) -> Mixed:
        """The adapters that it names with a weight each."""
        return Mixed.of(self.adapters, self.lora)

    def annotations(self) -> dict[str, Any]:
        """The fields that have no effect but a place in the request's log line."""
        return self.model_dump(include={"user", "metadata", "store", "service_tier"}, exclude_none=True)

    @property
    def has_special_tokens(self) -> bool:
        """Whether a text gets the special tokens that the tokenizer puts around one."""
        return self.adds_special_tokens if self.add_special_tokens is None else self.add_special_tokens

    @property
    def prompts(self) -> list[Prompt]:
        """One entry for each prompt that is given as text or as ids."""
        return []

    def field_of(self, number: int) -> str:
        """The field that holds `prompts[number]`, for errors about that one."""
        return self.prompt_field

    @property
    def token_limit(self) -> int | None:
        """Tokens that an answer may have, where the body says so."""
        return None

    @property
    def is_streamed(self) -> bool:
        return False


def checked_stops(value: Any) -> list[str]:
    """A string or strings that end an answer. Raises ValueError."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"takes at most {MAX_STOPS} strings")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"must hold strings of 1 to {MAX_STOP_LENGTH} characters")
    return stops


class GenerationRequest(InferenceRequest):
    """What completions and chat have in common."""

    default_max_tokens: ClassVar[int | None] = None  # the rest of the context
    may_fill_context: ClassVar[bool] = False  # where it has no room for as many tokens as are asked for

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = Field(default=None, ge=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Int | None = Field(default=None, ge=-1, description="-1 and 0 keep every token.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1, description="Locally typical sampling; 1 keeps all.")
    seed: Int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] = Field(default=[], max_length=MAX_STOP_TOKENS, fail_fast=True)
    ignore_eos: bool = False
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[int, float] = Field(default={})
    n: Int = Field(default=1, ge=1, le=MAX_N)
    min_tokens: Int = Field(default=0, ge=0, description="Tokens before which the answer does not end.")
    allowed_token_ids: list[Int] = Field(default=[], max_length=MAX_ALLOWED_TOKENS, fail_fast=True)
    bad_words: list[str] = Field(default=[], max_length=MAX_BAD_WORDS, fail_fast=True)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: Int | None = Field(default=None, ge=0)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: ResponseFormat | None = Field(default=None, description="What the answer must look like.")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="vLLM's way to say the same.")
    guided_json: dict[str, Any] | bool | str | None = Field(default=None, description="`structured_outputs.json`.")
    guided_regex: str | None = Field(default=None, min_length=1, description="`structured_outputs.regex`.")
    guided_choice: list[str] | None = Field(
        default=None, min_length=1, fail_fast=True, description="`structured_outputs.choice`."
    )
    guided_grammar: str | None = Field(default=None, min_length=1, description="`structured_outputs.grammar`.")
    guided_whitespace_pattern: str | None = Field(
        default=None, min_length=1, description="`structured_outputs.whitespace_pattern`."
    )

    _check_stop = field_validator("stop", mode="plain", json_schema_input_type=str | list[str] | None)(checked_stops)

    @field_validator("bad_words")
    @classmethod
    def _check_bad_words(cls, value: list[str]) -> list[str]:
        if not all(word.strip() and len(word) <= MAX_BAD_WORD_LENGTH for word in value):
            raise ValueError(f"must hold words of 1 to {MAX_BAD_WORD_LENGTH} characters, and not of spaces alone")
        return value

    @field_validator("logit_bias", mode="plain", json_schema_input_type=dict[str, float])
    @classmethod
    def _check_bias(cls, value: Any) -> dict[int, float]:
        if not isinstance(value, dict):
            raise ValueError("must be an object of token ids and their biases")  # noqa: TRY004 - as pydantic wants it
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"takes at most {MAX_LOGIT_BIAS} tokens")
        by_id: dict[int, float] = {}
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit() and len(key) < 12):
                raise ValueError(f"has the key '{quoted(key)}', which is not a token id")
            if bias is None:
                continue
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ValueError(f"must have numbers from -100 to 100, also for token {key}")
            if int(key) in by_id:
                raise ValueError(f"names the token {int(key)} more than once, the last time as '{key}'")
            by_id[int(key)] = float(bias)
        return by_id

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and self.stream_options != StreamOptions() and not self.stream:
            raise InvalidRequest("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise InvalidRequest("'max_tokens' and 'max_completion_tokens' differ. Send one.", param="max_tokens")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "'prompt_logprobs' come with whole answers only, not in a stream.", param="prompt_logprobs"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def is_streamed(self) -> bool:
        return self.stream

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def usage_in_stream(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    unsupported: ClassVar[Unsupported] = COMPLETION_UNSUPPORTED
    default_max_tokens: ClassVar[int | None] = DEFAULT_MAX_TOKENS

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Int | None = Field(default=None, ge=0, description="0 runs the prompt alone, to score it with `echo`.")
    echo: bool = False
    logprobs: Int | None = Field(default=None, ge=0)

    @field_validator("prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        return checked_prompts(value)

    @property
    def prompts(self) -> list[Prompt]:
        return one_by_one(self.prompt)

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if len(self.prompts) > MAX_PROMPTS:
            raise InvalidRequest(f"'prompt' holds more than {MAX_PROMPTS} prompts. Send fewer.", param="prompt")
        return self


def checked_prompts(value: Any) -> Any:
    """A prompt or prompts, as text or as ids. Raises ValueError."""
    if isinstance(value, str):
        return value
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds in ({str}, {int}) or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
        return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids, and not empty"
    )


def one_by_one(prompts: Any) -> list[Prompt]:
    """Each prompt, of what may be one alone."""
    if isinstance(prompts, str):
        return [prompts]
    return [prompts] if isinstance(prompts[0], int) else prompts


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[Unsupported] = CHAT_UNSUPPORTED
    adds_special_tokens: ClassVar[bool] = False  # the chat template has written them
    prompt_field: ClassVar[str] = "messages"
    drops_oldest: ClassVar[bool] = False  # turns that the context has no room for

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    logprobs: bool = False
    top_logprobs: Int | None = Field(default=None, ge=0)
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = Field(default=True, description="Whether an answer may have more than one call.")
    chat_template: str | None = Field(default=None, max_length=MAX_CHAT_TEMPLATE, description="In place of the base's.")
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="Variables of the model's chat template.")
    add_generation_prompt: bool | None = Field(default=None, description="Begin the assistant's turn; the default.")
    continue_final_message: bool = Field(default=False, description="Go on with the last message, the assistant's.")
    documents: list[Texts] = Field(default=[], fail_fast=True, description="For templates that have a place for them.")
    reasoning_effort: ReasoningEffort | None = Field(default=None, description="For templates that read it.")
    include_reasoning: bool = Field(default=True, description="Whether answers have `reasoning_content`.")

    @property
    def used_tools(self) -> Tools:
        """The tools as they are to be used. Raises InvalidRequest."""
        return Tools(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    @model_validator(mode="after")
    def _check_continued(self) -> Self:
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise InvalidRequest(
                "'add_generation_prompt' begins a new message and 'continue_final_message' goes on with one. Send one.",
                param="add_generation_prompt",
            )
        if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
            raise InvalidRequest(
                "'continue_final_message' goes on with what the assistant said: let the last message be that.",
                param="continue_final_message",
            )
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        assert self.used_tools is not None, "it raises where they do not fit"
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return self


_SWITCHES: Final = (
    *("parallel_tool_calls", "add_generation_prompt", "continue_final_message", "include_reasoning"),
    "include_stop_str_in_output",
)
# An adapter may have others, which an empty list of a request's own takes away.
_LISTS: Final = ("allowed_token_ids", "bad_words")
_NAMES_ADAPTER: Final = frozenset(("adapter_id", "adapters", "lora"))
_MAY_BE_NOTHING: Final = frozenset(
    [
        *("adapters", "lora"),
        *(*_SWITCHES, *ANSWER_FIELDS, *_TOKEN_FIELDS),
        *("tools", "tool_choice", "chat_template", "chat_template_kwargs", "documents", "reasoning_effort"),
    ]
)


def parse(schema: type[T], body: bytes) -> T:
    """The checked request. Raises InvalidRequest, whose `param` names the first field at fault."""
    return checked(schema, parse_json(body))


def checked(schema: type[T], raw: Any) -> T:
    """The request that parsed JSON is, also where another API's body was put into these terms. Raises as `parse`."""
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    if schema.is_model_required and raw.get("model") is None and not _NAMES_ADAPTER.intersection(raw):
        raise InvalidRequest("The field 'model' is required: name the base or an adapter.", param="model")
    try:
        return schema.model_validate(_cleaned(raw, schema))
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_input=False)) from None


def _is_nothing(name: str, value: Any) -> bool:
    if (name in _SWITCHES and isinstance(value, bool)) or (name in _LISTS and value == []):
        return False
    return name in _MAY_BE_NOTHING and asks_for_nothing(value) and not (name == "guided_json" and value == {})


def _cleaned(raw: dict[str, Any], schema: type[Body]) -> dict[str, Any]:
    """What is asked for: without nulls and neutral values, at the top and in what has fields of its own."""
    kept = wanted(raw, schema.model_fields, schema.unsupported)
    for name, taken in (("service_tier", ("auto", "default")), ("store", (False,))):
        if name in kept and kept[name] not in taken:
            raise unsupported_field(name)
    needed = {name for name, field in schema.model_fields.items() if field.is_required()}
    kept = {name: value for name, value in kept.items() if name in needed or not _is_nothing(name, value)}
    options, metadata, messages = kept.get("stream_options"), kept.get("metadata"), kept.get("messages")
    if isinstance(options, dict):
        kept["stream_options"] = wanted(
            options, StreamOptions.model_fields, STREAM_OPTION_UNSUPPORTED, where="stream_options."
        )
    if isinstance(metadata, dict):
        if len(metadata) > MAX_METADATA:
            raise InvalidRequest(f"'metadata' takes at most {MAX_METADATA} entries.", param="metadata")
        kept["metadata"] = {name: value for name, value in metadata.items() if value is not None}
    if isinstance(messages, list):
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"'messages' has {len(messages)} messages; at most {MAX_MESSAGES} are taken. Send less of the history.",
                param="messages",
            )
        kept["messages"] = [
            cleaned_message(message, f"messages[{number}]") if isinstance(message, dict) else message
            for number, message in enumerate(messages)
        ]
    return kept
