"""A KV cache in 8 bits: each request gets what it gets alone, its blocks are shared exactly, and it takes less room."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manylora.errors import InvalidSettings
from manylora.models.backends import choose
from manylora.settings import Settings, load_settings
from tests.engine.harness import BACKENDS, Rig, build_rig, load
from tests.engine.test_build import build
from tests.tiny_adapters import make_adapter
from tests.tiny_models import VOCAB_SIZE


def said(rig: Rig, request: str) -> list[tuple[int, float | None]]:
    """A request's tokens, each with its log-probability."""
    chosen = [each for output in rig.outputs[f"{request}/0"] for each in output.delta.logprobs]
    return [(each.token_id, each.logprob) for each in chosen]


@pytest.mark.parametrize("kernel", ["fused", "native"])
def test_blocks_chunks_and_neighbours_change_no_bit(kernel: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    if kernel not in BACKENDS:
        pytest.skip("the C++ kernels are not installed")
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", rank=4)
    prompts = torch.randint(VOCAB_SIZE, (3, 41), generator=torch.Generator().manual_seed(0)).tolist()
    backend = replace(BACKENDS[kernel], kv_dtype=torch.int8)
    rig = build_rig(load(tiny_llama_dir), {"tuned": adapter}, kernel=backend, max_num_batched_tokens=48)
    rig.add("alone", prompts[0], "tuned", logprobs=0)
    rig.run()
    rig.add("again", prompts[0], "tuned", logprobs=0)
    for number, (prompt, name) in enumerate(zip(prompts[1:], ("tuned", None), strict=True)):
        rig.add(f"beside-{number}", prompt, name)
    rig.run()
    cut = build_rig(load(tiny_llama_dir), {"tuned": adapter}, kernel=backend, max_num_batched_tokens=7)
    cut.add("cut", prompts[0], "tuned", logprobs=0)
    cut.run()
    for each in (rig, cut):
        each.close()

    assert rig.outputs["again/0"][0].delta.num_cached_tokens == 40
    assert said(rig, "again") == said(rig, "alone")
    assert said(cut, "cut") == said(rig, "alone")


@pytest.mark.parametrize("kernel", list(BACKENDS))
def test_answers_are_close_to_those_of_a_whole_cache(kernel: str, tiny_llama_dir: Path) -> None:
    found = []
    for kv_dtype in (None, torch.int8):
        rig = build_rig(load(tiny_llama_dir), kernel=replace(BACKENDS[kernel], kv_dtype=kv_dtype))
        rig.add("one", range(40), max_tokens=1, prompt_logprobs=0)
        rig.run()
        scores = [each.logprob for output in rig.outputs["one/0"] for each in output.delta.prompt_logprobs]
        found.append(torch.tensor(scores[1:]))
    assert not torch.equal(*found)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.1)


def test_the_setting_makes_room_for_more_tokens(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole, rounded = (
        build(tiny_llama_dir, tmp_path, kv_cache_memory="4MiB", kv_cache_dtype=kind)[0]._cache()
        for kind in ("auto", "int8")
    )
    entry = whole.keys[0].shape[3]
    assert rounded.keys[0].shape[3] == entry + 4
    assert rounded.num_blocks == pytest.approx(whole.num_blocks * 4 * entry / (entry + 4), abs=1)


def test_a_rounded_cache_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InvalidSettings, match="kv_cache_dtype: int8 is for CPUs"):
        choose(Settings(device="cuda", kv_cache_dtype="int8"))
    assert choose(load_settings(device="cpu", kv_cache_dtype="int8")).cache_dtype(torch.float32) is torch.int8
