"""A checked body becomes what the engine is asked for: an adapter, and for each prompt token ids and parameters.

The one place for it, whichever route the body came by. What surely does not fit is refused before it is encoded, and
every id is checked, wherever it comes from: a tokenizer can have tokens that the model has no row for.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from starlette.requests import ClientDisconnect, Request

from manylora.api.chats import RenderedChat, rendered_beside
from manylora.api.inputs import InputsRequest, ReadRequest
from manylora.api.json_body import require_json
from manylora.api.lanes import INLINE_CHARACTERS, PYTHON, SHORT_TEXT, beside_loop, text_lane
from manylora.api.pairs import PairsRequest, encoded_pairs
from manylora.api.pictures import pictures_of
from manylora.api.record import ClientGone
from manylora.api.room import PromptEngine, Seen, fit_to_context, room_for_answer, too_long
from manylora.api.sampling import check_token_ids, sampling_params
from manylora.api.schemas import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    InferenceRequest,
)
from manylora.api.structured import ANSWER_FIELDS, asked_for
from manylora.chat.pieces import Reader
from manylora.engine.interface import (
    CompiledGrammar,
    EncodedPair,
    EngineClient,
    ModelInfo,
    SamplingParams,
    Sound,
    TextCodec,
)
from manylora.errors import ContextLengthExceeded, InvalidGrammar, InvalidRequest, quoted
from manylora.identity import Mix
from manylora.images.picture import Picture

__all__ = [
    "INLINE_IDS",
    "Prompt",
    "check_connected",
    "counted_ids",
    "lane_of",
    "num_chat_tokens",
    "prompts_of",
    "read_body",
]

TOKENS_PER_SECOND: Final = 50  # of sound: the positions that a model of speech makes of it
MAX_ECHO_LOGPROBS: Final = 1_048_576
MAX_ECHO_CHARACTERS: Final = 8_388_608
MAX_ENCODED_CHARACTERS: Final = 1_048_576
_INLINE_BYTES: Final = 65_536
INLINE_IDS: Final = 16_384
# Encodings take a hundred bytes for a character, so that many prompts are encoded some at a time.
_BATCH_CHARACTERS: Final = 2**20

NO_MIX: Final = Mix()
T = TypeVar("T")
R = TypeVar("R")
_Encoded = tuple[tuple[int, ...], str]  # a prompt's ids, and its text as `echo` repeats it


# the body


async def read_body(request: Request, read: Callable[[bytes], T]) -> T:
    """What `read` makes of the body, beside the event loop where that is large. Raises InvalidRequest, ClientGone."""
    require_json(request)
    try:
        data = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    return await beside_loop(PYTHON, read, data) if len(data) > _INLINE_BYTES else read(data)


async def check_connected(request: Request) -> None:
    """Raises ClientGone if the client of a large body has not waited for its prompts to be encoded."""
    if len(await request.body()) > _INLINE_BYTES and await request.is_disconnected():
        raise ClientGone


# prompts


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the engine takes it: its ids, what is asked for with them, and its text as `echo` repeats it.

    `reader` makes what reads one answer to it, where that is more than text; `pair` is it where it is two texts.
    `sound` is a window of `sound_s` seconds to write down, `picture` an image to look at.
    """

    ids: tuple[int, ...]
    params: SamplingParams
    text: str = ""
    reader: Callable[[], Reader] | None = None
    pair: EncodedPair | None = None
    sound: Sound | None = None
    sound_s: float = 0.0
    picture: Picture | None = None

    @property
    def num_tokens(self) -> int:
        """What it counts as: its ids, and fifty tokens for each second of sound."""
        return len(self.ids) + math.ceil(self.sound_s * TOKENS_PER_SECOND)


async def prompts_of(
    body: InferenceRequest,
    client: EngineClient,
    tenant: str,
    *,
    max_tokens: int | None = None,
    mix: Mix = NO_MIX,
) -> tuple[Prompt, ...]:
    """Every prompt of the body; all have the same number of choices. What is quick to check is checked first.

    `max_tokens`: what an answer may have where the body does not say and the context leaves so much.
    `mix`: what runs, which may have virtual tokens before each prompt, a vocabulary of its own, and a head that reads
    pairs.

    Raises InvalidRequest, also where the model's chat template refuses the messages or no answer can be held to the
    grammar, ContextLengthExceeded, and what `EngineClient.compile` does.
    """
    engine = Seen.by(mix, client)
    head = mix.refs[0].head if mix.refs and mix.is_plain else ""
    if isinstance(body, PairsRequest) and (head or body.needs_head):
        _check_num_choices(body, body.num_pairs, 1, engine.max_choices)
        pairs = await encoded_pairs(body, head, engine)
        return tuple(
            Prompt(each.ids, SamplingParams(max_tokens=0, reads_head=True, second_from=second), pair=each)
            for each in pairs
            for second in (each.second_from if body.has_types else 0,)
        )
    if isinstance(body, ReadRequest):
        return await _pooled_prompts(body, engine, tenant)
    assert isinstance(body, GenerationRequest)
    params = sampling_params(body, engine.model)
    if isinstance(body, CompletionRequest):
        chat = None
        _check_num_choices(body, len(body.prompts), params.n, engine.max_choices)
        encoded = await _encode_prompts(body, engine)
    else:
        assert isinstance(body, ChatRequest)
        _check_num_choices(body, 1, params.n, engine.max_choices)
        chat, ids = await _chat_prompt(body, engine, tenant)
        encoded = [(ids, "")]
    _check_size(params, body, encoded)
    if body.bad_words:
        params = replace(params, bad_words=await _bad_words(body.bad_words, engine))
    if chat is not None and chat.needs_special_tokens:
        params = replace(params, skip_special_tokens=False)
    grammar = await _grammar_of(body, engine, tenant, chat)
    if grammar is not None:
        params = replace(params, grammar=grammar)
    reader = None if chat is None else chat.reader
    return tuple(
        Prompt(ids, fit_to_context(params, body, len(ids), engine.model, max_tokens), text, reader)
        for ids, text in encoded
    )


async def _pooled_prompts(body: ReadRequest, engine: PromptEngine, tenant: str) -> tuple[Prompt, ...]:
    """Every prompt of a body whose prompts become vectors or scores."""
    if not engine.model.hidden_size:
        raise InvalidRequest("This server's base model gives no hidden states, so it has no embeddings.", param="model")
    _check_num_choices(body, len(body.prompts), 1, engine.max_choices)
    pooling = body.chosen_pooling
    if pooling == "cls" and engine.model.kind == "generate":
        raise InvalidRequest(
            "'pooling' is 'cls', and the first token of this server's model has seen no other. Use 'last' or 'mean'.",
            param="pooling",
        )
    if body.reads_head:
        params = SamplingParams(max_tokens=0, reads_head=True)
    else:
        params = SamplingParams(max_tokens=0, pooling=pooling or engine.model.default_pooling)
    if engine.model.vision is not None:
        assert isinstance(body, InputsRequest), "no other is for a model of images"
        pictures = await pictures_of(body.urls, engine.model.vision, tenant, body.prompt_field)
        return tuple(Prompt(picture.ids, params, picture=picture) for picture in pictures)
    return tuple(Prompt(ids, params) for ids, _ in await _encode_prompts(body, engine))


async def _grammar_of(
    body: GenerationRequest, engine: PromptEngine, tenant: str, chat: RenderedChat | None
) -> CompiledGrammar | None:
    """What the answer must look like, ready for use, where the body says so."""
    fields = {name: value for name in ANSWER_FIELDS if (value := getattr(body, name)) is not None}
    asked = await beside_loop(PYTHON, asked_for, fields) if fields else None
    if chat is not None and isinstance(body, ChatRequest) and (asked is not None or body.tools):
        asked = await beside_loop(PYTHON, chat.held, body, asked)
    if asked is None:
        return None
    try:
        return await engine.compile(asked.grammar, tenant)
    except InvalidGrammar as error:
        raise asked.refusal(error) from None


def _check_num_choices(body: InferenceRequest, num_prompts: int, n: int, most: int) -> None:
    if num_prompts * n > most:
        raise InvalidRequest(
            f"The request asks for {num_prompts * n} answers; at most {most} are queued here. Send less.",
            param="n" if n > 1 else body.prompt_field,
        )


# token ids


async def _encode_prompts(request: InferenceRequest, engine: PromptEngine) -> list[_Encoded]:
    """Every prompt of a body. Raises InvalidRequest."""
    prompts = request.prompts
    is_repeated = isinstance(request, CompletionRequest) and request.echo
    if (number := _empty(prompts)) is not None:
        name = request.field_of(number)
        raise InvalidRequest(f"'{name}' is empty. Send at least one token.", param=name)
    size = sum(map(len, prompts))
    if isinstance(prompts[0], str):
        texts = [text for text in prompts if isinstance(text, str)]
        encoded = await _encode(request, texts, size, engine)
        if (number := _empty(encoded)) is not None:
            name = request.field_of(number)
            raise InvalidRequest(f"'{name}' has no tokens for this model.", param=name)
        if not is_repeated:
            return [(ids, "") for ids in encoded]
        most = _most_kept(request, engine.model)
        is_whole = [most is None or len(ids) < most for ids in encoded]
        if all(is_whole):
            return list(zip(encoded, texts, strict=True))
        return await beside_loop(PYTHON, _echoed, encoded, texts, is_whole, engine.codec)
    if size <= INLINE_IDS and not is_repeated:
        return _given(request, engine, is_repeated)
    return await beside_loop(PYTHON, _given, request, engine, is_repeated)


def _empty(prompts: Sequence[Sized]) -> int | None:
    """The place of the first one that holds nothing."""
    return next((number for number, prompt in enumerate(prompts) if not prompt), None)


def _given(request: InferenceRequest, engine: PromptEngine, is_repeated: bool) -> list[_Encoded]:
    """Prompts that came as ids. Those of all are checked before the first is decoded for `echo`."""
    prompts = []
    for prompt in request.prompts:
        assert isinstance(prompt, list), "prompts are all text or all ids"
        kept = _truncated(prompt, request, engine, is_text=False)
        room_for_answer(request, len(kept), engine.model)
        prompts.append(check_token_ids(kept, engine.model, request.prompt_field))
    decode = engine.codec.decode
    return [(ids, decode(ids, skip_special_tokens=False) if is_repeated else "") for ids in prompts]


def _echoed(
    encoded: Sequence[tuple[int, ...]], texts: Sequence[str], is_whole: Sequence[bool], codec: TextCodec
) -> list[_Encoded]:
    """Each prompt with its text, as it was sent or, of one that was cut, as its tokens say it."""
    return [
        (ids, text if whole else codec.decode(ids, skip_special_tokens=False))
        for ids, text, whole in zip(encoded, texts, is_whole, strict=True)
    ]


async def num_chat_tokens(request: ChatRequest, engine: PromptEngine, tenant: str) -> int:
    """How many tokens the prompt of a tenant's chat has, whether or not the context has room for them.

    Raises InvalidRequest, and ContextLengthExceeded for a text that is too long to be encoded only to be counted.
    """
    text = (await rendered_beside(request, engine.codec, tenant)).text
    special = request.has_special_tokens
    return len(await beside_loop(lane_of(text), counted_ids, text, engine, special=special, param=request.prompt_field))


def lane_of(text: str) -> ThreadPoolExecutor:
    """Where a text is encoded that is not encoded at once."""
    return text_lane(len(text))


def counted_ids(text: str, engine: PromptEngine, *, special: bool, param: str) -> list[int]:
    """The ids of a text for which the context needs to have no room. Raises ContextLengthExceeded, see above."""
    context = engine.model.context_length
    if len(text) > MAX_ENCODED_CHARACTERS and engine.codec.surely_exceeds(text, context):
        raise ContextLengthExceeded(
            f"The text has {len(text)} characters; one that cannot fit the model's context of {context} tokens has at "
            f"most {MAX_ENCODED_CHARACTERS}. Send less.",
            param=param,
        )
    [ids] = engine.codec.encode_many([text], add_special_tokens=special)
    return ids


async def _chat_prompt(request: ChatRequest, engine: PromptEngine, tenant: str) -> tuple[RenderedChat, tuple[int, ...]]:
    """A rendered chat and its ids. Raises InvalidRequest.

    Of a chat that drops its oldest turns, the fewest are dropped that have to be: what follows the instructions with
    which it begins, up to some message of the user's.
    """
    try:
        return await _encode_chat(request, engine, tenant)
    except ContextLengthExceeded:
        if not request.drops_oldest:
            raise
        messages = request.messages
        first = next((at for at, each in enumerate(messages) if each.role not in ("system", "developer")), 0)
        starts = [at for at, each in enumerate(messages) if each.role == "user" and at > first]
        found, low, high = None, 0, len(starts)
        while low < high:
            middle = (low + high) // 2
            kept = [*messages[:first], *messages[starts[middle] :]]
            try:
                found = await _encode_chat(request.model_copy(update={"messages": kept}), engine, tenant)
                high = middle
            except ContextLengthExceeded:
                low = middle + 1
        if found is None:
            raise
        return found


async def _encode_chat(request: ChatRequest, engine: PromptEngine, tenant: str) -> tuple[RenderedChat, tuple[int, ...]]:
    chat = await rendered_beside(request, engine.codec, tenant)
    [ids] = await _encode(request, [chat.text], len(chat.text), engine)
    if not ids:
        raise InvalidRequest("'messages' have no tokens for this model.", param="messages")
    return chat, ids


async def _encode(
    request: InferenceRequest, texts: Sequence[str], num_characters: int, engine: PromptEngine
) -> list[tuple[int, ...]]:
    """The ids of each text; `num_characters` is the length of all."""
    if num_characters <= INLINE_CHARACTERS:
        encode, special = engine.codec.encode, request.has_special_tokens
        return [
            _checked(encode(text, add_special_tokens=special), request, engine, number)
            for number, text in enumerate(texts)
        ]
    return await beside_loop(text_lane(num_characters), _encode_long, request, texts, engine)


def _encode_long(request: InferenceRequest, texts: Sequence[str], engine: PromptEngine) -> list[tuple[int, ...]]:
    codec, special = engine.codec, request.has_special_tokens
    is_cut = request.truncate_prompt_tokens is not None
    for number, text in enumerate(texts):
        if not (is_cut and len(text) <= MAX_ENCODED_CHARACTERS) and codec.surely_exceeds(
            text, engine.model.context_length
        ):
            param = request.field_of(number)
            raise too_long(request, f"more than that with {len(text)} characters", engine.model, param=param)
    encoded = (ids for batch in _batches(texts) for ids in codec.encode_many(batch, add_special_tokens=special))
    return [_checked(ids, request, engine, number) for number, ids in enumerate(encoded)]


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


def _checked(ids: list[int], request: InferenceRequest, engine: PromptEngine, number: int) -> tuple[int, ...]:
    """The ids of a body's text of this number, those that are kept, if the model has a row and room for each."""
    ids = _truncated(ids, request, engine)
    param = request.field_of(number)
    room_for_answer(request, len(ids), engine.model, param=param)
    highest = max(ids, default=0)
    if highest >= engine.model.vocab_size:
        raise InvalidRequest(
            f"'{param}' has the token {quoted(repr(engine.codec.token_text(highest)))} (id {highest}), which the "
            f"tokenizer knows and the model does not: its ids end at {engine.model.vocab_size - 1}. Leave it out.",
            param=param,
        )
    return tuple(ids)


async def _bad_words(words: Sequence[str], engine: PromptEngine) -> tuple[tuple[int, ...], ...]:
    """The runs of tokens that spell each word, at the beginning of a text and behind a space. Raises InvalidRequest."""
    if sum(map(len, words)) <= INLINE_CHARACTERS:
        return _spelled(words, engine)
    return await beside_loop(SHORT_TEXT, _spelled, words, engine)


def _spelled(words: Sequence[str], engine: PromptEngine) -> tuple[tuple[int, ...], ...]:
    bare = [word.lstrip() for word in words]
    encode = engine.codec.encode_many
    found: dict[tuple[int, ...], None] = {}
    alone, behind = (encode([space + word for word in bare], add_special_tokens=False) for space in ("", " "))
    for word, first, later in zip(words, alone, behind, strict=True):
        if not first:
            raise InvalidRequest(f"'bad_words' has '{quoted(word)}', which has no tokens.", param="bad_words")
        found[check_token_ids(first, engine.model, "bad_words")] = None
        if later[-len(first) :] != first:
            found[check_token_ids(later, engine.model, "bad_words")] = None
    return tuple(found)


# room


def _most_kept(request: InferenceRequest, model: ModelInfo) -> int | None:
    """Of each prompt, so many of the last tokens are kept; None: all."""
    most = request.truncate_prompt_tokens
    if most != -1:
        return most
    asked = request.token_limit
    if asked == 0:
        return model.most_prompt_tokens
    return max(1, model.context_length - (DEFAULT_MAX_TOKENS if asked is None else asked))


def _truncated(ids: list[int], request: InferenceRequest, engine: PromptEngine, *, is_text: bool = True) -> list[int]:
    """What is kept of a prompt: its end, or of what an encoder reads its beginning, within its special tokens."""
    most = _most_kept(request, engine.model)
    if most is None or len(ids) <= most:
        return ids
    if engine.model.kind == "generate":
        return ids[-most:]
    behind = _num_behind(engine.codec) if is_text and request.has_special_tokens and most > 1 else 0
    return [*ids[: most - behind], *ids[len(ids) - behind :]]


def _num_behind(codec: TextCodec) -> int:
    """How many special tokens the tokenizer puts behind a text."""
    bare, longer = codec.encode(""), codec.encode("a")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(bare), reversed(longer), strict=False))
    return len(list(same))


def _check_size(params: SamplingParams, body: GenerationRequest, prompts: Sequence[_Encoded]) -> None:
    """Raises InvalidRequest where so much is told of the prompts that the answer would be too large."""
    num_tokens = sum(len(ids) for ids, _ in prompts)
    has_echo = isinstance(body, CompletionRequest) and body.echo
    asked = {
        "prompt_logprobs": 0 if body.prompt_logprobs is None else 1 + body.prompt_logprobs,
        "logprobs": 0 if params.logprobs is None or not has_echo else 1 + params.logprobs,
        "return_token_ids": int(body.return_token_ids),
    }
    for param, num_each in asked.items():
        if (total := num_tokens * params.n * num_each) > MAX_ECHO_LOGPROBS:
            kind = "ids" if param == "return_token_ids" else "log-probabilities"
            raise InvalidRequest(
                f"'{param}' asks for {total} {kind} of the prompt; at most {MAX_ECHO_LOGPROBS} are given. Send fewer "
                "or shorter prompts, a smaller 'n', or a smaller number of log-probabilities.",
                param=param,
            )
    repeated = sum(len(text) for _, text in prompts) * params.n
    if has_echo and repeated > MAX_ECHO_CHARACTERS:
        raise InvalidRequest(
            f"'echo' would repeat {repeated} characters; at most {MAX_ECHO_CHARACTERS} are given. Send fewer or "
            "shorter prompts, or a smaller 'n'.",
            param="echo",
        )
