"""Virtual tokens before each prompt: where they lie, how often they are computed, and on which bases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from manylora.engine.executor import LocalExecutor
from manylora.errors import InvalidAdapter
from manylora.lora.format.methods.prompts import PROMPTS
from manylora.lora.format.reader import read
from tests.engine.harness import available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.engine.test_adapter_kinds import base_of
from tests.engine.test_peft_kinds import MOST, PROMPT, apart, logits_of, run
from tests.peft_kinds import KINDS, make_kind

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]
NAMES: Final = ("Prompt tuning", "Prefix tuning")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many virtual tokens each pass over embeddings had."""
    found: list[int] = []
    original = LocalExecutor._run_embeddings

    def counted(self: LocalExecutor, embeddings: torch.Tensor, kv_slots: torch.Tensor) -> None:
        found.append(len(embeddings))
        original(self, embeddings, kv_slots)

    monkeypatch.setattr(LocalExecutor, "_run_embeddings", counted)
    return found


@pytest.mark.parametrize("count", [1, 4, 7, 70])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_virtual_tokens_is_computed_once_for_all_sequences(
    name: str, count: int, ran: list[int], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Blocks of four: some of a block, one, some of two, and more than one pass runs."""
    folder = make_kind(tiny_llama_dir, tmp_path / "adapter", name, num_virtual_tokens=count)
    rig = build_rig(load(tiny_llama_dir), {"a": folder}, kernel=available_kernels[-1], max_num_batched_tokens=16)
    prompts = [PROMPT, [44, 5], [12]]
    seqs = [rig.add(str(n), prompt, "a", max_tokens=5) for n, prompt in enumerate(prompts)]
    rig.run()
    late = rig.add("late", [*PROMPT, 9, 8], "a", max_tokens=2)
    rig.run()
    rig.close()
    tuned = with_adapter(tiny_llama_dir, folder)
    for n, prompt in enumerate(prompts):
        check_greedy(tuned, prompt, rig.tokens(str(n)))
    assert ran == ([count] if name == "Prompt tuning" else [])
    assert [seq.num_cached_tokens for seq in seqs] == [0, 0, 0]  # of the prompt itself
    assert late.num_cached_tokens == (count + len(PROMPT)) // 4 * 4 - count


CASES: Final[Mapping[str, dict[str, Any]]] = {"gpt2": {}, "qwen2": {}, "gemma2": {}, "mistral": {}}


@pytest.mark.parametrize("base", CASES)
def test_virtual_tokens_stand_before_prompts_as_in_peft_on_other_bases(base: str, tmp_path: Path) -> None:
    folder = base_of(base, tmp_path / "base")
    made = {name: make_kind(folder, tmp_path / name, name) for name in NAMES}
    rig = build_rig(load(folder), made, kernel=available_kernels[-1], num_blocks=100, max_num_batched_tokens=16)
    found = run(rig, {None: PROMPT, **dict.fromkeys(made, PROMPT)}, max_tokens=3)
    rig.close()
    for name, adapter in made.items():
        wanted = logits_of(folder, adapter, PROMPT)
        assert apart(found[name], wanted) < MOST, name
        assert float((logits_of(folder, None, PROMPT) - wanted).abs().max() / wanted.std()) > 10 * MOST, name
    assert apart(found["None"], logits_of(folder, None, PROMPT)) < MOST


def test_every_method_of_virtual_tokens_is_among_the_kinds() -> None:
    assert PROMPTS.keys() <= {kind.method for kind in KINDS.values()}


def test_virtual_tokens_of_another_base_are_refused_with_the_shape_that_fits(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = base_of("gemma2", tmp_path / "base")
    rig = build_rig(load(tiny_llama_dir))
    rig.close()
    folder = make_kind(other, tmp_path / "prefix", "Prefix tuning", num_layers=3)
    with pytest.raises(InvalidAdapter, match=r"2 layers with 2 heads of 16"):
        read(folder, rig.wrapped.modules, max_rank=8, max_size=2**20)
    small = make_kind(tiny_llama_dir, tmp_path / "prompt", "Prompt tuning", num_virtual_tokens=50)
    with pytest.raises(InvalidAdapter, match="--max-adapter-memory"):
        read(small, rig.wrapped.modules, max_rank=8, max_size=2**20, max_memory=2**15)
