"""What stands where a tokenizer does, on a base that reads no text."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from manylora.chat.format import PLAIN_CHAT, ChatFormat, ChatOptions
from manylora.chat.pieces import Reader
from manylora.errors import WrongModelType
from manylora.identity import OwnToken, Vocabulary
from manylora.models.pairs import EncodedPair

__all__ = ["NoText"]

_PLACE: Final = "<image>"


class NoText:
    """Implements `engine.interface.TextCodec` for a model of images: whatever needs a text is refused."""

    eos_ids: frozenset[int] = frozenset()

    def faults(self, vocab_size: int) -> list[str]:
        """None: nothing of it can be wrong."""
        return []

    def compiled_json(self) -> str | None:
        """None: there is no tokenizer."""
        return None

    def surely_exceeds(self, text: str, num_tokens: int) -> bool:
        return False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        _refuse()

    def encode_many(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        _refuse()

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, add_special_tokens: bool = True) -> list[EncodedPair]:
        _refuse()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """What the log has in place of an image."""
        return _PLACE

    def with_vocabulary(self, vocabulary: Vocabulary | None) -> "NoText":
        return self

    def vocabulary_of(
        self, added: Sequence[OwnToken], end: str | None, size: int | None, num_rows: int, warnings: list[str]
    ) -> Vocabulary | None:
        """None: images have no tokens that an adapter could add to."""
        if added:
            warnings.append("The tokens of its tokenizer are left aside: the base sees images and reads no text.")
        return None

    def token_text(self, token_id: int) -> str:
        return _PLACE

    def token_bytes(self, token_id: int) -> list[int]:
        return []

    def token_name(self, token_id: int) -> str:
        return _PLACE

    @property
    def info(self) -> Mapping[str, Any]:
        _refuse()

    def chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> list[int]:
        _refuse()

    def render_chat(self, messages: list[dict[str, Any]], options: ChatOptions = PLAIN_CHAT) -> str:
        _refuse()

    def chat_format(self, template: str | None = None) -> ChatFormat:
        _refuse()

    def response_reader(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, only_one: bool) -> Reader:
        _refuse()

    def close(self) -> None:
        """Nothing was started."""


def _refuse() -> NoReturn:
    raise WrongModelType(
        "This server's model sees images and reads no text. Ask /v1/embeddings or /v1/classify with an image, or a "
        "server of another model."
    )
