"""Every causal language model type of transformers as a tiny random model: served and equal, or refused with a reason.

`zoo.json` says which; docs/models.md is written from it. All types take minutes, so most of them are marked slow.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import transformers

from tests.models.front_door import Outcome, try_type
from tests.models.zoo import MODEL_TYPES, VISION_TYPES

TABLE = json.loads((Path(__file__).parent / "zoo.json").read_text(encoding="utf-8"))
TYPES: dict[str, dict[str, str]] = TABLE["types"]
VISION: dict[str, dict[str, str]] = TABLE["vision"]
# One of each kind: usual layers, windows in the mask, own linears, experts, two sizes of head, sinks, MLA, recurrent,
# ALiBi, layers with the same weights, positions behind the padding's.
ALWAYS = (
    "llama",
    "qwen2_moe",
    "phimoe",
    "mixtral",
    "gemma2",
    "opt",
    "gpt_oss",
    "deepseek_v3",
    "jamba",
    "bloom",
    "whisper",
    "zamba",
    "roberta",
)
SEEN_ALWAYS = ("mistral3", "qwen3_vl", "llama4")
is_same_version = transformers.__version__ == TABLE["transformers"]


def params(types: tuple[str, ...], known: Mapping[str, object], always: tuple[str, ...]) -> list[object]:
    return [pytest.param(name, marks=() if name in always else pytest.mark.slow) for name in types if name in known]


@pytest.mark.parametrize("model_type", params(MODEL_TYPES, TYPES, ALWAYS))
def test_a_type_is_served_as_in_peft_or_refused_with_the_reason_in_the_table(model_type: str, tmp_path: Path) -> None:
    check(model_type, TYPES[model_type], tmp_path, sees=False)


@pytest.mark.parametrize("model_type", params(VISION_TYPES, VISION, SEEN_ALWAYS))
def test_the_text_part_of_a_vision_language_model_is_served(model_type: str, tmp_path: Path) -> None:
    check(model_type, VISION[model_type], tmp_path, sees=True)


def check(model_type: str, expected: dict[str, str], folder: Path, *, sees: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that transformers has not brought up to date
        outcome = try_type(model_type, folder, sees=sees)

    assert outcome.kind in {"served", "refused", "not built"}, outcome.detail
    if is_same_version:
        assert outcome == Outcome(expected["outcome"], expected["reason"])
    else:  # another version may build a model otherwise, and then it is refused or served as well
        assert "\n" not in outcome.detail


@pytest.mark.skipif(not is_same_version, reason="the table is of another version of transformers")
def test_the_table_has_every_type() -> None:
    advice = "run `python scripts/document_models.py --try`"
    assert set(TYPES) == set(MODEL_TYPES), advice
    assert set(VISION) == set(VISION_TYPES), advice


def test_the_table_knows_three_outcomes_and_says_why() -> None:
    assert {each["outcome"] for each in TYPES.values()} == {"served", "refused", "not built"}
    assert all(bool(each["reason"]) == (each["outcome"] != "served") for each in (*TYPES.values(), *VISION.values()))
    assert sum(each["outcome"] == "served" for each in TYPES.values()) >= 140
    assert sum(each["outcome"] == "served" for each in VISION.values()) >= 23
