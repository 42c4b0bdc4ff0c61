"""What the rest of the program may know of the engine: plain values and protocols, no torch.

`EngineClient` is implemented by `engine/async_engine.py`; the API, the tenants and the catalog are written
against it and tested with a small fake.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.chat.format import PLAIN_CHAT, ChatFormat, ChatOptions
from manylora.chat.pieces import Reader
from manylora.engine.counts import EngineStats, Residency
from manylora.grammars.grammar import CompiledGrammar, Grammar, Whitespace
from manylora.identity import PUBLIC_TENANT, AdapterRef, Mix, OwnToken, Tier, Vocabulary
from manylora.images.picture import Picture, Vision
from manylora.lora.format.spec import Adapter, Head
from manylora.models.pairs import EncodedPair
from manylora.sound.tokens import Sound, SpeechForm, SpeechInfo

__all__ = [
    "PUBLIC_TENANT",
    "AdapterRef",
    "AdapterSource",
    "CompiledGrammar",
    "Delta",
    "Effect",
    "EncodedPair",
    "EngineClient",
    "EngineStats",
    "FinishReason",
    "Generation",
    "Grammar",
    "Head",
    "Mix",
    "ModelInfo",
    "ModelKind",
    "Pooling",
    "Progress",
    "RequestTiming",
    "Residency",
    "SamplingParams",
    "Sound",
    "SpeechForm",
    "SpeechInfo",
    "Task",
    "TextCodec",
    "Tier",
    "TokenLogprob",
    "Whitespace",
]


Pooling: TypeAlias = Literal["cls", "last", "mean"]
"""What becomes of a text's tokens: the first one's hidden state (of encoders), the last one's, or the mean of all."""

ModelKind: TypeAlias = Literal["generate", "pool", "transcribe"]
"""What a base does: write text on, turn whole texts into vectors, or write down what is said."""


class FinishReason(StrEnum):
    """Why a sequence ended. Terminal for every value."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


class Task(StrEnum):
    """What a sequence is for, and so what is done when all of its tokens have run."""

    GENERATE = "generate"  # the next token is sampled
    POOL = "pool"  # the prompt's hidden states become one vector: the sequence ends
    SCORE = "score"  # the prompt's own logits were wanted, or it was to be in the cache: the sequence ends


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Ranges are checked at the edge, by `api/schemas.py`.

    `max_tokens` 0 runs the prompt alone. `temperature` 0 is greedy. `top_k` 0 keeps all, and so does `typical_p` 1.
    `logprobs` is the number of alternatives reported beside the chosen token (0: the chosen one alone), None for
    no log-probabilities at all. `prompt_logprobs` is the same for the prompt's own tokens (used by `echo`). `n`
    choices share the prompt's blocks; choice i draws from its own stream of random numbers derived from `seed`.
    With a `grammar`, only tokens that it allows are chosen; log-probabilities are those of the model all the same.
    With `ignore_eos` as well, an answer goes on for as long as the grammar lets it.

    `allowed_token_ids`, where there are any, are the only tokens that are chosen. `bad_words` are runs of token ids of
    which no answer holds one. Among its first `min_tokens` tokens is none that ends it, as far as any other may come,
    and stop strings that end in their text do not count. The text has special tokens where `skip_special_tokens` is
    False, and what the answer stopped at with `include_stop`. With `prompt_ranks` the prompt's log-probabilities have
    their ranks.

    With `pooling` nothing is generated: the answer is one vector of hidden states. With `reads_head` it is the scores
    of the adapter's labels. Of a prompt of two texts the tokens from `second_from` on are of the second one; 0: of none
    that the model tells apart. `speech` says how sound is written down.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    grammar: CompiledGrammar | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop: bool = False
    prompt_ranks: bool = False
    pooling: Pooling | None = None
    reads_head: bool = False
    speech: SpeechForm | None = None
    second_from: int = 0

    @property
    def task(self) -> Task:
        if self.pooling is not None or self.reads_head:
            return Task.POOL
        return Task.GENERATE if self.max_tokens else Task.SCORE


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token and of the likeliest ones at its place (token id, logprob).

    `rank`, where it was asked for: how many tokens are at least as likely, so 1 for the likeliest.
    """

    token_id: int
    logprob: float | None  # None for a prompt's first token, which nothing precedes
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Times of one request in milliseconds, and where its adapter was when it arrived."""

    queue_ms: float
    load_ms: float
    load_tier: Tier
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one request has come. Times are seconds of `time.monotonic`, None where it has not been.

    `num_output_tokens` counts all choices, delivered or not. `finished_s` is the last choice's end.
    """

    num_output_tokens: int
    arrived_s: float
    load_started_s: float | None = None
    load_ended_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one choice.

    `text` is complete characters only; it can be empty while a character or a possible stop string is still
    incomplete, so the texts of all deltas joined are the answer. `num_cached_tokens` (prompt tokens taken
    from the prefix cache) and `prompt_logprobs` come with the first delta of choice 0. `stop_reason` comes with a
    choice's last one: what of the request ended it, a stop string or one of `stop_token_ids`; None where
    the model or the length did. `pooled` is the whole answer of a prompt that was pooled: [hidden], or with
    its `head` the scores of its labels, [labels] of a text or [tokens, labels] of its tokens. `num_drafted`: tokens
    that the step guessed and ran, of which `num_accepted` are among `token_ids`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    stop_reason: str | int | None = None
    pooled: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    head: Head | None = None
    num_drafted: int = 0
    num_accepted: int = 0


class Generation(Protocol):
    """One running request: iterate for deltas until every choice has finished.

    Closing it early (`aclose`, or leaving the loop and dropping it) aborts the request. An engine error is
    raised from the iteration as a `ManyloraError`.
    """

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None: ...

    @property
    def timing(self) -> RequestTiming:
        """Known once the first delta has arrived."""
        ...

    @property
    def progress(self) -> Progress:
        """Known at any time."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model as callers see it.

    `hidden_size`: numbers of an embedding, 0 where the model gives none; `dimensions`: to how many it may be cut;
    `normalizes`: whether it gets length 1; `has_heads`: whether adapters may have labels of their own;
    `num_virtual_tokens`: of a request's adapter, by which its context is shorter than the base's; `speech`: of one
    of speech alone; `vision`: of one of images alone.
    """

    name: str
    context_length: int
    vocab_size: int
    created: int
    default_temperature: float = 1.0
    default_top_p: float = 1.0
    default_top_k: int = 0
    default_repetition_penalty: float = 1.0
    default_pooling: Pooling = "last"
    max_logprobs: int = 20
    hidden_size: int = 0
    dimensions: tuple[int, ...] = ()
    kind: ModelKind = "generate"
    normalizes: bool = True
    has_heads: bool = False
    num_virtual_tokens: int = 0
    speech: SpeechInfo | None = None
    vision: Vision | None = None

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens that a prompt may have: where text is written on, one is left for the answer."""
        return self.context_length if self.kind == "pool" else self.context_length - 1


@dataclass(frozen=True, slots=True)
class Effect:
    """How much an adapter changes the base's answer to a fixed prompt (KL in nats, at the last position).

    Of an encoder, `max_abs_logit_delta` is of the text's vector, or of a head the difference of two texts' scores, and
    `kl` 0.
    """

    prompt_tokens: int
    max_abs_logit_delta: float
    kl: float

    @property
    def num_tokens_run(self) -> int:
        """The prompt was run without the adapter and with it."""
        return 2 * self.prompt_tokens


class TextCodec(Protocol):
    """The base model's tokenizer, as much of it as the API needs. Thread-safe."""

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether `text` has more than `num_tokens` tokens, as far as its length says; quick."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_many(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text. Lets other threads run meanwhile."""
        ...

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, add_special_tokens: bool = True) -> list[EncodedPair]:
        """Each pair as one prompt, as the tokenizer joins two texts. Raises InvalidRequest for one that cannot."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def with_vocabulary(self, vocabulary: Vocabulary | None) -> "TextCodec":
        """What requests of an adapter with own tokens are written and read by. Raises Conflict if it cannot be had."""
        ...

    def vocabulary_of(
        self, added: Sequence[OwnToken], end: str | None, size: int | None, num_rows: int, warnings: list[str]
    ) -> Vocabulary | None:
        """What is an adapter's own of its tokenizer's added tokens, with the text of the one that ends an answer.

        `size`: of its vocabulary, where it is not the base's; `num_rows`: how many tokens it has rows for. What cannot
        be had is left out with a warning.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs."""
        ...

    def token_bytes(self, token_id: int) -> list[int]:
        """One token's UTF-8 bytes, for logprobs."""
        ...

    def token_name(self, token_id: int) -> str:
        """One token as the vocabulary has it, such as `Ġhello`; empty for an id without a token."""
        ...

    @property
    def info(self) -> Mapping[str, Any]:
        """What the tokenizer's own configuration says, in values of JSON, its class and chat template included."""
        ...

    def chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> list[int]:
        """The ids of a rendered chat, ready for the assistant's answer.

        Raises InvalidRequest when the model has no chat template or the template refuses the messages.
        """
        ...

    def render_chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> str:
        """The text of a chat, to be encoded without special tokens; see `chat`."""
        ...

    def chat_format(self, template: str | None = None) -> ChatFormat:
        """How chats are written with the base's template, or with another in its place.

        Both this and a chat with `options.template` run a stranger's program, within bounds: they take a while, and
        raise Unavailable where that cannot be done.
        """
        ...

    def close(self) -> None:
        """End what it has started beside this process."""
        ...

    def response_reader(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, only_one: bool) -> Reader:
        """What reads one answer to a prompt, for a format with `has_response_template`."""
        ...


class AdapterSource(Protocol):
    """Where the engine's loader finds an adapter's files; the catalog implements it."""

    def local_folder(self, ref: AdapterRef) -> Path:
        """A folder in PEFT layout that stays put until the next call for the same ref.

        Runs on a loader thread and may download. Raises AdapterLoadFailed.
        """
        ...


class EngineClient(Protocol):
    """The engine as the event loop sees it. Every method is called on the event loop's thread."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def codec(self) -> TextCodec: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def is_draining(self) -> bool: ...

    @property
    def max_choices(self) -> int:
        """Most choices that one tenant may have open, and so most that one request may ask for."""
        ...

    async def compile(self, grammar: Grammar, tenant: str) -> CompiledGrammar:
        """Make a grammar ready, beside the running requests, or find it ready.

        Raises InvalidGrammar for one that no answer can be held to, and QueueFull, Draining or EngineDead.
        """
        ...

    def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: AdapterRef | Mix | None = None,
        tenant: str = "public",
        weight: float = 1.0,
        cache_salt: str | None = None,
        priority: int = 0,
        sound: Sound | None = None,
        picture: Picture | None = None,
    ) -> Generation:
        """Queue a request, with an adapter or a mix of several.

        `sound` and `picture` are what a model of speech hears and one of images sees: noise where there is none.

        Raises QueueFull, Draining, EngineDead, InvalidRequest or ContextLengthExceeded at once.
        What the cache knows of the prompt is the tenant's own; with `cache_salt`, of all who send the same one. Of the
        tenant's requests those with the lowest `priority` come first.
        """
        ...

    async def measure_effect(
        self, ref: AdapterRef, adapter: Adapter, *, tenant: str = PUBLIC_TENANT, weight: float = 1.0
    ) -> Effect:
        """Run a fixed prompt with and without the adapter, beside the running requests.

        What was read of it is what runs: no file is opened. It stays in memory, as `ref`, until `forget`.
        """
        ...

    def tier_of(self, ref: AdapterRef) -> Tier: ...

    def pin(self, ref: AdapterRef) -> None:
        """Bring it to the device and keep it there until `unpin`."""
        ...

    def unpin(self, ref: AdapterRef) -> None: ...

    async def forget(self, ref: AdapterRef, *, heir: AdapterRef | None = None) -> None:
        """Wait until no running request uses the adapter, then free its memory. No new request may name it.
        What host memory holds of it goes to `heir`, if that has the same digest, for its first request.
        """
        ...

    def stats(self, tenant: str | None = None) -> EngineStats:
        """Of everybody, or with a tenant of its own sequences and adapters alone."""
        ...

    def residency(self) -> Residency:
        """Which adapters are in memory now."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the running ones; abort what is left after `timeout_s`."""
        ...

    async def close(self) -> None: ...
