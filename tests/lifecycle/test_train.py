import hashlib
import json
import math
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manylora.errors import InvalidRequest, ManyloraError, NotEnoughMemory
from manylora.lifecycle.base import Base, load_base
from manylora.lifecycle.data.batches import padding_share
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.output import checkpoint_path, report_folder
from manylora.lifecycle.progress import Progress, ignore
from manylora.lifecycle.train import memory
from manylora.lifecycle.train.config import LoraShape, TrainConfig
from manylora.lifecycle.train.memory import least_bytes
from manylora.lifecycle.train.train import _fingerprint, _settings, encode, prepare, train
from manylora.lifecycle.train.training import Trainer
from manylora.lora.format.reader import read
from manylora.models.wrapping import adaptable_modules
from tests.conftest import ModelMaker
from tests.engine.harness import build_rig, load
from tests.engine.oracle import with_adapter
from tests.engine.test_peft_kinds import apart, run
from tests.lifecycle.helpers import label_rows, tiny_config, with_a_token_more, write_rows
from tests.tiny_models import make_tiny_model


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> TrainConfig:
    rows = label_rows()
    data = write_rows(tmp_path / "train.jsonl", rows)
    held_out = write_rows(tmp_path / "eval.jsonl", rows[::5])
    return replace(tiny_config(data, tmp_path / "out" / "words", tiny_llama_dir), eval_data=held_out)


def _listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def _digest(parameters: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parameters)).hexdigest()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return tensors


def _trainer(config: TrainConfig, base: Base, *, with_eval: bool = False) -> Trainer:
    held_out = read_dataset(config.eval_data) if config.eval_data and with_eval else None
    return prepare(config, base, encode(config, read_dataset(config.data), held_out, ignore))


def test_training_lowers_the_loss_and_writes_an_adapter_that_the_server_accepts(config: TrainConfig) -> None:
    result = train(replace(config, schedule=replace(config.schedule, epochs=6)))

    losses = [loss for _, loss in result.report["eval_loss"]]
    assert losses[-1] < losses[0] / 2
    assert _listing(config.out) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    modules = adaptable_modules(load_base(config.base, device="cpu", dtype="float32").model)
    assert read(config.out, modules, max_rank=64, max_size=2**30).rank == 4
    assert _listing(report_folder(config.out)) == ["loss.png", "train.json"]
    assert json.loads((report_folder(config.out) / "train.json").read_text())["steps"] == result.report["steps"]


def test_only_the_low_rank_parameters_change(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    trainer = _trainer(config, base)
    low_rank = list(trainer.parameters.values())
    frozen = [p for p in base.model.parameters() if not any(p is low for low in low_rank)]
    before, low_before = _digest(frozen), [p.detach().clone() for p in low_rank]

    trainer.run(ignore, lambda: False, lambda: None)

    assert _digest(frozen) == before
    assert all(not torch.equal(p, was) for p, was in zip(low_rank, low_before, strict=True))


def test_training_starts_as_the_base(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        bare = base.model(ids).logits
    trainer = _trainer(config, base)

    with torch.inference_mode():
        assert torch.equal(trainer.model(ids).logits, bare)


def test_same_seed_gives_the_same_adapter_and_another_seed_another(config: TrainConfig, tmp_path: Path) -> None:
    outs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        one = replace(config, out=tmp_path / name, schedule=replace(config.schedule, seed=seed))
        outs.append(_weights(train(one).out))

    assert all(torch.equal(outs[0][k], outs[1][k]) for k in outs[0])
    assert any(not torch.equal(outs[0][k], outs[2][k]) for k in outs[0])


def test_interrupted_training_resumes_to_the_uninterrupted_result(config: TrainConfig, tmp_path: Path) -> None:
    """Bit for bit on one CPU thread, dropout included."""
    config = replace(config, lora=LoraShape(rank=4, dropout=0.2))
    whole = train(replace(config, out=tmp_path / "whole"))
    steps: list[int] = []
    first = train(config, listen=lambda e: steps.append(e.done), should_stop=lambda: 3 in steps)

    assert not first.finished
    assert first.report["steps"] == 3
    assert not config.out.exists()
    resumed = train(config, resume=True)

    assert resumed.report["train_loss"] == whole.report["train_loss"]
    assert resumed.report["eval_loss"] == whole.report["eval_loss"]
    wanted, found = _weights(whole.out), _weights(resumed.out)
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert not checkpoint_path(config.out).exists()


def test_resuming_with_other_data_or_settings_is_refused(config: TrainConfig) -> None:
    train(config, should_stop=lambda: True)

    with pytest.raises(InvalidRequest, match="used other data or settings"):
        train(replace(config, schedule=replace(config.schedule, lr=0.5)), resume=True)
    with pytest.raises(InvalidRequest, match=r"interrupted training of this `out` exists"):
        train(config)


def test_resuming_nothing_is_refused(config: TrainConfig) -> None:
    with pytest.raises(InvalidRequest, match="nothing to resume"):
        train(config, resume=True)


def test_early_stop_ends_training_and_keeps_the_best_step(config: TrainConfig) -> None:
    schedule = replace(config.schedule, epochs=40, lr=0.3, warmup=0.0, eval_every=1, early_stop=3)

    report = train(replace(config, schedule=schedule)).report

    losses = dict(report["eval_loss"])
    assert report["steps"] < 40 * 4
    assert report["best_eval_loss"] == min(losses.values()) == losses[report["best_step"]]
    assert report["best_step"] == report["steps"] - 3


def test_kept_weights_are_those_of_the_best_step(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    schedule = replace(config.schedule, epochs=4, lr=0.3, eval_every=1)
    trainer = _trainer(replace(config, schedule=schedule), base, with_eval=True)

    trainer.run(ignore, lambda: False, lambda: None)

    assert trainer.evaluation_loss(trainer._held_out) == pytest.approx(trainer.history.best_loss, rel=1e-5)


def test_accumulated_batches_make_the_step_of_one_large_batch(config: TrainConfig, tmp_path: Path) -> None:
    one = replace(config, schedule=replace(config.schedule, batch_size=8, accumulate=4, epochs=1), eval_data=None)
    reports = []
    for name, schedule in (("a", one.schedule), ("b", replace(one.schedule, batch_size=32, accumulate=1))):
        reports.append(train(replace(one, out=tmp_path / name, schedule=schedule)).report)

    assert [r["steps"] for r in reports] == [1, 1]
    assert reports[0]["train_loss"][0][1] == pytest.approx(reports[1]["train_loss"][0][1], rel=1e-5)


def test_a_training_that_the_machine_cannot_hold_is_refused_before_its_first_step(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    trainer = _trainer(config, base)
    examples = list(trainer._train)
    few, many = (least_bytes(base, examples, replace(config.schedule, batch_size=size), 0) for size in (1, 8))
    longest = max(len(example) for example in examples)
    assert few >= longest * base.model.config.num_hidden_layers * base.model.config.hidden_size * 4
    assert few < many

    told: list[Progress] = []
    monkeypatch.setattr(memory, "free_bytes", lambda _device: few)
    train(replace(config, schedule=replace(config.schedule, epochs=1)), overwrite=True, listen=told.append)
    assert any(event.stage == "warning" and "want of memory" in event.message for event in told)
    monkeypatch.setattr(memory, "total_bytes", lambda _device: few)
    told.clear()
    with pytest.raises(NotEnoughMemory, match=r"at least .* GB beside the base.*`batch_size`"):
        train(config, overwrite=True, listen=told.append)
    assert not any(event.stage in ("plan", "train") for event in told)


def test_learning_rate_rises_then_falls_as_a_cosine(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    schedule = replace(config.schedule, epochs=5, warmup=0.2, lr=1.0)
    trainer = _trainer(replace(config, schedule=schedule), base)

    rates = [trainer.learning_rate(step) for step in range(trainer.num_steps)]

    assert trainer.num_steps == 20
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[12] == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 16)))
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_diverging_training_names_rows_and_leaves_nothing(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    trainer = _trainer(config, base)
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(math.nan)

    with pytest.raises(ManyloraError, match=r"diverged at step 1 \(loss nan\) on rows \d+"):
        trainer.run(ignore, lambda: False, lambda: None)
    assert _listing(config.out.parent) == []


def test_base_that_answers_nan_ends_in_a_clear_message_and_leaves_nothing(config: TrainConfig, tmp_path: Path) -> None:
    broken = make_tiny_model("llama", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ManyloraError, match=r"diverged at step 1 \(loss nan\)"):
        train(replace(config, base=str(broken)))
    assert _listing(config.out.parent) == []


def test_full_disk_is_said_and_leaves_no_half_written_adapter(config: TrainConfig) -> None:
    """A limit on the size of files makes every larger write fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ManyloraError, match="could not be written"):
            train(replace(config, schedule=replace(config.schedule, epochs=1, checkpoint_every=100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _listing(config.out.parent) == []


def test_existing_folder_is_not_replaced_unless_told(config: TrainConfig) -> None:
    config.out.mkdir(parents=True)
    (config.out / "precious.json").write_text("x")

    with pytest.raises(InvalidRequest, match="exists"):
        train(config)
    assert _listing(config.out) == ["precious.json"]
    train(replace(config, schedule=replace(config.schedule, epochs=1)), overwrite=True)
    assert "precious.json" not in _listing(config.out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": LoraShape(rank=0)}, "`rank` must be positive"),
        ({"lora": LoraShape(dropout=1.0)}, "`dropout`"),
        ({"lora": LoraShape(trained_tokens=("nothing_like_it",))}, "'nothing_like_it' is no token"),
        ({"lora": LoraShape(targets=("nothing_like_it",))}, "`targets` nothing_like_it"),
        ({"lr": 30.0}, "`lr` must be at most 1"),
        ({"eval_data": None, "early": 2}, "`early_stop` watches the evaluation loss"),
    ],
)
def test_bad_settings_are_refused(config: TrainConfig, change: dict[str, Any], words: str) -> None:
    change = dict(change)
    schedule = replace(config.schedule, early_stop=change.pop("early", 0), lr=change.pop("lr", 1e-2))
    changed = replace(config, schedule=schedule, **change)

    with pytest.raises(InvalidRequest, match=words):
        train(changed)


def test_bad_data_is_refused_before_the_model_is_looked_for(config: TrainConfig, tmp_path: Path) -> None:
    one_class = write_rows(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])

    with pytest.raises(InvalidRequest, match="only the label"):
        train(replace(config, data=one_class, eval_data=None, base="/no/such/model"))


def test_evaluation_labels_must_be_known(config: TrainConfig, tmp_path: Path) -> None:
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": "a", "label": "animal"}])

    with pytest.raises(InvalidRequest, match="labels that `data` lacks: animal"):
        train(replace(config, eval_data=odd))


def test_lengths_come_first_and_an_estimate_after_three_steps(config: TrainConfig) -> None:
    events: list[Progress] = []

    train(config, listen=events.append)

    told = [e.message for e in events if e.stage in ("labels", "data")]
    assert told[0] == "`data`: labels: fruit 16, tool 16"
    assert told[1].startswith("`data`: 32 examples")
    assert told[2].startswith("`eval_data`: 7 examples")
    stages = list(dict.fromkeys(e.stage for e in events))
    assert stages.index("data") < stages.index("train") < stages.index("estimate")
    steps = [e for e in events if e.stage == "train"]
    assert [("remaining_s" in e.values) for e in steps[:4]] == [False, False, True, True]
    assert steps[-1].done == steps[-1].total


def test_rows_are_checked_with_the_tokenizer_alone_before_any_weights_are_read(
    config: TrainConfig, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (Path(str(config.base)) / name).is_file():
            (tmp_path / "no-weights").mkdir(exist_ok=True)
            shutil.copy(Path(str(config.base)) / name, tmp_path / "no-weights" / name)
    long = write_rows(tmp_path / "long.jsonl", [*label_rows(), {"text": "x" * 900, "label": "tool"}])

    with pytest.raises(InvalidRequest, match="row 33 has"):
        train(replace(config, data=long, base=str(tmp_path / "no-weights")))


def test_cut_prompts_are_warned_of_by_their_rows(config: TrainConfig, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [*label_rows(), {"text": "x" * 200, "label": "tool"}])
    events: list[Progress] = []

    train(replace(config, data=long, eval_data=None), listen=events.append)

    [warning] = [e.message for e in events if e.stage == "warning"]
    assert warning.startswith("`data`: 1 prompts lose up to")
    assert "(rows 33)" in warning


def test_held_out_rows_that_are_learnt_too_are_warned_of(config: TrainConfig) -> None:
    events: list[Progress] = []

    train(config, listen=events.append)

    [warning] = [event for event in events if event.stage == "warning"]
    assert warning.message.startswith("7 of 7 rows of `eval_data` are in `data` too (the first is row 1)")


def test_report_keeps_the_first_estimate_beside_what_it_took(config: TrainConfig) -> None:
    report = train(config).report

    assert report["estimate"]["after_step"] == 3
    assert report["estimate"]["seconds"] > 0
    assert report["seconds"] > 0


def test_batches_of_like_length_pad_less_than_batches_in_order(config: TrainConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (5 + 60 * (i % 2)), "completion": "y"} for i in range(64)]
    data = write_rows(tmp_path / "mixed.jsonl", rows)

    report = train(replace(config, data=data, eval_data=None)).report

    assert report["padding"] < 0.01
    assert padding_share([5, 65] * 32, [list(range(i, i + 8)) for i in range(0, 64, 8)]) > 0.4


def test_divergence_leaves_no_checkpoint_to_go_on_from(config: TrainConfig) -> None:
    train(config, should_stop=lambda: True)
    path = checkpoint_path(config.out)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        state = file.metadata()
    for name in tensors:
        if name.startswith("weight."):
            tensors[name].fill_(math.nan)
    save_file(tensors, path, metadata=state)

    with pytest.raises(ManyloraError, match="diverged"):
        train(config, resume=True)
    assert _listing(config.out.parent) == []


def test_evaluation_loss_that_is_no_number_ends_the_training(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    trainer = _trainer(config, base, with_eval=True)

    def spoil(event: Progress) -> None:
        if event.stage == "evaluate":
            with torch.no_grad():
                next(iter(trainer.parameters.values())).fill_(math.nan)

    with pytest.raises(ManyloraError, match="evaluation loss after step 4 is nan"):
        trainer.run(spoil, lambda: False, lambda: None)


def test_broken_checkpoint_is_said(config: TrainConfig) -> None:
    train(config, should_stop=lambda: True)
    checkpoint_path(config.out).write_bytes(b"x")

    with pytest.raises(InvalidRequest, match=r"cannot be read.*`overwrite`"):
        train(config, resume=True)


@pytest.mark.gpu
def test_interrupted_training_on_cuda_resumes_to_the_same_loss(config: TrainConfig, tmp_path: Path) -> None:
    """Within 1e-3: CUDA's sums have no fixed order."""
    config = replace(config, device="cuda", lora=LoraShape(rank=4, dropout=0.2))
    whole = train(replace(config, out=tmp_path / "whole")).report
    steps: list[int] = []
    train(config, listen=lambda e: steps.append(e.done), should_stop=lambda: 3 in steps)
    resumed = train(config, resume=True).report

    assert whole["device"] == "cuda"
    for (_, again), (_, once) in zip(resumed["train_loss"], whole["train_loss"], strict=True):
        assert again == pytest.approx(once, abs=1e-3)
    assert resumed["eval_loss"][-1][1] == pytest.approx(whole["eval_loss"][-1][1], abs=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gemma3"])
def test_other_architectures_train_too(config: TrainConfig, tiny_model_dir: ModelMaker, architecture: str) -> None:
    report = train(replace(config, base=str(tiny_model_dir(architecture)))).report

    assert report["eval_loss"][-1][1] < report["train_loss"][0][1]


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
        ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"trained_tokens": ("<|im_start|>", "a")}, {"trainable_token_indices": [1, 67]}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_other_kinds_learn_and_are_served_as_they_were_trained(
    shape: dict[str, Any], written: dict[str, Any], config: TrainConfig
) -> None:
    lora = LoraShape(rank=4, **shape)
    schedule = replace(config.schedule, epochs=6, lr_ratio=4.0)
    result = train(replace(config, lora=lora, schedule=schedule))

    losses = [loss for _, loss in result.report["eval_loss"]]
    assert losses[-1] < losses[0] * 0.7
    found = json.loads((config.out / "adapter_config.json").read_text())
    assert {key: found[key] for key in written} == written
    base = Path(config.base or "")
    rig = build_rig(load(base), {"new": config.out})
    logits = run(rig, {"new": [5, 1, 67, 8]}, max_tokens=1)["new"]
    rig.close()
    with torch.inference_mode():
        wanted = with_adapter(base, config.out)(torch.tensor([[5, 1, 67, 8]])).logits[0]
    assert apart(logits, wanted) < 1e-3


def test_b_learns_faster_by_the_ratio(config: TrainConfig) -> None:
    base = load_base(config.base, device="cpu", dtype="float32")
    trainer = _trainer(replace(config, schedule=replace(config.schedule, lr_ratio=16.0)), base)
    trainer._step()
    rates = {group["ratio"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates.keys() == {1.0, 16.0}
    assert rates[16.0] == pytest.approx(16 * rates[1.0])
    of_b = {id(p) for name, p in trainer.parameters.items() if ".lora_B." in name}
    for group in trainer.optimizer.param_groups:
        assert all((id(p) in of_b) == (group["ratio"] == 16.0) for p in group["params"])


def test_a_checkpoint_of_before_there_were_other_kinds_is_gone_on_from(config: TrainConfig) -> None:
    """What a setting that is left alone is called is not in what a checkpoint belongs to."""
    values = _settings(config)
    for part, names in {"lora": ("dora", "init", "trained_tokens"), "schedule": ("lr_ratio",)}.items():
        for name in names:
            del values[part][name]
    for name in ("reading", "tool_prompt", "method", "beta", "start", "task", "test_data"):
        del values[name]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    assert config.eval_data is not None
    digest.update(config.data.read_bytes() + config.eval_data.read_bytes())
    sets = read_dataset(config.data), read_dataset(config.eval_data)
    assert _fingerprint(config, *sets) == digest.hexdigest()
    assert _fingerprint(replace(config, lora=LoraShape(rank=4, dora=True)), *sets) != digest.hexdigest()


def test_rslora_and_alpha_reach_the_config(config: TrainConfig) -> None:
    train(replace(config, lora=LoraShape(rank=2, alpha=6, targets=("q_proj",), rslora=True)))

    written = json.loads((config.out / "adapter_config.json").read_text())
    chosen = [written[key] for key in ("r", "lora_alpha", "use_rslora", "target_modules")]
    assert chosen == [2, 6, True, ["q_proj"]]
    assert written["base_model_name_or_path"] == "tiny-llama"


def test_no_machine_path_gets_into_the_result(config: TrainConfig) -> None:
    train(config)

    for folder in (config.out, report_folder(config.out)):
        for path in folder.iterdir():
            if path.suffix in (".json", ".md"):
                assert str(config.out.parent) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_a_token_that_the_model_has_no_embedding_for_is_refused_with_its_row(
    config: TrainConfig, tmp_path: Path, tiny_llama_dir: Path, where: str
) -> None:
    base = with_a_token_more(tiny_llama_dir, tmp_path / "base")
    rows = [*label_rows()[:4], {"text": "an <extra> apple", "label": "fruit"}, {"text": "my saw", "label": "tool"}]
    changed: dict[str, Any] = {where: write_rows(tmp_path / "bad.jsonl", rows)}
    bad = replace(config, base=str(base), **changed)

    with pytest.raises(
        InvalidRequest, match=r"row 5 has the token \d+, and the model has embeddings for 0 to \d+ only"
    ):
        train(bad)
    assert _listing(config.out.parent) == []
