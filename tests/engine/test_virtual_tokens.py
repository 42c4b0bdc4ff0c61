"""Virtual tokens before each prompt: where they lie, how often they are computed, and on which bases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from manylora.engine.executor import LocalExecutor
from manylora.engine.sequence import Sequence
from manylora.engine.step_input import PrefixInput
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
    """How many virtual tokens each pass over embeddings ran."""
    found: list[int] = []
    original = LocalExecutor._run_embeddings

    def counted(self: LocalExecutor, embeddings: torch.Tensor, kv_slots: torch.Tensor, first: int) -> None:
        found.append(len(embeddings) - first)
        original(self, embeddings, kv_slots, first)

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
    assert sum(ran) == (count if name == "Prompt tuning" else 0)
    assert max(ran, default=0) <= 16
    assert [seq.num_cached_tokens for seq in seqs] == [0, 0, 0]  # of the prompt itself
    assert late.num_cached_tokens == (count + len(PROMPT)) // 4 * 4 - count


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many virtual tokens were brought into the cache, each time some were."""
    found: list[int] = []
    original = LocalExecutor._place

    def counted(self: LocalExecutor, prefix: PrefixInput) -> None:
        found.append(len(prefix.kv_slots) - prefix.begin)
        original(self, prefix)

    monkeypatch.setattr(LocalExecutor, "_place", counted)
    return found


def test_virtual_tokens_are_in_the_budget_of_steps_beside_which_others_stream(
    ran: list[int], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Seventy of them, in steps of 16 tokens of which a stream leaves half."""
    folder = make_kind(tiny_llama_dir, tmp_path / "a", "Prompt tuning", num_virtual_tokens=70)
    rig = build_rig(load(tiny_llama_dir), {"a": folder}, kernel=available_kernels[-1], max_num_batched_tokens=16)
    stream = rig.add("stream", [5], max_tokens=30)
    rig.step()
    seq = rig.add("late", PROMPT, "a", tenant="t", max_tokens=3)
    while not seq.num_output_tokens:
        before, num_ran = stream.num_output_tokens, sum(ran)
        rig.step()
        assert stream.num_output_tokens == before + 1
        assert sum(ran) - num_ran <= 9
    assert (seq.num_output_tokens, sum(ran)) == (1, 70)
    rig.run()
    rig.close()
    check_greedy(with_adapter(tiny_llama_dir, folder), PROMPT, rig.tokens("late"))


def test_computing_virtual_tokens_is_at_the_expense_of_a_tenants_share_and_copying_them_is_not(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_kind(tiny_llama_dir, tmp_path / "a", "Prompt tuning", num_virtual_tokens=40)
    rig = build_rig(load(tiny_llama_dir), {"a": folder}, kernel=available_kernels[-1])
    charged: list[int] = []
    charge = rig.scheduler.waiting.charge

    def noted(seq: Sequence, num_prompt: int, num_output: int) -> None:
        charged.append(num_prompt)
        charge(seq, num_prompt, num_output)

    monkeypatch.setattr(rig.scheduler.waiting, "charge", noted)
    for number in range(3):
        rig.add(f"r{number}", PROMPT, "a", tenant=f"t{number // 2}", max_tokens=1)
        rig.run()
    rig.close()
    whole = len(PROMPT)
    assert [n for n in charged if n] == [40 + whole, 1, whole]


@pytest.mark.parametrize("scored", [{}, {"prompt_logprobs": 0}])
@pytest.mark.parametrize("name", NAMES)
def test_virtual_tokens_are_copied_where_the_cache_does_not_know_them(
    name: str, scored: dict[str, Any], copied: list[int], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Blocks of four: of eighteen sixteen are found again, by those who want all of a prompt's logits, too."""
    folder = make_kind(tiny_llama_dir, tmp_path / "a", name, num_virtual_tokens=18)
    rig = build_rig(load(tiny_llama_dir), {"a": folder}, kernel=available_kernels[-1], max_num_batched_tokens=64)
    rig.add("first", PROMPT, "a", max_tokens=1)
    rig.run()
    rig.add("other", [44, 5, 9], "a", max_tokens=2, **scored)
    rig.run()
    rig.add("other tenant", [44, 5, 9], "a", tenant="t", max_tokens=2, **scored)
    rig.run()
    rig.close()
    assert copied == [18, 2, 18]
    tuned = with_adapter(tiny_llama_dir, folder)
    for request in ("other", "other tenant"):
        check_greedy(tuned, [44, 5, 9], rig.tokens(request))


def test_what_was_lost_of_virtual_tokens_is_computed_anew_behind_those_in_the_cache(
    ran: list[int], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = make_kind(tiny_llama_dir, tmp_path / "a", "Prompt tuning", num_virtual_tokens=18)
    rig = build_rig(load(tiny_llama_dir), {"a": folder}, kernel=available_kernels[-1])
    prompts = [44, 5, 9], [77, 5, 9], [44, 5, 9]
    for number, tenant in enumerate(("t", "t", "u")):
        rig.add(str(number), prompts[number], "a", tenant=tenant, max_tokens=4)
        rig.run()
        if not number:
            rig.tiers.memory._ready.clear()  # as when the adapter has left its slot and come back
    rig.close()
    assert ran == [18, 2]
    tuned = with_adapter(tiny_llama_dir, folder)
    for number, prompt in enumerate(prompts):
        check_greedy(tuned, prompt, rig.tokens(str(number)))


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
