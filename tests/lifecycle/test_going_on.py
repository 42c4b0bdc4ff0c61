"""A training goes on from an adapter: from its very weights, in its shape, and only from what can be gone on from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import plain_config
from manylora.lifecycle.base import load_base, quiet_peft
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.progress import ignore
from manylora.lifecycle.train.config import LoraShape, TrainConfig
from manylora.lifecycle.train.start import going_on, started
from manylora.lifecycle.train.train import encode, prepare, train
from tests.lifecycle.helpers import label_rows, tiny_config, write_rows


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> TrainConfig:
    """A training that has ended, with the adapter in its `out`."""
    folder = tmp_path_factory.mktemp("first")
    rows = label_rows()
    data, held_out = write_rows(folder / "a.jsonl", rows), write_rows(folder / "b.jsonl", rows[::5])
    shape = LoraShape(rank=4, alpha=6.0, targets=("q_proj", "down_proj"), rslora=True)
    config = replace(tiny_config(data, folder / "out", tiny_llama_dir), lora=shape, eval_data=held_out)
    train(config)
    return config


def test_it_begins_where_the_other_ended_and_comes_further(first: TrainConfig, tmp_path: Path) -> None:
    config = replace(first, lora=LoraShape(dropout=0.1), start=first.out, out=tmp_path / "on")
    base = load_base(config.base, device="cpu", dtype="float32")
    shaped = going_on(config)
    held_out = read_dataset(first.eval_data) if first.eval_data else None
    trainer = prepare(shaped, base, encode(shaped, read_dataset(first.data), held_out, ignore))
    before = load_file(first.out / "adapter_model.safetensors")
    found = {name.replace(".default", ""): value for name, value in trainer.parameters.items()}
    assert before.keys() == found.keys()
    assert all(torch.equal(before[name].float(), found[name]) for name in before)
    start = trainer.evaluation_loss(trainer._held_out)

    report = train(config).report

    assert report["best_eval_loss"] < start
    lora = report["settings"]["lora"]
    assert (lora["rank"], lora["alpha"], lora["targets"], lora["rslora"], lora["dropout"]) == (
        4, 6.0, ("down_proj", "q_proj"), True, 0.1,
    )  # fmt: skip
    old, new = (json.loads((out / "adapter_config.json").read_text()) for out in (first.out, config.out))
    assert {**old, "lora_dropout": 0.1} == {**new, "lora_dropout": 0.1}
    assert before.keys() == load_file(config.out / "adapter_model.safetensors").keys()


def test_an_interrupted_one_goes_on_bit_for_bit_and_not_from_another_adapter(
    first: TrainConfig, tmp_path: Path
) -> None:
    config = replace(first, lora=LoraShape(), start=first.out, out=tmp_path / "on")
    whole = train(replace(config, out=tmp_path / "whole"))
    steps: list[int] = []
    assert not train(config, listen=lambda e: steps.append(e.done), should_stop=lambda: 3 in steps).finished
    with pytest.raises(InvalidRequest, match="used other data or settings"):
        train(replace(config, start=whole.out), resume=True)
    resumed = train(config, resume=True)
    weights = [out / "adapter_model.safetensors" for out in (whole.out, resumed.out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_cannot_be_gone_on_from_is_refused_before_any_work(first: TrainConfig, tmp_path: Path) -> None:
    config = replace(first, lora=LoraShape(), start=first.out, out=tmp_path / "on")
    told = json.loads((first.out / "adapter_config.json").read_text())

    def other(**changes: object) -> Path:
        folder = tmp_path / "-".join(changes)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(told | changes))
        (folder / "adapter_model.safetensors").write_bytes((first.out / "adapter_model.safetensors").read_bytes())
        return folder

    for wrong, message in (
        (replace(config, lora=LoraShape(rank=2)), "`start` brings the shape"),
        (replace(config, method="dpo"), "`method` dpo"),
        (replace(config, start=tmp_path / "nothing"), "no low-rank adapter in PEFT layout"),
        (replace(config, start=other(peft_type="IA3")), "IA3"),
        (replace(config, start=other(init_lora_weights="pissa")), "pissa"),
        (replace(config, start=other(modules_to_save=["lm_head"])), "modules_to_save"),
        (replace(config, start=other(task_type="SEQ_CLS")), "task_type SEQ_CLS"),
        (replace(config, start=other(bias="all")), "bias all"),
        (replace(config, start=other(lora_alpha=None)), "no low-rank adapter in PEFT layout"),
        (replace(config, start=other(r=2)), "does not fit this base"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            train(wrong)


ENDLESS = "(?:(?:[a-z0-9._]+)+)+q_proj"  # which `re` tries on most modules' names for years


def test_no_pattern_of_an_adapter_is_run_and_its_tensors_say_what_is_trained(
    first: TrainConfig, tmp_path: Path
) -> None:
    told = json.loads((first.out / "adapter_config.json").read_text())
    weights = load_file(first.out / "adapter_model.safetensors")
    one = {name: value for name, value in weights.items() if ".layers.0." in name and ".q_proj." in name}
    assert len(one) == 2
    cases: list[tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]] = [
        ({"target_modules": ENDLESS}, weights, ["down_proj", "q_proj"]),
        ({"exclude_modules": ENDLESS}, weights, ["down_proj", "q_proj"]),
        ({"layers_to_transform": [0], "layers_pattern": [ENDLESS]}, one, ["model.layers.0.self_attn.q_proj"]),
    ]
    for number, (changes, tensors, targets) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**told, **changes}))
        save_file(tensors, folder / "adapter_model.safetensors")
        with quiet_peft():
            model = started(load_base(first.base, device="cpu", dtype="float32").model, folder, 0.0)
        found = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(tensors[name].float(), found[name]) for name in tensors)
        written = plain_config(model.peft_config["default"], "tiny")
        assert written["target_modules"] == targets
        assert not written.keys() & {"exclude_modules", "layers_to_transform", "layers_pattern"}


@pytest.mark.parametrize("change", ["another base's", "nothing's"])
def test_tensors_that_are_on_no_module_are_refused(first: TrainConfig, tmp_path: Path, change: str) -> None:
    weights = load_file(first.out / "adapter_model.safetensors")
    renamed = {name.replace(".layers.", ".blocks."): value for name, value in weights.items()}
    (tmp_path / "adapter_config.json").write_bytes((first.out / "adapter_config.json").read_bytes())
    tensors = renamed if change == "another base's" else {"x": torch.ones(1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidRequest, match=r"there is no module for|none of its tensors"):
        train(replace(first, lora=LoraShape(), start=tmp_path, out=tmp_path / "on"))
