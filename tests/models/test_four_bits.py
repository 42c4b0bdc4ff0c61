"""GPTQ and AWQ checkpoints: their weights come out as they stand for, and an int4 base has their own integers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.errors import ModelUnusable
from manylora.kernels.weights import pack_int4
from manylora.models.four_bits import _ONES, _gptq
from manylora.models.loading import load_base, resolve_model
from tests.models.test_loading import edit, settings

GROUP = 32


def words(integers: torch.Tensor) -> torch.Tensor:
    """[rows, columns * 8] from 0 to 15 -> int32 [rows, columns], the first one lowest."""
    shifted = integers.view(len(integers), -1, 8).long() << torch.arange(0, 32, 4)
    return shifted.sum(dim=2).to(torch.uint32).view(torch.int32)


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers [in, out], zero points and scales [groups, out] of a weight [out, in]."""
    columns = weight.T.float().reshape(-1, GROUP, len(weight))
    low, high = columns.aminmax(dim=1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    integers = (columns / scales[:, None].float() + zeros[:, None]).round().clamp(0, 15)
    return integers.flatten(0, 1), zeros, scales


def gptq(weight: torch.Tensor, *, order: torch.Tensor | None = None, added: int = _ONES) -> dict[str, torch.Tensor]:
    """`order`: in which inputs are put into groups. `added`: what each word of zero points is stored less."""
    inputs = torch.arange(weight.shape[1]) if order is None else order
    integers, zeros, scales = rounded(weight[:, inputs])
    own = torch.empty_like(integers)
    own[inputs] = integers
    group = torch.empty(len(inputs), dtype=torch.int32)
    group[inputs] = (torch.arange(len(inputs)) // GROUP).int()
    return {"qweight": words(own.T).T, "qzeros": words(zeros) - added, "scales": scales, "g_idx": group}


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    integers, zeros, scales = rounded(weight)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def shuffled(values: torch.Tensor) -> torch.Tensor:
        return words(values.view(len(values), -1, 8)[:, :, order].flatten(1))

    return {"qweight": shuffled(integers), "qzeros": shuffled(zeros), "scales": scales}


def wanted(weight: torch.Tensor) -> torch.Tensor:
    integers, zeros, scales = rounded(weight)
    groups = torch.arange(len(integers)) // GROUP
    return ((integers - zeros[groups]) * scales[groups].float()).T


METHODS: dict[str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], dict[str, object]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}),
    "gptq_v2": (
        lambda weight: gptq(weight, added=0),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack_checkpoint(source: Path, folder: Path, method: str) -> dict[str, torch.Tensor]:
    """A packed copy of a checkpoint, in two files that share the parts of its weights. Returns these as they were."""
    shutil.copytree(source, folder)
    pack, said = METHODS[method]
    whole: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in whole.items():
        if name.endswith("_proj.weight"):
            for number, (part, packed) in enumerate(pack(tensor).items()):
                files[number % 2][f"{name.removesuffix('weight')}{part}"] = packed.contiguous()
        else:
            files[0][name] = tensor
    index: dict[str, str] = {}
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    edit(folder / "config.json", quantization_config={**said, "group_size": GROUP})
    return whole


@pytest.mark.parametrize("method", list(METHODS))
def test_packed_weights_come_out_as_they_stand_for(
    method: str, tiny_llama_dir: Path, tmp_path: Path, cache: Path
) -> None:
    whole = pack_checkpoint(tiny_llama_dir, tmp_path / "packed", method)

    base = load_base(settings(tmp_path / "packed"))

    assert base.name == "packed"
    assert base.folder.is_relative_to(cache)
    found = base.model.state_dict()
    for name, weight in whole.items():
        is_packed = name.endswith("_proj.weight")
        expected = wanted(weight).half() if is_packed else weight
        torch.testing.assert_close(found[name].float(), expected.float(), rtol=0, atol=0)
        if is_packed:
            torch.testing.assert_close(pack_int4(found[name]).dequantised(), found[name].float(), rtol=2e-3, atol=2e-3)
    assert resolve_model(str(tmp_path / "packed")) == base.folder


def test_inputs_may_stand_in_any_groups(tiny_llama_dir: Path, tmp_path: Path, cache: Path) -> None:
    weight, order = torch.randn(16, 64), torch.randperm(64)
    expected = torch.empty(16, 64)
    expected[:, order] = wanted(weight[:, order])
    torch.testing.assert_close(_gptq(gptq(weight, order=order), _ONES).float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("added", [0, _ONES])
def test_zero_points_of_0_are_read_and_leave_those_beside_them_as_they_are(added: int) -> None:
    """Wherever in a word they are: its first, between others, some in a row, and its last alone."""
    zeros = torch.tensor([[0, 8, 15, 0, 0, 1, 7, 0], [9, 3, 15, 1, 8, 14, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    integers = torch.arange(3 * GROUP)[:, None].expand(-1, 8) % 16
    parts = {"qweight": words(integers.T).T, "qzeros": words(zeros) - added, "scales": torch.ones(3, 8)}

    assert torch.equal(_gptq(parts, added), (integers - zeros.repeat_interleave(GROUP, dim=0)).T.float())
    assert _gptq(parts, added).max() == 15


def test_a_zero_point_of_0_is_stored_as_15() -> None:
    """Of GPTQ's first format, in the last place of a word: as all who write it have it."""
    parts = {"qweight": words(torch.full((8, 8), 5)).T, "qzeros": torch.tensor([[-0x8888889]], dtype=torch.int32)}
    assert int(parts["qzeros"]) & 0xFFFFFFFF == 0xF7777777

    found = _gptq({**parts, "scales": torch.ones(1, 8)}, _ONES)

    assert found[:, 0].tolist() == [5 - 8] * 7 + [5]


def test_what_is_damaged_is_said_with_the_module(tiny_llama_dir: Path, tmp_path: Path, cache: Path) -> None:
    pack_checkpoint(tiny_llama_dir, tmp_path / "packed", "gptq")
    path = tmp_path / "packed" / "part-0.safetensors"
    tensors = load_file(path)
    name = next(each for each in tensors if each.endswith("q_proj.scales"))
    save_file(tensors | {name: tensors[name][:, :-8].contiguous()}, path, metadata={"format": "pt"})

    with pytest.raises(ModelUnusable, match=r"packed weight of model\.layers\.0\.self_attn\.q_proj"):
        load_base(settings(tmp_path / "packed"))
    assert not any((cache / "manylora" / "models").glob("four-bits-*/config.json"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "says that it is quantised with gptq, and has no packed weights"),
        ({"quant_method": "gptq", "bits": 8}, "quantised with gptq, which is not supported"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantised with awq, which is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes, which is not supported"),
    ],
)
def test_other_ways_are_refused(
    said: dict[str, object], reason: str, tiny_llama_dir: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    edit(tmp_path / "base" / "config.json", quantization_config=said)
    with pytest.raises(ModelUnusable, match=reason):
        load_base(settings(tmp_path / "base"))
