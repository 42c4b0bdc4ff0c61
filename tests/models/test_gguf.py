"""GGUF files: converted once, found again by content, refused when they are none."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoTokenizer

from manylora.errors import ModelUnusable
from manylora.models import gguf
from manylora.models.model_cache import ModelCache
from tests.models.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "Tiny Llama.gguf")


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf.ensure_converted(gguf_file, ModelCache(tmp_path_factory.mktemp("cache")))


def test_the_weights_are_those_of_the_file_as_bfloat16(gguf_file: Path, converted: Path) -> None:
    original = next(t for t in GGUFReader(gguf_file).tensors if t.name == "token_embd.weight")

    saved = load_file(converted / "model.safetensors")

    expected = torch.from_numpy(original.data.copy()).to(torch.bfloat16)
    assert torch.equal(saved["model.embed_tokens.weight"], expected)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_digits_are_split_from_the_spaces_before_them(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)

    assert tokenizer.tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]
    assert [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")] == [
        "a", "ĠĠ", "1", "2",
    ]  # fmt: skip


def test_the_same_content_elsewhere_is_not_converted_again(gguf_file: Path, converted: Path, tmp_path: Path) -> None:
    copy = tmp_path / gguf_file.name
    copy.write_bytes(gguf_file.read_bytes())
    before = (converted / "model.safetensors").stat().st_mtime_ns

    again = gguf.ensure_converted(copy, ModelCache(converted.parent))

    assert again == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


def test_other_content_is_another_folder(gguf_file: Path, converted: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / gguf_file.name, seed=1)

    assert gguf.ensure_converted(other, ModelCache(converted.parent)) != converted


def test_a_truncated_file_is_refused_and_leaves_nothing(gguf_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:3000])

    with pytest.raises(ModelUnusable, match=r"cut\.gguf cannot be dequantised"):
        gguf.ensure_converted(cut, ModelCache(tmp_path / "cache"))

    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", architecture="oddity")

    with pytest.raises(ModelUnusable, match="cannot be dequantised"):
        gguf.ensure_converted(path, ModelCache(tmp_path / "cache"))


@pytest.mark.parametrize(("text", "expected"), [("Tiny Llama", "tiny-llama"), ("--", "model"), ("A.b_C", "a.b_c")])
def test_names_become_safe_folder_names(text: str, expected: str) -> None:
    assert gguf.slug(text) == expected
