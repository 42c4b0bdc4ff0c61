"""The adapters in `cases/`: what they are, and that their cards say what the recipes make."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.recipes.cases import CASES, Case, case_commands
from manylora.lifecycle.recipes.recipe import write_splits
from manylora.lifecycle.tasks.tags import spans

ROOT = Path(__file__).parents[3]


def card(case: Case) -> str:
    return (ROOT / case.home / "README.md").read_text(encoding="utf-8")


def figure(case: Case, said: str) -> tuple[float, float | None]:
    """What the card says of a score held out, of the adapter and of the base."""
    found = re.search(rf"\| Held-out {re.escape(said)} \| ([\d.]+)(?: of \d+)?(?:; base ([\d.]+))? \|", card(case))
    assert found, said
    return float(found[1]), None if found[2] is None else float(found[2])


def test_every_case_is_shipped_and_nothing_else() -> None:
    homes = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "cases").glob("*/*/adapter_config.json"))
    assert homes == sorted(case.home for case in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_a_card_prints_the_commands_and_the_folder_is_what_they_train(name: str) -> None:
    case = CASES[name]
    text, config = card(case), json.loads((ROOT / case.home / "adapter_config.json").read_text())
    assert "\n".join(case_commands(case)) in text
    assert f"Licence: {case.licence}." in text
    assert case.asked in text
    flags = dict(zip(case.flags[::2], case.flags[1::2], strict=True))
    assert config["r"] == int(flags["--rank"]) <= 8
    assert sorted(config["target_modules"]) == sorted(flags["--targets"].split(","))
    assert config["base_model_name_or_path"] == case.base
    assert sum(path.stat().st_size for path in (ROOT / case.home).iterdir()) < 600_000


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_makes_the_rows_that_the_adapter_was_trained_on(name: str, tmp_path: Path) -> None:
    write_splits(CASES[name].make(0, None), tmp_path / "data")
    digest = hashlib.sha256((tmp_path / "data" / "train.jsonl").read_bytes()).hexdigest()
    assert f"| Data's SHA-256 | `{digest}` |" in card(CASES[name])


def names_of(name: str, split: str) -> list[str]:
    """What a row's answer is about: the words of a city or a person, or a review's last three words."""
    rows = getattr(CASES[name].make(0, None), split)
    if name == "tone-en":
        return [" ".join(row["text"].removesuffix(", that is all.").rstrip(".").split()[-3:]) for row in rows]
    return [" ".join(row["tokens"][a:b]) for row in rows for _, a, b in spans(row["tags"])]


def test_no_row_of_a_test_is_learnt_and_its_people_and_films_are_new() -> None:
    for name in CASES:
        splits = CASES[name].make(0, None)
        known = [json.dumps(row, sort_keys=True) for row in (*splits.train, *splits.valid)]
        assert not set(known) & {json.dumps(row, sort_keys=True) for row in splits.test}, name
    records = CASES["records-en"].make(0, None)
    assert not {row["context"] for row in records.train} & {row["context"] for row in records.test}
    for row in (*records.train, *records.test):
        assert row["context"].startswith(row["answer"], row["start"])
    for name in ("tone-en", "cities-en"):
        assert not set(names_of(name, "train")) & set(names_of(name, "test")), name
    tastes = CASES["taste-ada"].make(0, None)
    learnt, scored = (
        {row[side] for row in rows for side in ("positive", "negative")} for rows in (tastes.train, tastes.test)
    )
    assert not learnt & scored
    assert not {row["positive"] for row in tastes.test} & {row["negative"] for row in tastes.test}


def test_adapters_do_better_than_the_base_where_it_does_the_task_and_well_where_not() -> None:
    ours, base = figure(CASES["taste-ada"], "nDCG of the first ten")
    assert base is not None
    assert ours > base + 0.2
    assert figure(CASES["records-en"], "exact answers")[0] > 0.75
    assert figure(CASES["tone-en"], "accuracy")[0] > 0.9
    assert figure(CASES["cities-en"], "F1 of spans")[0] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_shipped_adapter_scores_what_its_card_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write_splits(case.make(0, None), tmp_path / "data")
    flags = dict(zip(case.flags[::2], case.flags[1::2], strict=True))
    request = EvaluateRequest(
        data=tmp_path / "data" / "test.jsonl",
        adapters=(str(ROOT / case.home),),
        task=case.task,
        model=case.base,
        max_length=int(flags.get("--max-length", 1024)),
        dtype="float32",
        device="cpu",
    )
    report, _ = run_evaluation(request)
    said = {"question": ("exact_match", "exact answers"), "classify": ("accuracy", "accuracy"),
            "token": ("span_f1", "F1 of spans"), "embed": ("ndcg_10", "nDCG of the first ten")}[case.task]  # fmt: skip
    assert report["contenders"][name][said[0]]["value"] == pytest.approx(figure(case, said[1])[0], abs=0.006)
