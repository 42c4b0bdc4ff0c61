"""Adapters kept in a narrower type than the model: exact for what that type holds, else off by its rounding only."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.engine.build import EngineBuilder
from manylora.engine.interface import AdapterRef
from manylora.kernels.weights import FORMATS
from manylora.lora.format.reader import read_trusted
from manylora.lora.memory.packing import KeepAs
from manylora.lora.memory.terms import NumberFormat
from manylora.metrics import Metrics
from manylora.models.loading import load_base
from manylora.models.wrapping import adaptable_modules
from manylora.settings import load_settings
from tests.engine.harness import available_kernels, build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model

RANKS = (4, 8, 5, 64)
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79], list(range(7, 47)), [271]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def on_grid(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix that int8 keeps as it is: in each rank whole steps of a power of two, the largest one 127."""
    rows = weight if len(weight) == rank else weight.T
    step = 2.0 ** torch.floor(torch.log2(rows.abs().amax(dim=1, keepdim=True) / 127))
    whole = (rows / step).round().clamp(-127, 127)
    whole[:, 0] = 127
    return ((whole * step) if len(weight) == rank else (whole * step).T).contiguous()


def representable(folder: Path, dtype: torch.dtype, rank: int) -> Path:
    """Change the adapter into one that loses nothing in `dtype`."""
    file = folder / "adapter_model.safetensors"
    exact = {name: on_grid(w, rank) if dtype == torch.int8 else w.to(dtype) for name, w in load_file(file).items()}
    save_file(exact, file)
    return folder


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_what_the_type_holds_is_served_as_peft_serves_it(
    kernel: str, dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    adapters = {
        f"a{rank}": representable(make_adapter(llama, tmp_path / f"a{rank}", rank=rank, seed=rank), dtype, rank)
        for rank in RANKS
    }
    rig = build_rig(load(llama), adapters, kernel=kernel, num_blocks=400, keep_as=KeepAs(torch.float32, dtype))
    for name in (*adapters, None):
        for number, prompt in enumerate(PROMPTS):
            rig.add(f"{name}-{number}", prompt, name)
    rig.run()
    rig.close()
    for name in (*adapters, None):
        oracle = with_adapter(llama, adapters[name] if name else None)
        for number, prompt in enumerate(PROMPTS):
            check_greedy(oracle, prompt, rig.tokens(f"{name}-{number}"))


@pytest.mark.parametrize("kernel", available_kernels)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.02), (torch.int8, 0.05)], ids=str)
def test_what_the_type_rounds_moves_logits_by_little(
    kernel: str, dtype: torch.dtype, most: float, llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", rank=16)

    def logprobs(kept: torch.dtype, name: str | None) -> torch.Tensor:
        rig = build_rig(load(llama), {"a": adapter}, kernel=kernel, keep_as=KeepAs(torch.float32, kept))
        rig.add("r", PROMPTS[1], name, max_tokens=1, prompt_logprobs=0)
        rig.run()
        rig.close()
        known = rig.outputs["r/0"][0].delta.prompt_logprobs
        return torch.tensor([each.logprob for each in known if each.logprob is not None])

    exact, rounded, base = logprobs(torch.float32, "a"), logprobs(dtype, "a"), logprobs(dtype, None)
    moved = (rounded - exact).abs().max()
    assert 0 < moved < most * (base - exact).abs().max()


@pytest.mark.parametrize("kernel", available_kernels)
def test_adapters_of_narrow_and_wide_files_share_a_batch(kernel: str, llama: Path, tmp_path: Path) -> None:
    """With scalings that no narrow type holds, which is why they are kept beside the matrices."""
    kinds = {"whole": torch.float32, "brain": torch.bfloat16, "half": torch.float16}
    adapters = {
        name: representable(make_adapter(llama, tmp_path / name, rank=12, alpha=7, seed=seed), kind, 12)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    keep = KeepAs(torch.float32, torch.float32, if_narrower=True)
    rig = build_rig(load(llama), adapters, kernel=kernel, num_blocks=400, keep_as=keep)
    for number, name in enumerate((*adapters, None, *adapters)):
        rig.add(f"r{number}", PROMPTS[number % 3], name)
    while any(f"r{number}/0" not in rig.outputs for number in range(7)):
        rig.step()
    slabs = [slab.data.dtype for slab in rig.tiers.memory.slabs.values()]
    assert sorted(slabs, key=str) == [torch.bfloat16, torch.float16, torch.float32]
    rig.run()
    rig.close()
    for number, name in enumerate((*adapters, None, *adapters)):
        oracle = with_adapter(llama, adapters[name] if name else None)
        check_greedy(oracle, PROMPTS[number % 3], rig.tokens(f"r{number}"))


F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8


@pytest.mark.parametrize(
    ("asked", "model", "base", "mixes", "kept"),
    [
        # files in                                       F32   BF16  F16
        ("auto", F32, "none", True, {F32: F32, BF16: BF16, F16: F16}),
        ("auto", F32, "none", False, {F32: F32, BF16: F32, F16: F32}),
        ("auto", F32, "int8", True, {F32: BF16, BF16: BF16, F16: BF16}),
        ("auto", BF16, "none", True, {F32: BF16, BF16: BF16, F16: BF16}),
        ("auto", F16, "int8", True, {F32: F16, BF16: F16, F16: F16}),
        ("int8", F32, "none", True, {F32: I8, BF16: I8, F16: I8}),
        ("float32", BF16, "none", True, {F32: F32, BF16: F32, F16: F32}),
        ("bfloat16", F32, "none", False, {F32: BF16, BF16: BF16, F16: BF16}),
    ],
)
def test_what_the_setting_means(
    asked: NumberFormat,
    model: torch.dtype,
    base: str,
    mixes: bool,
    kept: dict[torch.dtype, torch.dtype],
    llama: Path,
    tmp_path: Path,
) -> None:
    keep = KeepAs.choose(asked, model, beside=FORMATS[base].beside(model), mixes_dtypes=mixes)
    modules = adaptable_modules(load(llama))
    for files, expected in kept.items():
        folder = tmp_path / str(files)
        representable(make_adapter(llama, folder, rank=4, targets=["q_proj"]), files, 4)
        assert keep.dtype_of(read_trusted(folder, modules)) == expected, files
        assert keep.has_scales(expected) == (expected != model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, F32), ({"lora_dtype": "int8"}, I8), ({"lora_dtype": "float16", "kernels": "torch"}, F16)],
    ids=str,
)
def test_the_server_keeps_adapters_as_its_setting_says(
    options: dict[str, str], expected: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    settings = load_settings(
        model=str(llama), data_dir=tmp_path / "data", device="cpu", dtype="float32", kv_cache_memory=2**24,
        adapter_memory=2**26, **options
    )  # fmt: skip
    _, tiers = EngineBuilder(settings, load_base(settings)).build_core(Folder(adapter), Metrics())
    ref = AdapterRef("id", "public", "a", 1, "digest")
    for _ in range(3000):
        if tiers.acquire(ref) is not None:
            break
        time.sleep(0.01)
    assert [slab.data.dtype for slab in tiers.memory.slabs.values()] == [expected]
    tiers.release(ref)
    tiers.close()


@dataclass
class Folder:
    """One adapter, straight from its folder."""

    path: Path

    def local_folder(self, ref: AdapterRef) -> Path:
        return self.path
