"""Adapters on the experts of models that compute these in a way of their own, beside others and broken ones.

That each is PEFT's in float32 is shown with every type of model (`tests/models/test_zoo.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.errors import InvalidAdapter
from manylora.identity import TENSOR_FILE
from manylora.kernels.batch import ForwardContext
from manylora.lora.format.reader import read
from manylora.lora.memory.packing import KeepAs
from manylora.lora.memory.terms import LowRankExtent
from manylora.models.backends import Backend
from manylora.models.mixtures import holders
from manylora.models.own_experts import BatchedExperts, BatchedHolder
from tests.engine.harness import BACKENDS, available_kernels, build_rig, load
from tests.engine.test_experts import AS_ON_A_GPU
from tests.engine.test_peft_kinds import LONGER, MOST, PROMPT, apart, logits_of, run, spoiled
from tests.models.front_door import expert_parameters
from tests.models.zoo import make_zoo_model
from tests.tiny_adapters import make_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")
BASES: Final = ("llama4_text", "longcat_flash", "jetmoe")

Made = Mapping[str, Path]


@pytest.fixture(scope="module", params=BASES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """A base, an adapter on all that its experts and routers have, and one on the first of these with another rank."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_zoo_model(request.param, folder / "base")
    names = expert_parameters(AutoModelForCausalLM.from_pretrained(base))
    return base, {
        "all": make_adapter(base, folder / "all", rank=2, targets=[], target_parameters=names, seed=1),
        "one": make_adapter(base, folder / "one", rank=3, targets=[], target_parameters=names[:1], seed=2),
        "attention": make_adapter(base, folder / "attention", rank=4, targets=["v_proj", "kv_proj", "o_proj"], seed=3),
    }  # fmt: skip


@pytest.mark.parametrize("kernel", [*available_kernels, AS_ON_A_GPU], ids=[*available_kernels, "as on a GPU"])
def test_numbers_that_are_not_finite_stay_in_their_own_rows(kernel: str | Backend, mixture: tuple[Path, Made]) -> None:
    """To the last bit with the C++ kernels, in prompts cut into pieces."""
    base, made = mixture
    prompts: dict[str | None, list[int]] = {None: LONGER, **dict.fromkeys(made, LONGER)}
    rig = build_rig(load(base), made, kernel=kernel, num_blocks=200)
    rig.bring_in()
    clean = run(rig, prompts, max_tokens=1, tenant="clean")
    with spoiled(rig, "all", LowRankExtent):
        beside = run(rig, prompts, max_tokens=1, tenant="spoiled")
    rig.close()
    assert apart(clean["one"], logits_of(base, made["one"], LONGER)) < MOST
    assert apart(clean["all"], logits_of(base, made["all"], LONGER)) < MOST
    assert np.isnan(beside["all"]).any()
    for name in ("None", "one", "attention"):
        if rig.is_exact and kernel is not AS_ON_A_GPU:
            assert beside[name].tobytes() == clean[name].tobytes(), name
        assert np.abs(beside[name] - clean[name]).max() < 1e-3, name


@pytest.mark.skipif("fused" not in BACKENDS, reason="the C++ kernels are not installed")
def test_a_mix_and_an_adapter_are_the_same_to_the_last_bit_alone_and_beside_others(
    mixture: tuple[Path, Made],
) -> None:
    base, made = mixture
    used: dict[str, str | dict[str, float] | None] = {
        "base": None, **{name: name for name in made}, "mix": {"all": 0.7, "one": -0.4}
    }  # fmt: skip
    rig = build_rig(load(base), made, kernel="fused", num_blocks=200)
    rig.bring_in()

    def answers(names: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name in names:
            seq = rig.add(name, PROMPT, used[name], tenant=f"{len(names)}", max_tokens=3)
            seq.capture_logits = seq.wants_prompt_logits = True
        while rig.engine.has_work:
            found |= {out.seq.request_id: out.captured.tobytes() for out in rig.step() if out.captured is not None}
        return found

    together = answers(list(used))
    for name in used:
        assert answers([name]) == {name: together[name]}, name
        tokens = rig.tokens(name)
        assert tokens[:3] == tokens[3:], name
    rig.close()


def test_adapters_in_8_bits_answer_nearly_alike(mixture: tuple[Path, Made]) -> None:
    base, made = mixture
    rig = build_rig(load(base), made, kernel=available_kernels[-1], keep_as=KeepAs(torch.float32, torch.int8))
    found = run(rig, {"all": PROMPT}, max_tokens=1)["all"]
    rig.close()
    wanted = logits_of(base, made["all"], PROMPT)
    assert float((torch.from_numpy(found) - wanted).square().mean().sqrt() / wanted.std()) < 0.2


def test_tensors_that_are_not_as_peft_writes_them_for_llama4_are_refused(tmp_path: Path) -> None:
    """PEFT's A is on the side of the output there."""
    base = make_zoo_model("llama4_text", tmp_path / "base")
    names = ["experts.gate_up_proj"]
    folder = make_adapter(base, tmp_path / "adapter", rank=2, targets=[], target_parameters=names)
    rig = build_rig(load(base))
    rig.close()
    tensors = load_file(folder / TENSOR_FILE)
    a, b = sorted(tensors)
    for changed in ({a: tensors[b].T.contiguous(), b: tensors[a].T.contiguous()}, {a: tensors[a][:, 1:].contiguous()}):
        save_file({**tensors, **changed}, folder / TENSOR_FILE, {"format": "pt"})
        with pytest.raises(InvalidAdapter) as caught:
            read(folder, rig.wrapped.modules, max_rank=8, max_size=2**24)
        assert "PEFT's A ends in 96 and its B begins with 32" in caught.value.problems[0].message


def test_rows_that_no_expert_of_llama4_takes_come_out_as_zeros(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_zoo_model("llama4_text", tmp_path / "base"))
    holder = next(iter(holders(model)))
    assert isinstance(holder, BatchedHolder)
    ours = holder.replacement({}, ForwardContext())
    assert isinstance(ours, BatchedExperts)
    nothing = torch.zeros(holder.num_experts * 3, next(iter(holder.specs())).in_features)
    assert torch.equal(ours.compute(nothing, None), nothing)
    assert torch.equal(holder.base(nothing), nothing)
