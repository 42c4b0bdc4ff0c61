"""Tokens of an adapter's tokenizer beside the base's: what may be added, and a tokenizer that has them.

The new one shares the base's model, normalizer and all else that is large; what it has of its own is its added tokens.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

from tokenizers import AddedToken, Tokenizer

from manylora.errors import Conflict, quoted
from manylora.identity import OwnToken, Vocabulary

__all__ = [
    "MAX_ADDED_CHARACTERS",
    "MAX_ADDED_TOKENS",
    "MAX_TOKEN_CHARACTERS",
    "Kept",
    "TokensRefused",
    "cost_of",
    "extended",
    "vocabulary_of",
]

MAX_ADDED_TOKENS: Final = 4096
MAX_TOKEN_CHARACTERS: Final = 256
# A tokenizer with more tokens is built with the interpreter's lock held, and its tokens' text is what that takes.
MAX_ADDED_CHARACTERS: Final = 65_536
# Memory that one takes, about, for each token and each character of its tokens.
_TOKEN_BYTES: Final = 512
_CHARACTER_BYTES: Final = 32
_KEY_BYTES: Final = 4  # for each character of what it is kept under
_SHOWN: Final = 3
_Made = TypeVar("_Made")


class TokensRefused(Conflict):
    """A tokenizer cannot have these tokens beside its own: its base's is another one than at the upload, perhaps."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The adapter's own tokens cannot be had beside those of the base that is served now: {reason}. Upload it "
            "again for this base, or ask for another version of it."
        )
        self.reason = reason


def extended(base: Any, tokens: Sequence[OwnToken]) -> Any:
    """A `tokenizers.Tokenizer` like `base` with some tokens more, or in the place of added ones with the same ids.

    Raises TokensRefused where they would get other ids than these.
    """
    made = Tokenizer(base.model)
    made.normalizer, made.pre_tokenizer = base.normalizer, base.pre_tokenizer
    made.post_processor, made.decoder = base.post_processor, base.decoder
    wanted = dict(base.get_added_tokens_decoder()) | {token.id: _added(token) for token in tokens}
    made.add_tokens([wanted[number] for number in sorted(wanted)])  # in the order of their ids, by which they get them
    found = {number: token.content for number, token in made.get_added_tokens_decoder().items()}
    if found != {number: token.content for number, token in wanted.items()}:
        odd = sorted(number for number, token in wanted.items() if found.get(number) != token.content)
        raise TokensRefused(f"token {quoted(wanted[odd[0]].content)} would not have the id {odd[0]}" if odd else "ids")
    return made


def cost_of(base: Any, tokens: Iterable[OwnToken]) -> int:
    """Bytes that `extended` takes, about: what it shares with `base` not counted."""
    texts = [token.content for token in base.get_added_tokens_decoder().values()]
    texts += [token.content for token in tokens]
    return len(texts) * _TOKEN_BYTES + sum(map(len, texts)) * _CHARACTER_BYTES


class Kept(Generic[_Made]):
    """What was made for vocabularies, those asked for last: at most `most_bytes` of it, or a single one. Thread-safe.

    That a vocabulary was refused is kept as well.
    """

    def __init__(self, most_bytes: int, make: Callable[[Vocabulary], tuple[_Made, int]]) -> None:
        """`make` gives what is kept and the bytes that it takes, or raises TokensRefused."""
        self._most_bytes = most_bytes
        self._make = make
        self._lock = threading.Lock()
        self._found: OrderedDict[Vocabulary, tuple[_Made | TokensRefused, int]] = OrderedDict()
        self.num_bytes = 0

    def get(self, vocabulary: Vocabulary) -> _Made:
        """What was made, or is now. Raises TokensRefused."""
        with self._lock:
            found = self._found.get(vocabulary)
            if found is not None:
                self._found.move_to_end(vocabulary)
        made = self._added(vocabulary) if found is None else found[0]
        if isinstance(made, TokensRefused):
            raise TokensRefused(made.reason)
        return made

    def _added(self, vocabulary: Vocabulary) -> _Made | TokensRefused:
        made: _Made | TokensRefused
        try:
            made, taken = self._make(vocabulary)
        except TokensRefused as error:
            made, taken = error.with_traceback(None), _TOKEN_BYTES * len(vocabulary.tokens)
        taken += _KEY_BYTES * len(vocabulary.text)
        with self._lock:
            self.num_bytes += taken - self._found.pop(vocabulary, (made, 0))[1]  # two may have made it at once
            self._found[vocabulary] = made, taken
            while self.num_bytes > self._most_bytes and len(self._found) > 1:
                self.num_bytes -= self._found.popitem(last=False)[1][1]
        return made


def _added(token: OwnToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def vocabulary_of(
    base: Any, added: Iterable[OwnToken], end: str | None, size: int | None, num_rows: int, warnings: list[str]
) -> Vocabulary | None:
    """What is an adapter's own of a tokenizer's `added` tokens, with the text of the one that ends an answer.

    `size`: of the adapter's vocabulary, where it is not the base's; `num_rows`: how many tokens it has rows for. None
    where all is the base's. What cannot be had is left out with a warning.
    """
    known: Mapping[int, Any] = {} if base is None else base.get_added_tokens_decoder()
    new = [each for each in added if known.get(each.id) is None or known[each.id].content != each.content]
    if base is not None:
        new = [each for each in new if base.token_to_id(each.content) != each.id]
    if without := [each for each in new if each.id >= num_rows]:
        text = quoted(without[0].content)
        warnings.append(f"{len(without)} tokens of its tokenizer have no row and are left out, {text} among them.")
        new = [each for each in new if each.id < num_rows]
    fault = "its base's tokenizer is written in Python" if base is None else _fault(base, new)
    own = new
    if new and fault is None:
        try:
            extended(base, new)
        except TokensRefused as error:
            fault = error.reason
    if new and fault is not None:
        texts = ", ".join(quoted(each.content) for each in new[:_SHOWN])
        warnings.append(f"Tokens of its tokenizer are not used ({texts}): {fault}. The base's own tokenizer is used.")
        own = []
    elif new:
        texts = ", ".join(quoted(each.content) for each in new[:_SHOWN])
        more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
        warnings.append(f"Tokens that the base's tokenizer has not are used for its requests: {texts}{more}.")
    elif size is not None and size > num_rows_of(base):
        warnings.append("Its vocabulary is larger than the base's, and no tokenizer.json says what its tokens are.")
    last = next((each.id for each in own if each.content == end), None)
    return Vocabulary.of(size, own, last)


def num_rows_of(base: Any) -> int:
    """Ids below this have a text."""
    return 0 if base is None else int(base.get_vocab_size(with_added_tokens=True))


def _fault(base: Any, tokens: Sequence[OwnToken]) -> str | None:
    if len(tokens) > MAX_ADDED_TOKENS:
        return f"there are more than {MAX_ADDED_TOKENS}"
    if any(len(each.content) > MAX_TOKEN_CHARACTERS for each in tokens):
        return f"one has more than {MAX_TOKEN_CHARACTERS} characters"
    if sum(len(each.content) for each in tokens) > MAX_ADDED_CHARACTERS:
        return f"they have more than {MAX_ADDED_CHARACTERS} characters together"
    other = next((each for each in tokens if base.token_to_id(each.content) is not None), None)
    if other is not None:
        return f"{quoted(other.content)} has another id in the base's tokenizer"
    return None
