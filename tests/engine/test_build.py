"""Memory is laid out so that a small machine serves too, and says so where it cannot."""

from pathlib import Path

import pytest

from manylora.engine import build as engine_build
from manylora.engine.build import EngineBuilder, in_bytes
from manylora.errors import InvalidSettings, NotEnoughMemory
from manylora.identity import AdapterRef
from manylora.metrics import Metrics
from manylora.models.kv_cache import bytes_per_block
from manylora.models.loading import load_base
from manylora.settings import Settings, load_settings
from tests.models.zoo import make_zoo_model
from tests.tiny_models import VOCAB_SIZE


class NoFolders:
    """A source of adapters that is asked for none."""

    def local_folder(self, ref: AdapterRef) -> Path:
        raise AssertionError(ref)


def build(folder: Path, data: Path, **options: object) -> tuple[EngineBuilder, Settings]:
    settings = load_settings(model=str(folder), data_dir=data, device="cpu", dtype="float32", **options)
    return EngineBuilder(settings, load_base(settings)), settings


def test_a_share_too_small_for_one_sequence_is_raised_to_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    builder, settings = build(tiny_llama_dir, tmp_path, kv_cache_memory=1e-9)
    assert in_bytes(settings.kv_cache_memory, builder.device) < 1000

    cache = builder._cache()

    assert cache.num_blocks == -(-builder.context_length // settings.block_size)


def test_bytes_are_taken_at_their_word(tiny_llama_dir: Path, tmp_path: Path) -> None:
    builder, _ = build(tiny_llama_dir, tmp_path, kv_cache_memory=1000)

    with pytest.raises(NotEnoughMemory, match="one sequence of"):
        builder._cache()


def test_embeddings_may_be_cut_as_the_settings_say_and_no_longer_than_they_are(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    builder, _ = build(tiny_llama_dir, tmp_path, matryoshka_dimensions=(32, 16), embedding_pooling="mean")
    info = builder.model_info()
    assert (info.hidden_size, info.dimensions, info.default_pooling) == (64, (16, 32), "mean")
    builder, _ = build(tiny_llama_dir, tmp_path, matryoshka_dimensions=(65,))
    with pytest.raises(InvalidSettings, match="64 numbers"):
        builder.model_info()


def test_the_logits_that_the_model_was_checked_with_are_not_kept(tiny_llama_dir: Path, tmp_path: Path) -> None:
    builder, _ = build(tiny_llama_dir, tmp_path, kv_cache_memory="4MiB", adapter_memory="16MiB")
    assert builder.wrapped.survey.probes
    _, tiers = builder.build_core(NoFolders(), Metrics())
    tiers.close()
    assert builder.wrapped.survey.probes == []
    assert builder.wrapped.vocab_size == VOCAB_SIZE


def test_one_long_sequence_takes_half_of_what_is_free_together_with_the_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_zoo_model("lfm2", tmp_path / "base", layer_types=["conv", "full_attention"])
    builder, settings = build(base, tmp_path, kv_cache_memory=0.4, max_num_seqs=1)
    needed = -(-builder.context_length // settings.block_size)
    whole = needed * bytes_per_block(builder.wrapped.survey.kv_shapes, settings.block_size, builder.dtype)

    states = 2 * builder.wrapped.survey.state_bytes
    monkeypatch.setattr(engine_build, "free_bytes", lambda _device: 2 * (whole + states))
    assert builder._cache().num_blocks == needed
    monkeypatch.setattr(engine_build, "free_bytes", lambda _device: 2 * (whole + states) - 2)
    with pytest.raises(NotEnoughMemory, match="one sequence of"):
        builder._cache()
