"""Text comes in whole characters, loses nothing, and stop strings are found wherever tokens are cut."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from manylora.engine.detokenizer import Detokenizer
from tests.tiny_models import END_OF_TURN, SPECIAL_TOKENS, make_tokenizer

FAMILY = "👩‍👩‍👧‍👦"  # four people and three zero-width joiners: 25 bytes
TEXTS = ("The quick brown fox", "我爱北京天安门", FAMILY, "naïve 🙂 café", "🇩🇪🏳️‍🌈", "a\u0301 é", "한국어", "\n\t  x")
PROMPT = (5, 6, 7)
# A special token's name, which hypothesis may try as it stands in the sources, is left out of what is decoded.
ORDINARY = st.text(max_size=40).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def decode(ids: Sequence[int]) -> str:
    text: str = tokenizer().decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return ids


def deltas(ids: list[int], *, prompt: tuple[int, ...] = PROMPT, stop: tuple[str, ...] = ()) -> list[str]:
    """One delta per token, and one of the flush; no token is fed after the stop, as in the engine."""
    detokenizer = Detokenizer(decode, prompt, stop)
    found = []
    for token_id in ids:
        found.append(detokenizer.add([token_id]))
        if detokenizer.is_stopped:
            break
    return [*found, detokenizer.flush()]


def stopped_at(text: str, stop: tuple[str, ...]) -> str:
    """The definition: read character by character, end with the first stop string that is complete."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_every_delta_is_made_of_whole_characters(text: str) -> None:
    found = deltas(encode(text))
    assert "".join(found) == text
    assert not any("\ufffd" in delta for delta in found)


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_with_its_last_token_and_not_later(text: str) -> None:
    ids = byte_tokens(text)
    seen = ""
    for count, delta in enumerate(deltas(ids)[:-1], start=1):
        seen += delta
        assert seen == text.encode()[:count].decode(errors="ignore")


@settings(max_examples=150, deadline=None)
@given(ORDINARY, st.data())
def test_joined_deltas_are_the_text_however_tokens_are_grouped(text: str, data: st.DataObject) -> None:
    ids = encode(text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=8)) | {0, len(ids)})
    detokenizer = Detokenizer(decode, PROMPT)
    found = "".join(detokenizer.add(ids[a:b]) for a, b in pairwise(cuts))
    assert found + detokenizer.flush() == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=60))
@example([200] * 50)  # bytes that never become a character
@example([*[200] * 20, *range(100, 180)])
def test_joined_deltas_are_the_decoded_ids_for_any_tokens(ids: list[int]) -> None:
    assert "".join(deltas(ids)) == decode(ids)


def test_bytes_that_never_become_a_character_are_not_held_back_for_ever() -> None:
    continuation = encode("我")[-1]
    calls: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    detokenizer = Detokenizer(counting, PROMPT)
    found = "".join(detokenizer.add([continuation]) for _ in range(2000))
    assert len(found) > 1900
    assert max(calls) < 100, "a window that grows makes every step slower than the one before"
    assert found + detokenizer.flush() == "\ufffd" * 2000


def test_characters_among_broken_bytes_stay_whole() -> None:
    broken = encode("我")[-1]
    ids = [broken] * 40 + encode(FAMILY) + [broken] * 40 + encode("京")
    found = deltas(ids)
    assert "".join(found) == "\ufffd" * 40 + FAMILY + "\ufffd" * 40 + "京"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_begun_in_the_prompt_is_finished_in_the_output(cut: int) -> None:
    ids = byte_tokens("🙂")
    assert "".join(deltas([*ids[cut:], *encode(" ok")], prompt=(*encode("see "), *ids[:cut]))) == "🙂 ok"


def test_broken_bytes_of_the_prompt_are_not_repeated() -> None:
    ids = byte_tokens("🙂")
    assert "".join(deltas(encode("ok"), prompt=(*encode("see "), *ids[:2]))) == "ok"


def byte_tokens(text: str) -> list[int]:
    """One token per byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    return [tokenizer().convert_tokens_to_ids(alphabet[b]) for b in text.encode()]


def test_spaces_between_prompt_and_output_are_kept() -> None:
    assert "".join(deltas(encode(" fox"), prompt=tuple(encode("brown")))) == " fox"


def test_special_tokens_are_skipped() -> None:
    ids = [*encode("one"), END_OF_TURN, *encode("我"), 0, END_OF_TURN, *encode(" two")]
    found = deltas(ids)
    assert "".join(found) == "one我 two"
    assert not any(token in "".join(found) for token in SPECIAL_TOKENS)


def test_a_special_token_inside_a_character_leaves_it_broken_and_harms_nothing_else() -> None:
    first, *rest = byte_tokens("我")
    ids = [first, END_OF_TURN, *rest, *encode(" ok")]
    assert "".join(deltas(ids)) == decode(ids)


# stop strings


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("The quick brown fox", ("brown",), "The quick "),
        ("The quick brown fox", ("fox", "quick"), "The "),
        ("The quick", ("The quick",), ""),
        ("The quick", ("T",), ""),
        ("The quick", ("absent",), "The quick"),
        ("The quick", ("quick!", "quicker"), "The quick"),
        ("我爱北京", ("北",), "我爱"),
        ("我爱北京天安门", ("京天", "爱北京天"), "我"),
        (f"one {FAMILY} two", ("👧",), "one 👩‍👩‍"),
        (f"one {FAMILY} two", ("\u200d",), "one 👩"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("abcd", ("abcd", "bc"), "a"),  # "bc" is complete first
        ("xabc", ("bc", "abc"), "x"),  # both are complete with the same character: the longer one goes
        ("a\n\nb", ("\n\n",), "a"),
    ],
)
def test_output_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    assert stopped_at(text, stop) == expected
    for ids in (encode(text), byte_tokens(text)):
        found = deltas(ids, stop=stop)
        assert "".join(found) == expected
    whole = Detokenizer(decode, PROMPT, stop)
    assert whole.add(encode(text)) + whole.flush() == expected


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab我🙂", max_size=16),
    st.lists(st.text("ab我🙂", min_size=1, max_size=4), max_size=3).map(tuple),
    st.data(),
)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stop: tuple[str, ...], data: st.DataObject) -> None:
    ids = byte_tokens(text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=10)) | {0, len(ids)})
    detokenizer = Detokenizer(decode, PROMPT, stop)
    found = ""
    for a, b in pairwise(cuts):
        found += detokenizer.add(ids[a:b])
        assert stopped_at(text, stop).startswith(found), "what was sent cannot be taken back"
        if detokenizer.is_stopped:
            break
    found += detokenizer.flush()
    assert found == stopped_at(text, stop)
    assert detokenizer.is_stopped == (found != text)
    assert (detokenizer.stopped_by in stop) == detokenizer.is_stopped
    assert text.startswith(found + (detokenizer.stopped_by or ""))


def test_what_may_become_a_stop_string_is_held_back_and_given_at_the_end() -> None:
    detokenizer = Detokenizer(decode, PROMPT, ("END",))
    assert detokenizer.add(encode("the E")) == "the "
    assert detokenizer.add(encode("N")) == ""
    assert detokenizer.flush() == "EN"
    assert not detokenizer.is_stopped


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab我", max_size=12),
    st.lists(st.text("ab我", min_size=1, max_size=4), max_size=3).map(tuple),
    st.integers(0, 20),
    st.booleans(),
)
def test_a_stop_string_counts_once_enough_tokens_have_come(
    text: str, stop: tuple[str, ...], min_tokens: int, include_stop: bool
) -> None:
    """A plain reading: of all places where a stop string ends with a later token, the first."""
    ids = byte_tokens(text)
    detokenizer = Detokenizer(decode, PROMPT, stop, min_tokens=min_tokens, include_stop=include_stop)
    found = ""
    for token_id in ids:
        found += detokenizer.add([token_id])
        if detokenizer.is_stopped:
            break
    found += detokenizer.flush()
    early = len(decode(ids[:min_tokens]).rstrip("\ufffd"))
    ends = [(i + len(s), i) for s in stop for i in range(len(text)) if text.startswith(s, i) and i + len(s) > early]
    expected = text[: min(ends)[not include_stop]] if ends else text
    assert found == expected
    assert detokenizer.is_stopped == bool(ends)


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = Detokenizer(decode, PROMPT, ("b",))
    assert detokenizer.add(encode("ab")) == "a"
    assert detokenizer.is_stopped
    assert detokenizer.flush() == ""


def test_a_broken_end_comes_as_replacement_characters_at_the_flush() -> None:
    detokenizer = Detokenizer(decode, PROMPT, ("x",))
    assert detokenizer.add([*encode("ok"), *byte_tokens("我")[:2]]) == ""
    assert detokenizer.flush() == "ok\ufffd"
    assert detokenizer.flush() == ""


# tokenizers in SentencePiece's manner: "▁" for a space, a token per byte for what is not in the vocabulary


@cache
def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefox", "▁a", "▁fox"]
    merges = [("▁", "a")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(st.text("a fox我🙂é", min_size=1, max_size=20))
@example(FAMILY)
@example("a  🙂🙂 我")
def test_byte_fallback_tokens_give_whole_characters_and_keep_spaces(text: str) -> None:
    prompt = byte_fallback().encode("abc").ids
    ids = byte_fallback().encode(text).ids
    detokenizer = Detokenizer(lambda some: str(byte_fallback().decode(list(some))), prompt)
    found = [detokenizer.add([token_id]) for token_id in ids]
    assert not any("\ufffd" in delta for delta in found)
    assert "".join(found) + detokenizer.flush() == f" {text}"
