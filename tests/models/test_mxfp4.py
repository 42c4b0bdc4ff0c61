"""gpt-oss as it is published: experts in numbers of 4 bits, which loading unpacks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.errors import ModelUnusable
from manylora.models.checkpoint import num_parameters, read_config
from tests.models.front_door import make_adapters, try_model
from tests.models.zoo import make_zoo_model

LEFT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose experts are random bytes and small exponents."""
    made = make_zoo_model("gpt_oss", tmp_path_factory.mktemp("mxfp4") / "base", intermediate_size=64)
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(made / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        experts, inside, outside = weight.shape
        blocks, scales = (experts, outside, inside // 32, 16), (experts, outside, inside // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 126, scales, generator=random, dtype=torch.uint8)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": LEFT}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_served_as_transformers_unpacks_it(folder: Path) -> None:
    outcome = try_model(folder, make_adapters(folder))

    assert outcome.kind == "served", outcome.detail


def test_its_size_is_that_of_the_unpacked_numbers(folder: Path) -> None:
    unpacked = make_zoo_model("gpt_oss", folder.with_name("whole"), intermediate_size=64)
    scales = sum(
        weight.numel() for name, weight in load_file(folder / "model.safetensors").items() if "_scales" in name
    )

    assert num_parameters(folder) == num_parameters(unpacked) + scales


def test_who_writes_weights_again_is_told_that_it_is_quantised(folder: Path) -> None:
    with pytest.raises(ModelUnusable, match="quantised with mxfp4"):
        read_config(folder)


def test_other_ways_to_quantise_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelUnusable, match="quantised with gptq"):
        read_config(tmp_path, to_serve=True)
