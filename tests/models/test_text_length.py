"""A text is refused unread only if it cannot fit: the lower bound on its tokens is one, for every kind of tokenizer."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from manylora.models.text_length import TextLength
from tests.tiny_models import make_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "▁▁▁▁", "ab", "▁a", "我", "é"]
MERGES = [("a", "b"), ("▁", "a")]


def bpe(vocab: list[str], **options: Any) -> Tokenizer:
    return Tokenizer(models.BPE({token: n for n, token in enumerate(vocab)}, MERGES, **options))


def byte_level(**options: Any) -> Tokenizer:
    tokenizer = make_tokenizer().backend_tokenizer
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_tokens(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def trained_byte_level() -> Tokenizer:
    """As those that were trained without the whole alphabet: characters that were never seen vanish."""
    alphabet = [sign for sign in pre_tokenizers.ByteLevel.alphabet() if sign not in "\u0113\u0106\u00f2"]
    tokenizer = Tokenizer(models.BPE({sign: n for n, sign in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_fallback(**options: Any) -> Tokenizer:
    tokenizer = bpe(["<unk>", *BYTES, *PIECES], byte_fallback=True, fuse_unk=True, unk_token="<unk>", **options)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def white_space_bpe() -> Tokenizer:
    tokenizer = bpe(["<unk>", *PIECES], unk_token="<unk>")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


BOUNDED: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte level, composed": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte level, tokens that take the space beside them": lambda: with_tokens(
        byte_level(), AddedToken("<end>", rstrip=True), AddedToken("<mask>", lstrip=True)
    ),
    "byte level, a long added token": lambda: with_tokens(byte_level(), AddedToken("a" * 50)),
    "byte level, some control characters vanish": trained_byte_level,
    "byte fallback": byte_fallback,
    "unknown characters one by one": white_space_bpe,
}
UNBOUNDED: dict[str, Callable[[], Any]] = {
    "runs of unknown characters are one token": lambda: bpe(["<unk>", *PIECES], unk_token="<unk>", fuse_unk=True),
    "unknown characters vanish": lambda: bpe(PIECES),
    "fallback without all bytes": lambda: bpe(["<unk>", *BYTES[1:], *PIECES], byte_fallback=True, fuse_unk=True),
    "words are one unknown token": word_piece,
    "a normalizer that drops characters": lambda: byte_level(normalizer=normalizers.BertNormalizer()),
    "a normalizer that drops one character": lambda: byte_level(normalizer=normalizers.Replace("a", "")),
    "a split that drops what it splits at": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
}
TEXTS = st.text(
    alphabet=st.sampled_from("ab \x13\x06\U00080000我é🙂\n\te\u0301\u0323\u00a0<end>mask"), max_size=80
) | st.text(max_size=40)
RUNS = st.lists(st.tuples(TEXTS, st.integers(1, 60)), max_size=5).map(lambda runs: "".join(t * n for t, n in runs))


@pytest.mark.parametrize("kind", [*BOUNDED, *UNBOUNDED])
@given(text=RUNS)
@settings(max_examples=40, deadline=None)
def test_a_text_that_fits_is_never_refused(kind: str, text: str) -> None:
    tokenizer = CACHE[kind]
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)

    assert not LENGTHS[kind].surely_exceeds(text, num_tokens)


CACHE: dict[str, Any] = {kind: make() for kind, make in {**BOUNDED, **UNBOUNDED}.items()}
LENGTHS = {kind: TextLength.of(tokenizer) for kind, tokenizer in CACHE.items()}


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_text_that_cannot_fit_is_refused_by_its_length(kind: str) -> None:
    length = TextLength.of(CACHE[kind])

    assert length.characters is not None
    assert length.surely_exceeds("a" * (100 * length.characters + 1), 100)
    assert not length.surely_exceeds("a" * (100 * length.characters), 100)


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_characters_can_vanish_no_length_is_too_long(kind: str) -> None:
    assert not TextLength.of(CACHE[kind]).surely_exceeds("a" * 10**6, 1)


def test_characters_that_vanish_do_not_count() -> None:
    length = TextLength.of(CACHE["byte level, some control characters vanish"])

    assert not length.surely_exceeds("\x13" * 10**6, 5)
    assert not length.surely_exceeds("\U00080000" * 10**6, 5)
    assert length.surely_exceeds("x" * 10**6, 5)


def test_white_space_that_a_token_takes_with_it_does_not_count() -> None:
    length = TextLength.of(CACHE["byte level, tokens that take the space beside them"])

    assert not length.surely_exceeds("<end>" + " " * 10**6, 5)
    assert length.surely_exceeds("x " * 10**6, 5)
