"""A training goes on from an adapter: from its very weights, in its shape, and only from what can be gone on from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manylora.errors import InvalidRequest
from manylora.lifecycle.base import load_base
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.progress import ignore
from manylora.lifecycle.train.config import LoraShape, TrainConfig
from manylora.lifecycle.train.start import going_on
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
        (replace(config, start=other(r=2)), "does not fit this base"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            train(wrong)
