"""Adapters on the experts and routers of mixtures, as PEFT writes them now and as transformers 4 had it written."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.errors import InvalidAdapter
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.reader import read
from manylora.lora.memory.packing import KeepAs
from manylora.lora.memory.terms import LowRankExtent
from manylora.models.backends import Backend
from manylora.models.experts import AdaptedExperts
from tests.engine.harness import BACKENDS, TORCH, available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.engine.test_peft_kinds import LONGER, MOST, PROMPT, apart, logits_of, run, spoiled
from tests.models.front_door import try_model
from tests.models.zoo import make_zoo_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")
BASES: Final = ("mixtral", "qwen3_moe")
SETTINGS: Final[Mapping[str, dict[str, Any]]] = {
    "all linear": {"target_modules": "all-linear"},  # of a mixture PEFT makes parameters of it
    "both": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "down": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    "router": {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]},
    "some ranks": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "gate.weight"],
        "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 5},
        "alpha_pattern": {"gate.weight": 9},
    },
    "saved router": {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]},
}
# Which modules were what, before the experts of a layer became one tensor.
SINGLE: Final = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
# The model's own code computes a step whose experts no adapter touches.
AS_ON_A_GPU: Final = replace(TORCH, experts=None)

Made = Mapping[str, Path]


def make(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """By PEFT itself, with random numbers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for weight in tuned.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.3)
        tuned.save_pretrained(folder)
    return folder


def make_single(kind: str, base: Path, folder: Path) -> Path:
    """As PEFT wrote it while each expert was modules of its own."""
    block, (gate, up, down) = SINGLE[kind]
    random = torch.Generator().manual_seed(9)
    experts = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model.layers[0].mlp.experts
    count, hidden, inside = experts.num_experts, experts.down_proj.shape[1], experts.down_proj.shape[2]
    tensors = {}

    def add(path: str, width_in: int, width_out: int) -> None:
        name = f"base_model.model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(3, width_in, generator=random) * 0.3
        tensors[f"{name}.lora_B.weight"] = torch.randn(width_out, 3, generator=random) * 0.3

    for owner in (f"layers.{layer}.{block}" for layer in range(2)):
        add(f"{owner}.gate", hidden, count)
        for expert in range(count):
            add(f"{owner}.experts.{expert}.{gate}", hidden, inside)
            add(f"{owner}.experts.{expert}.{up}", hidden, inside)
            add(f"{owner}.experts.{expert}.{down}", inside, hidden)
    folder.mkdir()
    save_file(tensors, folder / TENSOR_FILE, {"format": "pt"})
    config = LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM").to_dict()
    config |= {"target_modules": ["gate", gate, up, down]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=BASES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_zoo_model(request.param, folder / "base")
    made = {name: make(base, folder / str(n), n, **each) for n, (name, each) in enumerate(SETTINGS.items())}
    return base, {**made, "single experts": make_single(request.param, base, folder / "single")}


@pytest.mark.parametrize("kernel", available_kernels[-1:])
def test_adapters_on_experts_answer_together_as_in_peft(kernel: str, mixture: tuple[Path, Made]) -> None:
    """With the base, while prompts are cut into pieces and blocks run out, and again over cached prefixes."""
    base, made = mixture
    rig = build_rig(load(base), made, kernel=kernel, num_blocks=24, max_num_batched_tokens=48, max_num_seqs=16)
    rig.bring_in()
    for name, folder in made.items():
        assert read(folder, rig.wrapped.modules, max_rank=8, max_size=2**24).kind == "lora", name
    prompts: dict[str | None, list[int]] = {name: LONGER if n % 2 else PROMPT for n, name in enumerate(made)}
    found = run(rig, {None: PROMPT, **prompts}, max_tokens=10)
    run(rig, prompts, max_tokens=10)
    preemptions = rig.scheduler.num_preemptions
    rig.close()
    assert preemptions > 0
    assert apart(found["None"], logits_of(base, None, PROMPT)) < MOST
    for name, folder in made.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = with_adapter(base, folder)
        with torch.inference_mode():
            wanted = tuned(torch.tensor([prompts[name]])).logits[0]
        assert apart(found[name], wanted) < MOST, name
        assert float((logits_of(base, None, prompts[name]) - wanted).abs().max() / wanted.std()) > 10 * MOST, name
        tokens = rig.tokens(name)
        check_greedy(tuned, prompts[name], tokens[:10])
        assert tokens[:10] == tokens[10:], name


def test_a_backends_products_take_the_place_of_the_models_weights(mixture: tuple[Path, Made]) -> None:
    for kernel, is_replaced in ((TORCH, True), (AS_ON_A_GPU, False)):
        rig = build_rig(load(mixture[0]), kernel=kernel)
        experts = [module for module in rig.wrapped.model.modules() if isinstance(module, AdaptedExperts)]
        rig.close()
        assert [each.base.down_proj is None for each in experts] == [is_replaced] * 2


def test_experts_with_biases_and_weights_the_other_way_round_are_adapted_as_in_peft(tmp_path: Path) -> None:
    base = make_zoo_model("gpt_oss", tmp_path / "base")
    names = ["experts.gate_up_proj", "experts.down_proj", "mlp.router.weight"]
    made = make(base, tmp_path / "tuned", 3, target_modules=["v_proj"], target_parameters=names)

    outcome = try_model(base, {"tuned": made})

    assert outcome.kind == "served", outcome.detail


@pytest.mark.parametrize("kernel", [AS_ON_A_GPU, available_kernels[-1]], ids=["as on a GPU", "best"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.03), (torch.int8, 0.2)])
def test_experts_kept_in_fewer_bits_answer_nearly_alike(
    dtype: torch.dtype, most: float, kernel: str | Backend, mixture: tuple[Path, Made]
) -> None:
    base, made = mixture
    adapters = {name: made[name] for name in ("both", "single experts")}
    rig = build_rig(load(base), adapters, kernel=kernel, num_blocks=100, keep_as=KeepAs(torch.float32, dtype))
    alone = run(rig, {None: PROMPT}, max_tokens=1)
    found = run(rig, dict.fromkeys(adapters, PROMPT), max_tokens=1)
    rig.close()
    assert apart(alone["None"], logits_of(base, None, PROMPT)) < MOST
    for name, folder in adapters.items():
        wanted = logits_of(base, folder, PROMPT)
        assert float((torch.from_numpy(found[name]) - wanted).square().mean().sqrt() / wanted.std()) < most, name


@pytest.mark.parametrize("kernel", available_kernels)
def test_numbers_of_experts_that_are_not_finite_stay_in_their_own_rows(kernel: str, mixture: tuple[Path, Made]) -> None:
    """To the last bit with the C++ kernels; torch's products depend on how many rows there are of an expert."""
    base, made = mixture
    names = ["both", "down", "router", "single experts"]
    rig = build_rig(load(base), {name: made[name] for name in names}, kernel=kernel, num_blocks=100)
    rig.bring_in()
    prompts: dict[str | None, list[int]] = {None: PROMPT, **dict.fromkeys(names, PROMPT)}
    clean = run(rig, prompts, max_tokens=1, tenant="clean")
    for name in ("both", "router"):
        with spoiled(rig, name, LowRankExtent):
            beside = run(rig, prompts, max_tokens=1, tenant=name)
        assert np.isnan(beside[name]).any()
        for other in {"None", *names} - {name}:
            if rig.is_exact:
                assert beside[other].tobytes() == clean[other].tobytes(), (other, name)
            assert np.abs(beside[other] - clean[other]).max() < 1e-3, (other, name)
    rig.close()


@pytest.mark.skipif("fused" not in BACKENDS, reason="the C++ kernels are not installed")
def test_rows_of_a_mixture_are_the_same_to_the_last_bit_alone_and_beside_others(mixture: tuple[Path, Made]) -> None:
    """Of the base, of adapters of every kind and of a mix, in prompts cut into pieces and in decode steps."""
    base, made = mixture
    used: dict[str, str | dict[str, float] | None] = {
        "base": None, **{name: name for name in made}, "mix": {"both": 0.7, "down": -0.4, "router": 0.5}
    }  # fmt: skip

    def answers(names: list[str]) -> dict[str, tuple[bytes, list[int]]]:
        rig = build_rig(load(base), made, kernel="fused", num_blocks=400, max_num_batched_tokens=48)
        rig.bring_in()
        for name in names:
            seq = rig.add(name, LONGER, used[name], max_tokens=6)
            seq.capture_logits = seq.wants_prompt_logits = True
        found: dict[str, list[bytes]] = {name: [] for name in names}
        while rig.engine.has_work:
            for output in rig.step():
                if output.captured is not None:
                    found[output.seq.request_id].append(output.captured.tobytes())
        rig.close()
        return {name: (b"".join(found[name]), rig.tokens(name)) for name in names}

    together = answers(list(used))
    for name in used:
        assert answers([name])[name] == together[name], name


def test_single_experts_that_cannot_be_converted_are_refused_with_the_reason(tmp_path: Path) -> None:
    base = make_zoo_model("mixtral", tmp_path / "base")
    folder = make_single("mixtral", base, tmp_path / "adapter")
    rig = build_rig(load(base))
    rig.close()

    def problem() -> str:
        with pytest.raises(InvalidAdapter) as caught:
            read(folder, rig.wrapped.modules, max_rank=8, max_size=2**24)
        return caught.value.problems[0].message

    whole = load_file(folder / TENSOR_FILE)
    save_file({k: v for k, v in whole.items() if "experts.2.w3" not in k}, folder / TENSOR_FILE, {"format": "pt"})
    assert "all or none" in problem()
    save_file(whole, folder / TENSOR_FILE, {"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "rank_pattern": {"w1": 2}}))
    assert "save it again" in problem()
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "r": 4}))
    assert "Expert 0" in problem()


@pytest.mark.parametrize("kernel", available_kernels[-1:])
def test_a_mix_on_experts_and_routers_moves_each_weight_by_the_sum(kernel: str, mixture: tuple[Path, Made]) -> None:
    """PEFT merges one adapter into a copy of the base at a time, and the differences are added up."""
    base, made = mixture
    mix = {"both": 0.7, "down": -0.4, "router": 0.5}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, weight in mix.items():
            merged = with_adapter(base, made[part]).merge_and_unload().state_dict()
            for name, value in model.state_dict().items():
                value += weight * (merged[name] - state[name])
        wanted = model(torch.tensor([PROMPT])).logits[0]
    rig = build_rig(load(base), {name: made[name] for name in mix}, kernel=kernel)
    seq = rig.add("mix", PROMPT, mix, max_tokens=1)
    seq.capture_logits = seq.wants_prompt_logits = True
    rig.run()
    found = next(output.captured for output in rig.outputs["mix/0"] if output.captured is not None)
    rig.close()
    assert apart(found, wanted) < MOST
