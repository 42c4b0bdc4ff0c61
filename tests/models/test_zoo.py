"""Every causal language model type of transformers as a tiny random model: served and equal, or refused with a reason.

`zoo.json` says which; docs/models.md is written from it. All types take minutes, so most of them are marked slow.
"""

import json
import warnings
from pathlib import Path

import pytest
import transformers

from tests.models.front_door import Outcome, try_type
from tests.models.zoo import MODEL_TYPES

TABLE = json.loads((Path(__file__).parent / "zoo.json").read_text(encoding="utf-8"))
TYPES: dict[str, dict[str, str]] = TABLE["types"]
# One of each kind: usual layers, windows in the mask, own linears, experts, two sizes of head, sinks, MLA, recurrent.
ALWAYS = ("llama", "qwen2_moe", "phimoe", "mixtral", "gemma2", "opt", "gpt_oss", "deepseek_v3", "jamba", "whisper")
is_same_version = transformers.__version__ == TABLE["transformers"]


def params() -> list[object]:
    known = [name for name in MODEL_TYPES if name in TYPES]
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in known]


@pytest.mark.parametrize("model_type", params())
def test_a_type_is_served_as_in_peft_or_refused_with_the_reason_in_the_table(model_type: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that transformers has not brought up to date
        outcome = try_type(model_type, tmp_path)

    assert outcome.kind in {"served", "refused", "not built"}, outcome.detail
    expected = TYPES[model_type]
    if is_same_version:
        assert outcome == Outcome(expected["outcome"], expected["reason"])
    else:  # another version may build a model otherwise, and then it is refused or served as well
        assert "\n" not in outcome.detail


@pytest.mark.skipif(not is_same_version, reason="the table is of another version of transformers")
def test_the_table_has_every_type() -> None:
    assert set(TYPES) == set(MODEL_TYPES), "run `python scripts/document_models.py --try`"


def test_the_table_knows_three_outcomes_and_says_why() -> None:
    assert {each["outcome"] for each in TYPES.values()} == {"served", "refused", "not built"}
    assert all(bool(each["reason"]) == (each["outcome"] != "served") for each in TYPES.values())
    assert sum(each["outcome"] == "served" for each in TYPES.values()) >= 80
