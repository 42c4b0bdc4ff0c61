"""Tokens of an adapter's tokenizer beside the base's: which are used, and a tokenizer that has them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from manylora.errors import Conflict
from manylora.identity import OWN_TOKENS_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, OwnToken, Vocabulary
from manylora.lora.format.added_tokens import (
    MAX_LISTED_BYTES,
    MAX_OUTLINE_BYTES,
    MAX_TOKEN_BYTES,
    MAX_TOKENIZER_BYTES,
    read_added_tokens,
)
from manylora.models import codec as codec_module
from manylora.models.codec import HuggingFaceCodec
from manylora.models.own_tokens import (
    MAX_ADDED_CHARACTERS,
    MAX_ADDED_TOKENS,
    MAX_TOKEN_CHARACTERS,
    TokensRefused,
    extended,
)
from tests.tiny_models import make_tokenizer

SIZE = 320


@pytest.fixture(scope="module")
def codec() -> HuggingFaceCodec:
    return HuggingFaceCodec(make_tokenizer(), (2,))


def found_in(folder: Path, codec: HuggingFaceCodec, num_rows: int = 330) -> tuple[Vocabulary | None, list[str]]:
    warnings: list[str] = []
    added = read_added_tokens(folder, warnings)
    return codec.vocabulary_of(added.tokens, added.end, None, num_rows, warnings), warnings


def test_a_tokenizer_with_more_tokens_does_what_that_of_the_training_did(
    codec: HuggingFaceCodec, tmp_path: Path
) -> None:
    trained = make_tokenizer()
    trained.add_tokens(["<a>", AddedToken("<b>", lstrip=True, rstrip=True), AddedToken("word", single_word=True)])
    trained.add_special_tokens({"eos_token": "<|done|>"})
    trained.save_pretrained(tmp_path)
    own, warnings = found_in(tmp_path, codec)
    assert own is not None
    assert [token.id for token in own.tokens] == [320, 321, 322, 323]
    assert own.end_id == 323
    assert "<a>" in warnings[0]
    assert Vocabulary.parse(own.text) == own
    used = codec.with_vocabulary(own)
    assert codec.with_vocabulary(own) is used
    for text in ("a <a> b", "<b>  <b>x", "word words word.", "<|im_start|>user\n<a><|done|>", "你<a>你"):
        ids = trained(text)["input_ids"]
        assert used.encode(text) == used.encode_many([text])[0] == ids
        for skips in (True, False):
            wanted = trained.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
            assert used.decode(ids, skip_special_tokens=skips) == wanted
    assert (used.token_text(320), used.token_name(320), bytes(used.token_bytes(320))) == ("<a>", "<a>", b"<a>")
    assert codec.encode("<a>") == make_tokenizer()("<a>")["input_ids"]
    assert codec.token_text(320) == codec.token_name(320) == ""
    assert used.surely_exceeds("x" * 100_000, 10)


def test_a_reserved_token_may_have_another_name() -> None:
    base = make_tokenizer()
    base.add_tokens(["<|r0|>", "<|r1|>", "<|r2|>"])
    codec, warnings = HuggingFaceCodec(base, (2,)), list[str]()
    own = codec.vocabulary_of([OwnToken(321, "<|user|>", special=True)], None, None, SIZE + 3, warnings)
    assert own is not None
    used = codec.with_vocabulary(own)
    assert used.encode("<|r0|><|user|><|r2|>") == [320, 321, 322]
    assert 321 not in used.encode("<|r1|>")
    assert (used.token_text(321), codec.token_text(321)) == ("<|user|>", "<|r1|>")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([OwnToken(329, "<far>")], "would not have the id 329"),
        ([OwnToken(400, "<none>")], "have no row"),
        ([OwnToken(320, "<|im_end|>")], "another id"),
        ([OwnToken(320, "x" * (MAX_TOKEN_CHARACTERS + 1))], "characters"),
        ([OwnToken(320 + n, f"<{n}>") for n in range(MAX_ADDED_TOKENS + 1)], "more than"),
        ([OwnToken(320 + n, f"{n:0128}") for n in range(MAX_ADDED_CHARACTERS // 128 + 1)], "together"),
    ],
)
def test_tokens_that_cannot_be_had_are_left_out_with_the_reason(
    tokens: list[OwnToken], said: str, codec: HuggingFaceCodec
) -> None:
    warnings: list[str] = []
    num_rows = 330 if len(tokens) == 1 else 10_000
    assert codec.vocabulary_of(tokens, None, None, num_rows, warnings) is None
    assert said in warnings[0]


def test_ids_that_a_tokenizer_would_not_give_are_refused() -> None:
    tokens = [OwnToken(321, "<a>")]
    with pytest.raises(TokensRefused):
        extended(make_tokenizer().backend_tokenizer, tokens)
    codec, own = HuggingFaceCodec(make_tokenizer(), (2,)), Vocabulary.of(None, tokens)
    for _ in range(2):  # a request of a version that was made for another base of these shapes, and the next one
        with pytest.raises(Conflict, match=r"<a> would not have the id 321\. Upload it again"):
            codec.with_vocabulary(own)


def test_the_tokenizers_asked_for_last_are_kept_as_long_as_they_take_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few with many tokens are as many bytes as many with a few."""
    base = make_tokenizer()
    small = [Vocabulary.of(None, [OwnToken(320, f"<{n}>")]) for n in range(3)]
    large = Vocabulary.of(None, [OwnToken(320 + n, f"<{n:060}>") for n in range(MAX_ADDED_CHARACTERS // 62)])
    monkeypatch.setattr(codec_module, "_KEPT_BYTES", 2**20)
    codec = HuggingFaceCodec(base, (2,))
    used = [codec.with_vocabulary(each) for each in small]
    assert [codec.with_vocabulary(each) for each in small] == used
    assert codec.with_vocabulary(large) is codec.with_vocabulary(large)
    assert codec.with_vocabulary(small[0]) is not used[0]
    assert [each.decode([320]) for each in used] == ["<0>", "<1>", "<2>"]
    assert codec._extended.num_bytes < 2**20


@pytest.mark.parametrize(
    "content",
    [b"no json", b"[]", b'{"added_tokens": 3}', b'{"added_tokens": [{"id": -1, "content": "x"}]}',
     b'{"added_tokens": [{"id": 1, "content": ""}]}', b'{"added_tokens": [{"id": 1, "content": "x", "lstrip": 1}]}'],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_left_aside(content: bytes, codec: HuggingFaceCodec, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    own, warnings = found_in(tmp_path, codec)
    assert own is None
    assert "The base's own tokenizer is used." in warnings[0]


def test_of_a_large_tokenizer_its_added_tokens_alone_are_read(codec: HuggingFaceCodec, tmp_path: Path) -> None:
    """In whatever order and with whatever strings its parts come."""
    added = [asdict(OwnToken(320, '"]}\\')), asdict(OwnToken(321, "<b>"))]
    model = {"vocab": {f'"added_tokens": [{n}\\': n for n in range(20_000)}, "added_tokens": [1]}
    for order in (("model", "added_tokens"), ("added_tokens", "model")):
        whole = {name: {"model": model, "added_tokens": added}[name] for name in order}
        (tmp_path / TOKENIZER_FILE).write_text(json.dumps(whole, indent=2))
        assert [token.content for token in read_added_tokens(tmp_path, []).tokens] == ['"]}\\', "<b>"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"added_tokens": [], "version": "x" * MAX_OUTLINE_BYTES}, "no JSON object of a tokenizer"),
        ({"added_tokens": [{"id": 320, "content": "a", "more": "x" * MAX_TOKEN_BYTES}]}, f"{MAX_TOKEN_BYTES} bytes"),
        ({"added_tokens": [[" " * MAX_LISTED_BYTES]]}, f"more than {MAX_LISTED_BYTES} bytes of added tokens"),
        ({"added_tokens": [{"id": 320, "content": "a"}, 3]}, "are none"),
        ({"added_tokens": {"id": 320, "content": "a"}}, "are none"),
    ],
)
def test_more_than_is_parsed_is_left_aside(
    content: dict[str, Any], said: str, codec: HuggingFaceCodec, tmp_path: Path
) -> None:
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(content))
    own, warnings = found_in(tmp_path, codec)
    assert own is None
    assert said in warnings[0]
    assert "The base's own tokenizer is used." in warnings[0]


def test_a_file_that_is_too_large_is_not_read(codec: HuggingFaceCodec, tmp_path: Path) -> None:
    with (tmp_path / TOKENIZER_FILE).open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    own, warnings = found_in(tmp_path, codec)
    assert own is None
    assert f"more than {MAX_TOKENIZER_BYTES} bytes" in warnings[0]


def test_what_a_download_has_is_read_as_what_it_was_made_from(codec: HuggingFaceCodec, tmp_path: Path) -> None:
    tokens = (OwnToken(320, "<a>"), OwnToken(321, "<end>", special=True))
    own = Vocabulary.of(None, tokens, 321)
    assert own is not None
    (tmp_path / OWN_TOKENS_FILE).write_text(own.text)
    assert found_in(tmp_path, codec)[0] == own
    (tmp_path / OWN_TOKENS_FILE).unlink()
    added: list[dict[str, Any]] = [asdict(token) for token in tokens]
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({"added_tokens": added}))
    (tmp_path / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert found_in(tmp_path, codec)[0] == own
