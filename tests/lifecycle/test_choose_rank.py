import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.data.encoding import Encoder
from manylora.lifecycle.progress import Progress
from manylora.lifecycle.train.choose_rank import Candidate, choose_rank, one_standard_error, split_folds
from manylora.lifecycle.train.config import ChooseConfig, LoraShape
from tests.conftest import ModelMaker
from tests.lifecycle.helpers import label_rows, tiny_config, write_rows
from tests.tiny_models import make_tokenizer


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> ChooseConfig:
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    return ChooseConfig(tiny_config(data, tmp_path / "out" / "words", tiny_llama_dir, epochs=1), ranks=(2, 1), folds=2)


def _candidate(rank: int, size: int, *losses: float) -> Candidate:
    return Candidate(LoraShape(rank=rank), size, losses)


def test_smallest_within_one_standard_error_of_the_best_is_chosen() -> None:
    small, middle, large = (
        _candidate(1, 10, 0.9, 0.9, 0.9),
        _candidate(2, 20, 0.55, 0.55, 0.55),
        _candidate(4, 40, 0.4, 0.5, 0.6),  # mean 0.5, standard error 0.058
    )

    assert one_standard_error([small, middle, large]) is middle
    assert large.standard_error == pytest.approx(0.1 / 3**0.5)
    assert one_standard_error([small, replace(middle, losses=(0.56, 0.56, 0.56)), large]) is large


def test_folds_share_out_every_example_once_and_every_label(tmp_path: Path) -> None:
    dataset = read_dataset(write_rows(tmp_path / "a.jsonl", label_rows()))
    encoded = Encoder(make_tokenizer(), max_length=256).encode(dataset, context_length=512)

    folds = split_folds(encoded, 4, seed=0)

    assert sorted(np.concatenate(folds).tolist()) == list(range(len(encoded)))
    for fold in folds:
        assert sorted({encoded[i].example.label for i in fold}, key=str) == ["fruit", "tool"]


def test_table_plot_and_final_adapter_are_written(config: ChooseConfig) -> None:
    report, trained = choose_rank(replace(config, train_final=True))

    assert report is not None
    assert [c["rank"] for c in report["candidates"]] == [1, 2]
    assert [c["size_bytes"] for c in report["candidates"]][1] == 2 * report["candidates"][0]["size_bytes"]
    assert all(len(c["losses"]) == 2 for c in report["candidates"])
    out = config.training.out
    folder = out.parent / f"{out.name}.ranks"
    assert json.loads((folder / "ranks.json").read_text()) == report
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert trained is not None
    assert json.loads((out / "adapter_config.json").read_text())["r"] == report["chosen"]["rank"]


def test_sets_of_targets_are_compared_too(config: ChooseConfig) -> None:
    report, _ = choose_rank(replace(config, ranks=(1,), targets=(("q_proj",), ("q_proj", "down_proj"))))

    assert report is not None
    assert [c["targets"] for c in report["candidates"]] == [["q_proj"], ["q_proj", "down_proj"]]


def test_interrupted_search_resumes_to_the_same_table(config: ChooseConfig) -> None:
    calls: list[int] = []

    def stop_in_the_third_fold() -> bool:
        calls.append(1)
        return len(calls) > 5

    assert choose_rank(config, should_stop=stop_in_the_third_fold) == (None, None)
    with pytest.raises(InvalidRequest, match="interrupted search"):
        choose_rank(config)
    resumed, _ = choose_rank(config, resume=True)
    whole, _ = choose_rank(config, overwrite=True)

    assert resumed == whole


def test_interrupted_final_training_resumes_with_the_same_choice(config: ChooseConfig, tmp_path: Path) -> None:
    config = replace(config, ranks=(1, 2), train_final=True)
    steps: list[str] = []

    first, trained = choose_rank(
        config, listen=lambda e: steps.append(e.stage), should_stop=lambda: steps.count("train") == 2
    )
    assert first is not None
    assert trained is not None
    assert not trained.finished
    with pytest.raises(InvalidRequest, match="exists"):
        choose_rank(config)
    steps.clear()
    resumed, finished = choose_rank(config, resume=True, listen=lambda e: steps.append(e.stage))

    assert resumed == first
    assert finished is not None
    assert finished.finished
    assert steps.count("train") == finished.report["steps"] - 2
    assert sorted(p.name for p in config.training.out.parent.iterdir()) == ["words", "words.ranks", "words.report"]


def test_search_on_another_base_is_not_gone_on_with(config: ChooseConfig, tiny_model_dir: ModelMaker) -> None:
    calls = iter(range(100))
    choose_rank(config, should_stop=lambda: next(calls) > 5)
    other = replace(config, training=replace(config.training, base=str(tiny_model_dir("qwen2"))))

    with pytest.raises(InvalidRequest, match="other data or settings"):
        choose_rank(other, resume=True)


def test_bad_training_settings_are_refused_before_the_model_is_looked_for(config: ChooseConfig) -> None:
    training = replace(config.training, base="/no/such/model", schedule=replace(config.training.schedule, epochs=0))

    with pytest.raises(InvalidRequest, match="`epochs` must be positive"):
        choose_rank(replace(config, training=training))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": ()}, "`ranks` must be"),
        ({"ranks": (0, 1)}, "`ranks` must be"),
        ({"ranks": (2, 2)}, "`ranks` must be"),
        ({"folds": 1}, "`folds` must be at least 2"),
        ({"folds": 17}, "needs that many examples"),
    ],
)
def test_bad_arguments_are_refused(config: ChooseConfig, change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        choose_rank(replace(config, **change))  # type: ignore[arg-type]


def test_a_search_in_which_nothing_was_learnt_says_so(config: ChooseConfig) -> None:
    def searched(lr: float) -> tuple[float, list[str]]:
        events: list[Progress] = []
        schedule = replace(config.training.schedule, lr=lr)
        report, _ = choose_rank(
            replace(config, training=replace(config.training, schedule=schedule)), overwrite=True, listen=events.append
        )
        assert report is not None
        return report["base_loss"], [event.message for event in events if event.stage == "warning"]

    base_loss, warnings = searched(1e-9)
    again, none = searched(2e-2)

    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"Nothing was learnt that holds for rows held out: the bare base's loss is {base_loss:.4f}"
    )
    assert (again, none) == (base_loss, [])
