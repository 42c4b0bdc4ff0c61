"""What a server builds from spelled tokens is what the library builds from the whole tokenizer."""

from collections.abc import Callable

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from manylora.grammars.language import new_matcher
from manylora.grammars.vocabulary import Spelling, Vocabulary
from tests.tiny_models import END_OF_TURN, VOCAB_SIZE, make_tokenizer

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "h"), ("▁h", "e"), ("▁he", "ll"), ("▁", "a"), ("▁", "{")]
GRAMMARS = [r"start: /(.|\n)*/", "start: /[a-z ]+/", 'start: "hell" /[^x]*/', 'start: "{" /[^"]*/ "}"']


def bytes_behind_a_space(prepend: Callable[[Tokenizer], None]) -> Tokenizer:
    """A tokenizer as SentencePiece made them: bytes for what it has no token for, and a space before all text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in [*'▁helloab{}":,', *(left + right for left, right in MERGES)]:
        vocab.setdefault(token, len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend(made)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def by_normalizer(made: Tokenizer) -> None:
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def by_metaspace(made: Tokenizer) -> None:
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")


def both_forms(tokenizer: Tokenizer, num_rows: int, eos: int) -> tuple[llguidance.LLTokenizer, llguidance.LLTokenizer]:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    read = Vocabulary(tokenizer.to_str(), num_rows, (eos,)).build()
    return read, Spelling.from_json(Spelling.of(read).as_json()).build(encode)


FORMS = {
    "bytes": both_forms(make_tokenizer().backend_tokenizer, VOCAB_SIZE + 70, END_OF_TURN),
    "normalizer": both_forms(bytes_behind_a_space(by_normalizer), 300, 2),
    "metaspace": both_forms(bytes_behind_a_space(by_metaspace), 300, 2),
}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from('hello ab{}":,é漢<s>/')), rest=st.binary(max_size=3))
def test_text_has_the_same_ids(name: str, text: str, rest: bytes) -> None:
    read, spelled = FORMS[name]
    assert spelled.tokenize_str(text) == read.tokenize_str(text)
    assert spelled.tokenize_bytes(text.encode() + rest) == read.tokenize_bytes(text.encode() + rest)
    assert spelled.tokenize_partial(text.encode()) == read.tokenize_partial(text.encode())


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("name", FORMS)
def test_grammars_allow_and_force_the_same(name: str, grammar: str) -> None:
    read, spelled = (new_matcher(form, grammar) for form in FORMS[name])
    for byte in b"hell {":
        assert not read.get_error()
        assert not spelled.get_error()
        assert spelled.compute_bitmask() == read.compute_bitmask()
        assert spelled.compute_ff_tokens() == read.compute_ff_tokens()
        taken = FORMS[name][0].tokenize_bytes(bytes([byte]))
        assert spelled.try_consume_tokens(taken) == read.try_consume_tokens(taken)


def test_rows_and_ends_are_the_same() -> None:
    for read, spelled in FORMS.values():
        assert (spelled.vocab_size, spelled.eos_tokens) == (read.vocab_size, read.eos_tokens)
        assert [spelled.is_special_token(i) for i in range(300)] == [read.is_special_token(i) for i in range(300)]
