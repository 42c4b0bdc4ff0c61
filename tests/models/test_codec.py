"""The tokenizer seam: text to ids and back, bytes of single tokens, chat templates, threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manylora.chat.format import ChatOptions
from manylora.errors import InvalidRequest
from manylora.models.codec import HuggingFaceCodec
from tests.tiny_models import END_OF_TURN, make_tokenizer

TEXT = "The café, 我爱北京 🙂\n  twice  spaced"
CODEC = HuggingFaceCodec(make_tokenizer(), [END_OF_TURN])


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with ▁ for a space, and a token for each byte."""
    vocab = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hi", "▁", "there", "<0x", "我"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@given(st.text())
def test_any_text_comes_back_as_it_went_in(text: str) -> None:
    assert CODEC.decode(CODEC.encode(text), skip_special_tokens=False) == text


@given(st.text())
def test_the_bytes_of_the_tokens_joined_are_the_text(text: str) -> None:
    joined = bytes(byte for token_id in CODEC.encode(text) for byte in CODEC.token_bytes(token_id))

    assert joined == text.encode()


def test_ids_are_those_of_the_tokenizer_itself(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)

    assert HuggingFaceCodec(tokenizer, []).encode(TEXT) == make_tokenizer().encode(TEXT)


def test_special_tokens_are_left_out_of_answers() -> None:
    ids = [*CODEC.encode("yes"), END_OF_TURN]

    assert CODEC.decode(ids) == "yes"
    assert CODEC.decode(ids, skip_special_tokens=False) == "yes<|im_end|>"


def test_the_start_token_is_added_only_when_asked_for() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    codec = HuggingFaceCodec(tokenizer, [1])

    assert codec.encode("我") == [0, *codec.encode("我", add_special_tokens=False)]


def test_part_of_a_character_shows_as_a_replacement_but_its_bytes_are_exact() -> None:
    ids = CODEC.encode("🌙")

    assert len(ids) > 1
    assert CODEC.token_text(ids[0]) == "\ufffd"
    assert bytes(b for i in ids for b in CODEC.token_bytes(i)) == "🌙".encode()


def test_byte_fallback_tokens_are_single_bytes() -> None:
    tokenizer = byte_fallback_tokenizer()
    codec = HuggingFaceCodec(tokenizer, [1])

    spelled = {t: codec.token_bytes(tokenizer.convert_tokens_to_ids(t)) for t in ("<0xE4>", "▁Hi", "<0x", "我", "<s>")}

    assert spelled == {
        "<0xE4>": [0xE4],
        "▁Hi": list(b" Hi"),
        "<0x": list(b"<0x"),
        "我": list("我".encode()),
        "<s>": list(b"<s>"),
    }


def test_a_words_leading_space_is_part_of_its_token_text() -> None:
    tokenizer = byte_fallback_tokenizer()

    assert HuggingFaceCodec(tokenizer, [1]).token_text(tokenizer.convert_tokens_to_ids("▁Hi")) == " Hi"


@pytest.mark.parametrize("token_id", [-1, 10_000, 2**40])
def test_an_id_without_a_token_has_no_text(token_id: int) -> None:
    assert CODEC.token_text(token_id) == ""
    assert CODEC.token_bytes(token_id) == []


def test_chat_ends_where_the_assistant_begins() -> None:
    ids = CODEC.chat([{"role": "user", "content": "hi"}])

    rendered = CODEC.decode(ids, skip_special_tokens=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_final_message_can_be_continued() -> None:
    ids = CODEC.chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}],
        ChatOptions(continue_final=True),
    )

    assert CODEC.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\nThe answer")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "wizard", "content": "hi"}],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ],
    ids=["unknown role", "no content", "no role", "content in parts"],
)
def test_messages_that_the_template_refuses_are_the_callers_fault(messages: list[dict[str, object]]) -> None:
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        CODEC.chat(messages)

    assert caught.value.param == "messages"


def test_a_model_without_a_template_says_which_route_to_use() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        HuggingFaceCodec(byte_fallback_tokenizer(), [1]).chat([{"role": "user", "content": "hi"}])


def test_padding_and_truncation_of_the_saved_tokenizer_do_not_touch_prompts() -> None:
    tokenizer = make_tokenizer()
    expected = tokenizer.encode(TEXT)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)

    assert HuggingFaceCodec(tokenizer, []).encode(TEXT) == expected


def test_threads_do_not_disturb_each_other() -> None:
    texts = [TEXT * n for n in range(1, 9)] * 8
    alone = [CODEC.encode(text) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(CODEC.encode, texts))
        decoded = list(pool.map(CODEC.decode, together))

    assert together == alone
    assert decoded == texts
