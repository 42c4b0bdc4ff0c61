"""Of a vision-language model the text part alone is there, and adapters on the rest are refused by name."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from manylora.engine.build import EngineBuilder
from manylora.errors import InvalidAdapter
from manylora.lora.format.reader import read
from manylora.models.loading import load_base
from manylora.models.offered import modules_of
from manylora.models.text_part import put_aside
from tests.models.front_door import settings_for
from tests.models.zoo import make_zoo_model
from tests.tiny_adapters import make_adapter
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo_model("mistral3", tmp_path_factory.mktemp("sees") / "base", sees=True)


@pytest.fixture(scope="module")
def builder(folder: Path) -> EngineBuilder:
    return EngineBuilder(settings_for(folder), load_base(settings_for(folder)))


def test_towers_are_taken_out_and_the_paths_of_the_text_part_stay(builder: EngineBuilder) -> None:
    assert {name for name, _ in builder.base.model.model.named_children()} == {"language_model"}
    assert all(path.startswith(("model.language_model.", "lm_head")) for path in builder.modules)


def test_an_adapter_on_the_vision_part_is_refused_by_name(folder: Path, builder: EngineBuilder, tmp_path: Path) -> None:
    targets = ["q_proj", "multi_modal_projector.linear_1"]
    made = make_adapter(folder, tmp_path / "tuned", targets=targets, auto=AutoModelForImageTextToText)
    with pytest.raises(InvalidAdapter, match="multi_modal_projector"):
        read(made, builder.modules, max_rank=64, max_size=2**30)


def test_what_is_checked_without_a_server_is_what_a_server_takes(folder: Path, builder: EngineBuilder) -> None:
    assert modules_of(str(folder)).keys() == builder.modules.keys()


def test_a_model_of_text_keeps_all_its_parts(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama", tmp_path / "model"))
    assert put_aside(model) == []


def test_a_part_that_is_asked_for_something_stays(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama", tmp_path / "model"))
    model.beside, model.needed = nn.Linear(2, 2), nn.Linear(2, 2)
    assert put_aside(model) == ["beside", "needed"]
    model.beside, model.needed = nn.Linear(2, 2), nn.Linear(2, 2)
    model.model.norm.register_forward_hook(lambda _module, _args, out: out + torch.ones(()) * model.needed.bias.numel())
    assert put_aside(model) == []
    assert isinstance(model.beside, nn.Linear)
