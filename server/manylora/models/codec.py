"""The base model's tokenizer as the API and the detokenizer use it."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol, TypeAlias

from transformers import PreTrainedTokenizerBase

from manylora.chat.calls import new_call_id
from manylora.chat.format import NO_OVERRIDES, PLAIN_CHAT, ChatFormat, ChatOptions, FormatOverrides
from manylora.errors import InvalidRequest
from manylora.identity import OwnToken, Vocabulary
from manylora.models.chat_template import ChatTemplate
from manylora.models.own_tokens import Kept, TokensRefused, cost_of, extended, vocabulary_of
from manylora.models.pairs import EncodedPair
from manylora.models.response_reader import ResponseReader
from manylora.models.text_length import TextLength, byte_of_character

__all__ = ["HuggingFaceCodec"]


# Shorter ones are encoded and decoded faster than another thread is woken.
_SHORT_CHARACTERS = 4096
_SHORT_TOKENS = 1024
# In a tokenizer's configuration: where it was found, and how it was asked for.
_OF_THIS_MACHINE = frozenset({"name_or_path", "local_files_only", "cache_dir", "token", "use_auth_token", "backend"})
_KEPT_BYTES = 2**26  # of tokenizers with tokens of adapters
_NUM_SPELLED = 2**15  # tokens whose spelling is remembered: log-probabilities name the same ones again and again

_Spelling: TypeAlias = Callable[[int], tuple[str, bytes]]
"""The text and bytes of the token with an id."""


class _Backend(Protocol):
    """Encoding and decoding that several threads may call at once."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def encode_many(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]: ...

    def encode_pairs(self, pairs: list[tuple[str, str]], *, add_special_tokens: bool) -> list[EncodedPair]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class HuggingFaceCodec:
    """Implements `engine.interface.TextCodec` over a Hugging Face tokenizer. Thread-safe.

    `eos_ids` end an answer. `overrides` says what of the base's chats was told and is not to be found out. Text is
    decoded as the tokens say it, without the cosmetic removal of spaces that some tokenizers ask for: it would make the
    text of a token depend on tokens that have not come yet.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Iterable[int],
        overrides: FormatOverrides = NO_OVERRIDES,
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.all_special_ids = frozenset(int(i) for i in tokenizer.all_special_ids)
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self._backend: _Backend = _PlainBackend(tokenizer) if fast is None else _FastBackend(fast)
        self._length = TextLength() if fast is None else TextLength.of(fast)
        self._template = ChatTemplate(tokenizer, with_tool_prompt=overrides.tool_prompt)
        self._overrides = overrides
        self._num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._added: dict[int, str] = {int(i): str(t) for i, t in tokenizer.added_tokens_decoder.items()}
        self._spelled: _Spelling = lru_cache(_NUM_SPELLED)(self._spell)
        self._bytes_of = _byte_rule(None if fast is None else fast.decoder)
        self._extended = Kept(_KEPT_BYTES, self._make_extended)

    def with_vocabulary(self, vocabulary: Vocabulary | None) -> "HuggingFaceCodec":
        """A codec like this one with an adapter's tokens beside its own, or in their place. Raises TokensRefused."""
        return self._extended.get(vocabulary) if vocabulary is not None and vocabulary.tokens else self

    def _make_extended(self, vocabulary: Vocabulary) -> "tuple[HuggingFaceCodec, int]":
        """A copy that shares all that is large with this one, and the bytes that it takes beside it."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise TokensRefused("the base's tokenizer is written in Python and takes no more")
        found, tokens = copy(self), vocabulary.tokens
        found._backend = _FastBackend(extended(fast, tokens))
        found._length = self._length.with_tokens(token.content for token in tokens)
        own = {token.id: token.content for token in tokens}
        found._added = self._added | own
        found.all_special_ids = self.all_special_ids | {token.id for token in tokens if token.special}
        found._num_tokens = max(self._num_tokens, tokens[-1].id + 1)
        found._spelled = partial(_spelled, own, self._spelled)
        return found, cost_of(fast, tokens)

    def vocabulary_of(
        self, added: Iterable[OwnToken], end: str | None, size: int | None, num_rows: int, warnings: list[str]
    ) -> Vocabulary | None:
        """What is an adapter's own of a tokenizer's added tokens; see `own_tokens.vocabulary_of`."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        return vocabulary_of(fast, added, end, size, num_rows, warnings)

    @property
    def num_tokens(self) -> int:
        """Ids below this have text; a model's own vocabulary can be padded beyond it."""
        return self._num_tokens

    def compiled_json(self) -> str | None:
        """All of a compiled tokenizer as JSON; None where the base's is written in Python."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if fast is None else str(fast.to_str())

    def faults(self, vocab_size: int) -> list[str]:
        """What a server of a model with `vocab_size` rows in its embedding should say of its tokenizer at the start."""
        found = []
        if self.num_tokens > vocab_size:
            found.append(
                f"The tokenizer has ids up to {self.num_tokens - 1} and the model rows up to {vocab_size - 1}. Prompts "
                "with one of the others are refused."
            )
        template_fault = self._template.fault() if self._template.exists else None
        if template_fault is not None:
            found.append(f"Chats are refused. {template_fault}")
        return found

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        """Whether `text` has more than `num_tokens` tokens, as far as its length says; quick."""
        return self._length.surely_exceeds(text, num_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_many(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text, made without holding the interpreter's lock where the tokenizer is a compiled one."""
        return self._backend.encode_many(list(texts), add_special_tokens=add_special_tokens)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, add_special_tokens: bool = True) -> list[EncodedPair]:
        """Each pair as one prompt, as the tokenizer joins two texts. Raises InvalidRequest for one that cannot."""
        return self._backend.encode_pairs(list(pairs), add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole character become U+FFFD."""
        return self._spelled(token_id)[0]

    def token_bytes(self, token_id: int) -> list[int]:
        """One token's bytes, the space before a word included. An id without a token has none."""
        return list(self._spelled(token_id)[1])

    def _spell(self, token_id: int) -> tuple[str, bytes]:
        """A token's text and bytes."""
        spelled = b""
        added = self._added.get(token_id)
        if added is not None:
            spelled = added.encode()
        elif 0 <= token_id < self.num_tokens:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            spelled = self._bytes_of(token) if isinstance(token, str) else b""
        return spelled.decode(errors="replace"), spelled

    def token_name(self, token_id: int) -> str:
        """One token as the vocabulary has it, such as `Ġhello`; empty for an id without a token."""
        if not 0 <= token_id < self.num_tokens:
            return ""
        token = self._added.get(token_id) or self._tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else ""

    @cached_property
    def info(self) -> Mapping[str, Any]:
        """What the tokenizer's own configuration says, in values of JSON, its class and chat template included.

        Where the server keeps its files is not among it.
        """
        tokenizer = self._tokenizer
        said = {**tokenizer.init_kwargs, "tokenizer_class": type(tokenizer).__name__, **tokenizer.special_tokens_map}
        said["model_max_length"] = tokenizer.model_max_length
        if self._template.exists:
            said["chat_template"] = tokenizer.chat_template
        return {
            str(name): _in_json(value)
            for name, value in said.items()
            if not (name in _OF_THIS_MACHINE or name.endswith(("_file", "_path", "_object")))
        }

    def chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> list[int]:
        """The ids of a rendered chat.

        Raises InvalidRequest when the model has no chat template or the template refuses the messages.
        """
        return self.encode(self.render_chat(messages, options), add_special_tokens=False)

    def render_chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> str:
        """The text of a chat, to be encoded without special tokens; see `chat`."""
        return self._template.render(messages, options)

    def chat_format(self, template: str | None = None) -> ChatFormat:
        """How chats are written with the base's template, or with another in its place."""
        return self._overrides.applied(self._template.format(template))

    def close(self) -> None:
        """End the processes that templates of others than the base are rendered in; they start again when needed."""
        self._template.close()

    def response_reader(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, only_one: bool) -> ResponseReader:
        """What reads one answer to a prompt, for a format with `has_response_template`."""
        return ResponseReader(self._tokenizer, prompt, tools, only_one=only_one, new_id=lambda: new_call_id(None))


def _spelled(own: Mapping[int, str], others: _Spelling, token_id: int) -> tuple[str, bytes]:
    """The text and bytes of a token that is an adapter's own or one of the base's."""
    text = own.get(token_id)
    return others(token_id) if text is None else (text, text.encode())


def _in_json(value: Any) -> Any:
    """A value of a configuration; what JSON does not have, such as an added token, as text."""
    if isinstance(value, Mapping):
        return {str(key): _in_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(each) for each in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


class _FastBackend:
    """A `tokenizers.Tokenizer` without the wrapper around it, which sets padding on each call: threads would clash."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > _SHORT_CHARACTERS:
            return self.encode_many([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_many(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        # Of the ways to encode only those for batches let go of the interpreter's lock.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pairs(self, pairs: list[tuple[str, str]], *, add_special_tokens: bool) -> list[EncodedPair]:
        encodings = self._tokenizer.encode_batch(pairs, add_special_tokens=add_special_tokens)
        return [_pair(each.ids, each.type_ids, each.sequence_ids, each.offsets) for each in encodings]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        if len(token_ids) > _SHORT_TOKENS:
            texts: list[str] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
            return texts[0]
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


class _PlainBackend:
    """A tokenizer written in Python, one call at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    def encode_many(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def encode_pairs(self, pairs: list[tuple[str, str]], *, add_special_tokens: bool) -> list[EncodedPair]:
        raise InvalidRequest("This base's tokenizer is written in Python, and pairs of texts need a compiled one.")

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        with self._lock:
            return str(
                self._tokenizer.decode(
                    token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
                )
            )


def _pair(ids: list[int], types: list[int], owners: list[int | None], offsets: list[tuple[int, int]]) -> EncodedPair:
    places = [place for place, owner in enumerate(owners) if owner == 1]
    second = range(places[0], places[-1] + 1) if places else range(len(ids), len(ids))
    second_from = types.index(1) if 1 in types else 0
    return EncodedPair(tuple(ids), second_from, second, tuple(offsets[place] for place in second))


def _byte_level(token: str) -> bytes:
    alphabet = byte_of_character()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _byte_fallback(token: str) -> bytes:
    """SentencePiece: `<0xE4>` is one byte, and `▁` is a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _word_piece(token: str) -> bytes:
    return token.removeprefix("##").encode()


def _byte_rule(decoder: Any) -> Callable[[str], bytes]:
    """How the tokens of a vocabulary spell bytes, from the tokenizer's own decoder."""
    kinds = set() if decoder is None else _kinds(json.loads(decoder.__getstate__()))
    if "ByteLevel" in kinds:
        return _byte_level
    if "WordPiece" in kinds:
        return _word_piece
    return _byte_fallback


def _kinds(decoder: dict[str, Any]) -> set[str]:
    return {str(decoder["type"])}.union(*(_kinds(part) for part in decoder.get("decoders", ())))
