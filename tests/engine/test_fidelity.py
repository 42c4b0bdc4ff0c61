"""A mixed batch gives each request what Hugging Face and PEFT give it alone, in float32."""

import random
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.engine.sequence import Scheduled, Sequence
from manylora.lora.format.reader import read_trusted
from manylora.lora.memory.packing import KeepAs
from tests.engine.harness import Rig, available_kernels, build_rig, load, packer_of
from tests.engine.oracle import check_greedy, check_served, with_adapter
from tests.tiny_adapters import make_adapter
from tests.tiny_models import ARCHITECTURES, make_tiny_model

VOCAB = 300
RANKS = (4, 8, 16, 64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {f"a{i:02d}": make_adapter(llama, root / f"a{i:02d}", rank=RANKS[i % 4], seed=i) for i in range(32)}


def prompts(count: int, vocab: int, lengths: tuple[int, ...] = (3, 60, 9, 33, 1, 17)) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(vocab) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_gives_the_tokens_of_generate(architecture: str, kernel: str, tmp_path: Path) -> None:
    folder = make_tiny_model(architecture, tmp_path / "base")
    adapter = make_adapter(folder, tmp_path / "adapter", rank=8, seed=1)
    oracle = {None: with_adapter(folder, None), "tuned": with_adapter(folder, adapter)}
    rig = build_rig(load(folder), {"tuned": adapter}, kernel=kernel)
    asked = prompts(6, VOCAB)
    for i, prompt in enumerate(asked):
        rig.add(f"r{i}", prompt, "tuned" if i % 2 else None)
    rig.run()
    rig.close()
    for i, prompt in enumerate(asked):
        check_greedy(oracle["tuned" if i % 2 else None], prompt, rig.tokens(f"r{i}"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("num_blocks", [400, 26], ids=["roomy", "preempting"])
def test_32_adapters_and_the_base_in_one_batch_match_peft(
    kernel: str, num_blocks: int, llama: Path, adapters: dict[str, Path]
) -> None:
    rig = build_rig(load(llama), adapters, kernel=kernel, num_blocks=num_blocks, num_slots=40)
    names = [*adapters, *([None] * 8)]
    asked = prompts(len(names), VOCAB)
    # Every second request starts with what another one of the same adapter has left in the prefix cache.
    for i, name in enumerate(names):
        rig.add(f"warm{i}", asked[i][:40], name, max_tokens=2)
        rig.add(f"r{i}", asked[i], name)
    victims = [rig.add(f"gone{i}", asked[i], name) for i, name in enumerate(names)]
    for victim in victims:
        rig.step()
        rig.engine.abort([victim])
    rig.run()
    rig.close()
    assert (rig.scheduler.num_preemptions > 0) == (num_blocks == 26)
    for i, name in enumerate(names):
        check_served(llama, adapters[name] if name else None, asked[i], rig.tokens(f"r{i}"))


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("how", ["nan", "huge"])
def test_broken_adapter_moves_no_bit_of_its_neighbours_logits(
    how: str, kernel: str, llama: Path, adapters: dict[str, Path]
) -> None:
    def run(poison: bool) -> list[torch.Tensor]:
        rig = build_rig(load(llama), adapters, kernel=kernel, num_blocks=400)
        for name in ("a00", "a01", "a03"):
            while rig.tiers.acquire(rig.refs[name]) is None:
                rig.loaded.wait(1)
            rig.tiers.release(rig.refs[name])
        if poison:
            memory = rig.tiers.memory
            slot = next(r["slot"] for r in rig.tiers.residents() if r["name"] == "a01")
            place = memory.places[slot]
            packed = packer_of(rig.wrapped, KeepAs(torch.float32, torch.float32))(
                read_trusted(adapters["a01"], rig.wrapped.modules)
            )
            packed.data.mul_(1000) if how == "huge" else packed.data.fill_(float("nan"))
            memory.fill(place, packed)
        names = ["a00", "a01", None, "a03", "a01", "a00"]
        # Sequences whose logits are not finite end at their first token, so in both runs they ask for no more.
        seqs = [
            rig.add(f"r{i}", p, n, max_tokens=1 if n == "a01" and how == "nan" else 16)
            for i, (p, n) in enumerate(zip(prompts(6, VOCAB), names, strict=True))
        ]
        seen = recorded_logits(rig, [s for s, n in zip(seqs, names, strict=True) if n != "a01"])
        rig.close()
        return seen

    clean, beside = run(poison=False), run(poison=True)
    assert len(clean) == len(beside) > 16
    assert all(torch.equal(a, b) for a, b in zip(clean, beside, strict=True))


def recorded_logits(rig: Rig, watched: Collection[Sequence]) -> list[torch.Tensor]:
    """Run to the end, keeping the logits from which the watched sequences were sampled."""
    seen: list[torch.Tensor] = []
    forward = rig.engine.runner.forward

    def recording(scheduled: SequenceOf[Scheduled]) -> Any:
        logits = forward(scheduled)
        samplers = [item for item in scheduled if item.samples]
        seen.extend(logits[i].clone() for i, item in enumerate(samplers) if item.seq in watched)
        return logits

    rig.engine.runner.forward = recording  # type: ignore[method-assign]
    rig.run()
    return seen


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_of_one_request_share_the_prompts_blocks(prefix_cache: bool, llama: Path) -> None:
    rig = build_rig(load(llama), num_blocks=64, prefix_cache=prefix_cache)
    prompt = prompts(1, VOCAB, (32,))[0]
    rig.add("many", prompt, n=6, temperature=1.0, seed=3, max_tokens=4)
    while any(f"many/{i}" not in rig.outputs for i in range(6)):
        rig.step()
    # 32 tokens are eight blocks; the last one must be run again for its logits, so seven are shared.
    assert rig.scheduler.blocks.num_used <= 7 + 6 * 3
    rig.run()
    assert len({tuple(rig.tokens("many", i)) for i in range(6)}) > 1
    assert rig.scheduler.blocks.num_used == 0


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_tokens_from_the_cache_are_told_once_for_all_choices_of_a_prompt(max_tokens: int, llama: Path) -> None:
    rig = build_rig(load(llama), num_blocks=200)
    prompt = prompts(1, VOCAB, (40,))[0]
    told: dict[str, int] = {}
    for request in ("first", "again"):
        rig.add(request, prompt, n=4, temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
        rig.run()
        told[request] = sum(
            output.delta.num_cached_tokens for index in range(4) for output in rig.outputs[f"{request}/{index}"]
        )
    # The choices take each other's blocks too, which is no cache hit: the request computed them itself.
    assert told == {"first": 0, "again": 36}


def test_prefix_cache_never_answers_for_another_adapter(llama: Path, adapters: dict[str, Path]) -> None:
    rig = build_rig(load(llama), adapters, num_blocks=400)
    prompt = prompts(1, VOCAB, (40,))[0]
    for name in ("a00", "a01", None, "a00"):
        rig.add(f"for-{name}", prompt, name)
        rig.run()
    rig.close()
    for name in ("a00", "a01", None):
        check_served(llama, adapters[name] if name else None, prompt, rig.tokens(f"for-{name}")[:16])
    assert rig.outputs["for-a00/0"][16].delta.num_cached_tokens == 36
    assert rig.outputs["for-a01/0"][0].delta.num_cached_tokens == 0
