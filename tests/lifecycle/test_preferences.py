"""Learning from preferences: what a row may be, the loss against its formula, and a training from file to adapter."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.base import load_base
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.progress import Progress, ignore
from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig
from manylora.lifecycle.train.train import encode, prepare, train
from manylora.lifecycle.train.training import Trainer
from tests.lifecycle.helpers import tiny_config, write_rows
from tests.lifecycle.trl_dpo import RECORDED, as_trl, set_weights

BETA = 0.3


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(asked: str, wanted: str, rejected: str, **more: Any) -> dict[str, Any]:
    """A row as OpenAI has it."""
    question = {"messages": [{"role": "user", "content": asked}], **more}
    return {"input": question, "preferred_output": said(wanted), "non_preferred_output": said(rejected)}


ROWS = [pair(f"say {word}", f"{word} it is", "no" * (1 + n % 3)) for n, word in enumerate(("one", "two", "six", "ten"))]


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> TrainConfig:
    data = write_rows(tmp_path / "train.jsonl", ROWS)
    plain = tiny_config(data, tmp_path / "out" / "polite", tiny_llama_dir)
    return replace(plain, method="dpo", beta=BETA, eval_data=write_rows(tmp_path / "eval.jsonl", ROWS[:2]))


def trainer_of(config: TrainConfig) -> Trainer:
    base = load_base(config.base, device="cpu", dtype="float32")
    data = encode(config, read_dataset(config.data), None, ignore)
    return prepare(config, base, data)


def log_p(model: Any, one: Encoded) -> torch.Tensor:
    """Of the answer's tokens, one after the other, by the model's own forward pass on this text alone."""
    ids = torch.tensor([one.ids])
    scores = model(ids).logits.float().log_softmax(-1)[0, :-1]
    picked = scores.gather(1, ids[0, 1:, None])[:, 0]
    found: torch.Tensor = picked[torch.tensor(one.is_answer[1:])].sum()
    return found


def by_formula(trainer: Trainer, pairs: list[Encoded], beta: float) -> tuple[torch.Tensor, list[float]]:
    """The published loss, pair by pair, and the margins."""
    losses, margins = [], []
    for one in pairs:
        assert one.rejected is not None
        ours = log_p(trainer.model, one), log_p(trainer.model, one.rejected)
        with torch.no_grad(), trainer.model.disable_adapter():  # type: ignore[operator]
            base = log_p(trainer.model, one), log_p(trainer.model, one.rejected)
        margin = beta * ((ours[0] - base[0]) - (ours[1] - base[1]))
        losses.append(torch.log1p(torch.exp(-margin)))
        margins.append(float(margin.detach()))
    return torch.stack(losses).mean(), margins


def test_rows_of_openai_and_of_trl_are_the_same_preferences(tmp_path: Path) -> None:
    openai = write_rows(tmp_path / "a.jsonl", [pair("hi", "hello", "what")])
    texts = write_rows(tmp_path / "b.jsonl", [{"prompt": "hi", "chosen": "hello", "rejected": "what"}])
    asked = [{"role": "user", "content": "hi"}]
    chats = write_rows(tmp_path / "c.jsonl", [{"prompt": asked, "chosen": said("hello"), "rejected": said("what")}])
    found = [read_dataset(path) for path in (openai, texts, chats)]
    assert {dataset.shape for dataset in found} == {"preference"}
    assert found[0].examples == found[1].examples == found[2].examples
    [example] = found[0].examples
    assert example.rejected is not None
    assert (example.answer, example.rejected.content) == ("hello", "what")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (pair("hi", "same", "same"), "nothing is preferred"),
        (pair("hi", " ", "what"), r"preferred_output\[0\] is empty"),
        ({**pair("hi", "a", "b"), "input": {"messages": []}}, "a list of at least one"),
        ({**pair("hi", "a", "b"), "input": {"messages": said("x")}}, "must not be the assistant's"),
        ({**pair("hi", "a", "b"), "preferred_output": said("a") * 2}, "a list of one message"),
        (
            {**pair("hi", "a", "b"), "non_preferred_output": [{"role": "user", "content": "b"}]},
            "must be the assistant's",
        ),
        ({**pair("hi", "a", "b"), "preferred_output": None}, "missing preferred_output"),
        (pair("hi", "a", "b", tools=[{}]), r"tools\[0\] must be"),
    ],
)
def test_a_faulty_preference_is_named_by_its_row(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"row 2: .*{fault}"):
        read_dataset(write_rows(tmp_path / "a.jsonl", [ROWS[0], row]))


def test_the_loss_and_its_gradient_are_those_of_the_formula(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    with torch.no_grad():
        for number, parameter in enumerate(trainer.parameters.values()):
            parameter.add_(torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter) * 0.2)
    pairs = list(trainer._train)
    trainer.model.eval()

    found = trainer.objective.summed(pairs)
    wanted, margins = by_formula(trainer, pairs, BETA)

    assert max(map(abs, margins)) > 0.01, "it is not the base any more"
    assert float(found.loss.detach()) / len(pairs) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert found.values["margin"] == pytest.approx(sum(margins), rel=1e-4)
    assert found.values["preferred"] == sum(margin > 0 for margin in margins)
    assert found.num_tokens == sum(one.num_tokens for one in pairs)
    parameters = list(trainer.parameters.values())
    ours = torch.autograd.grad(found.loss / len(pairs), parameters)
    theirs = torch.autograd.grad(wanted, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_loss_and_its_gradient_are_those_of_trl(config: TrainConfig) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    trainer = trainer_of(config)
    pairs = list(trainer._train)
    assert as_trl(pairs) == recorded["pairs"], "it is the same batch"
    set_weights(trainer.model)
    trainer.model.eval()

    found = trainer.objective.summed(pairs)
    torch.autograd.backward(found.loss / len(pairs))

    assert recorded["beta"] == BETA
    assert abs(recorded["margin"]) > 0.1, "it is not the base any more"
    assert float(found.loss.detach()) / len(pairs) == pytest.approx(recorded["loss"], rel=1e-5)
    assert found.values["margin"] / len(pairs) == pytest.approx(recorded["margin"], rel=1e-4)
    lengths = {name: float(p.grad.norm()) for name, p in trainer.parameters.items() if p.grad is not None}
    assert lengths == pytest.approx(recorded["gradient"], rel=1e-3)


def test_training_widens_the_margin_from_nothing_and_goes_on_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, lora=LoraShape(rank=4, dropout=0.1), schedule=Schedule(epochs=8, batch_size=2, lr=5e-3))
    told: list[Progress] = []
    whole = train(replace(config, out=tmp_path / "whole"), listen=told.append)

    steps = [event for event in told if event.stage == "train"]
    assert whole.report["train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-6), "at first it is the base"
    assert steps[0].values["margin"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1].values["eval_margin"] > steps[2].values["eval_margin"]
    assert steps[-1].values["eval_margin"] > 0.1
    assert steps[-1].values["eval_preferred"] == 1.0
    assert whole.report["eval_loss"][-1][1] < whole.report["eval_loss"][0][1] < math.log(2)
    assert "a pair of answers" in (whole.out / "README.md").read_text()

    seen: list[int] = []
    assert not train(config, listen=lambda e: seen.append(e.done), should_stop=lambda: 3 in seen).finished
    resumed = train(config, resume=True)
    assert resumed.report["train_loss"] == whole.report["train_loss"]
    weights = [out / "adapter_model.safetensors" for out in (whole.out, resumed.out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_does_not_go_together_is_refused_before_any_work(config: TrainConfig, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    for wrong, message in (
        (replace(config, data=plain), "`method` dpo learns from rows with two answers"),
        (replace(config, method="supervised"), "`method` supervised learns from one answer"),
        (replace(config, beta=0.0), "`beta` must be positive"),
        (replace(config, lora=LoraShape(init="pissa")), "`init` pissa"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            train(wrong)


def test_both_answers_keep_the_same_prompt_where_it_is_cut(config: TrainConfig, tmp_path: Path) -> None:
    long = pair("word " * 60, "yes", "no, " * 8)
    config = replace(config, data=write_rows(tmp_path / "long.jsonl", [long]), max_length=48)
    [one] = encode(config, read_dataset(config.data), None, ignore).train
    assert one.rejected is not None
    assert one.num_cut == one.rejected.num_cut > 0
    assert one.prompt_ids == one.rejected.prompt_ids
    assert max(len(one), len(one.rejected)) == 48
