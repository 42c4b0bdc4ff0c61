"""What one tenant's requests cost does not depend on what another has asked: counted in tokens run, never in time."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.engine.interface import SamplingParams
from manylora.engine.sequence import Sequence
from tests.engine.harness import Rig, build_rig, load
from tests.tiny_adapters import make_adapter

NUM_TOKENS = 6
MAX_STEP_TOKENS = 16


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llama_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def rigs(tiny_llama_dir: Path, adapter: Path) -> Iterator[list[Rig]]:
    made = [
        build_rig(load(tiny_llama_dir), {"tuned": adapter}, num_blocks=400, max_num_batched_tokens=MAX_STEP_TOKENS)
        for _ in range(2)
    ]
    yield made
    for rig in made:
        rig.close()


def ask(rig: Rig, tenant: str, prompt: list[int], adapter: str | None, salt: str | None) -> Sequence:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    ref = rig.refs[adapter] if adapter else None
    seq = Sequence("r", list(prompt), params, adapter=ref, tenant=tenant, cache_salt=salt)
    rig.engine.add(seq)
    return seq


def cost(rig: Rig, seq: Sequence) -> tuple[int, int, int]:
    """Run it alone: tokens taken from the cache, tokens run and steps taken until its first token."""
    tokens_run = num_steps = 0
    while not seq.num_output_tokens:
        before = seq.num_computed
        rig.step()
        tokens_run += seq.num_computed - before
        num_steps += rig.engine.made_progress
    cached = seq.num_cached_tokens
    rig.run()
    return cached, tokens_run - cached, num_steps


@pytest.mark.parametrize("adapter_name", [None, "tuned"])
def test_tokens_run_for_a_tenant_do_not_depend_on_anothers_prompts(rigs: list[Rig], adapter_name: str | None) -> None:
    """Its very prompts, and its answers too, cost the second what they would cost it on a server of its own."""
    beside, alone = rigs
    chance = random.Random(1)
    first = [chance.randrange(300) for _ in range(40)]
    asked = [first, first[:33], [*first[:20], *(chance.randrange(300) for _ in range(30))]]
    heard = [ask(beside, "acme", prompt, adapter_name, None) for prompt in asked]
    beside.run()
    for prompt in [*(seq.tokens for seq in heard), *asked, first]:
        costs = [cost(rig, ask(rig, "rival", prompt, adapter_name, None)) for rig in (beside, alone)]
        assert costs[0] == costs[1]
    again = cost(beside, ask(beside, "acme", first, adapter_name, None))
    assert again[0] >= 36, "what was not to be seen was there"


def test_a_salt_of_one_tenant_opens_nothing_to_those_who_do_not_know_it(rigs: list[Rig]) -> None:
    beside, alone = rigs
    prompt = list(range(40))
    for salt in (None, "theirs"):
        ask(beside, "acme", prompt, None, salt)
    beside.run()
    for salt in (None, "other"):
        costs = [cost(rig, ask(rig, "rival", prompt, None, salt)) for rig in (beside, alone)]
        assert costs[0] == costs[1]
    assert cost(beside, ask(beside, "rival", prompt, None, "theirs"))[0] == 36
