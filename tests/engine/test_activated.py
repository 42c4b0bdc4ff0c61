"""Activated LoRA: from its invocation tokens on, behind blocks of the cache that are the base's."""

from pathlib import Path

import pytest

from tests.engine.harness import available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.engine.test_peft_kinds import run
from tests.peft_kinds import make_kind

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
BEFORE = list(range(100, 117))  # four blocks of four, and one token
CALL = [33, 250]


def test_what_stands_before_the_invocation_is_shared_with_the_base(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = make_kind(tiny_llama_dir, tmp_path / "a", "aLoRA", seed=3)
    other = make_kind(tiny_llama_dir, tmp_path / "b", "aLoRA", seed=4)
    rig = build_rig(load(tiny_llama_dir), {"a": folder, "b": other}, kernel=available_kernels[-1])
    prompts = {"once": [*BEFORE, *CALL, 7], "twice": [*CALL, *BEFORE, *CALL, 9, 9], "first": [*CALL, *BEFORE]}

    def ask(name: str, prompt: list[int], adapter: str | None) -> int:
        seq = rig.add(name, prompt, adapter, max_tokens=6)
        seq.cache_salt = "shared"  # as of one tenant; here each adapter's requests have one of their own
        rig.run()
        return seq.num_cached_tokens

    base = ask("base", [*BEFORE, 1, 2, 3, 4, 5], None)
    cached = {name: ask(name, prompt, "a") for name, prompt in prompts.items()}
    never = ask("never", [*BEFORE, 1, 2, 3, 9], "a")
    beside = ask("beside", prompts["once"], "b")
    again = ask("again", [*BEFORE, *CALL, 7, 8, 9], "a")
    found = run(rig, {"a": prompts["twice"]}, max_tokens=1)
    rig.close()
    assert (base, cached, never) == (0, {"once": 16, "twice": 0, "first": 0}, 20)
    assert beside == 16, "only what stands before the invocation"
    assert again == 20, "its own blocks as well"
    assert "a" in found
    tuned = with_adapter(tiny_llama_dir, folder)
    for name, prompt in prompts.items():
        check_greedy(tuned, prompt, rig.tokens(name))
    check_greedy(with_adapter(tiny_llama_dir, other), prompts["once"], rig.tokens("beside"))
    check_greedy(with_adapter(tiny_llama_dir, None), [*BEFORE, 1, 2, 3, 9], rig.tokens("never"))
