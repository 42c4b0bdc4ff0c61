import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.evaluate.evaluate import deserves_promotion
from manylora.lifecycle.evaluate.scores import Comparison
from manylora.lifecycle.progress import Progress
from tests.lifecycle.helpers import label_rows, with_a_token_more, write_rows
from tests.tiny_adapters import make_adapter


@pytest.fixture
def request_(tmp_path: Path, tiny_llama_dir: Path) -> EvaluateRequest:
    data = write_rows(tmp_path / "test.jsonl", label_rows()[::3])
    adapters = [str(make_adapter(tiny_llama_dir, tmp_path / f"a{i}", seed=i, strength=2.0)) for i in (1, 2)]
    return EvaluateRequest(
        data, tuple(adapters), with_base=True, model=str(tiny_llama_dir), max_tokens=6, max_length=128,
        device="cpu", dtype="float32", out=tmp_path / "scores",
    )  # fmt: skip


def _oracle_answer(model_dir: Path, adapter: Path | None, text: str) -> tuple[str, float]:
    """The greedy answer and the likelihood of "tool", by transformers and PEFT one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    answer = [*tokenizer("tool")["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    nll = -sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
    return tokenizer.decode(out, skip_special_tokens=True), nll


def test_each_contender_gives_its_own_answers_and_likelihoods(
    request_: EvaluateRequest, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "one.jsonl", [{"text": "my saw", "label": "tool"}])

    report, _ = run_evaluation(replace(request_, data=data))

    for name, folder in (("base", None), ("a1", tmp_path / "a1"), ("a2", tmp_path / "a2")):
        answer, nll = _oracle_answer(tiny_llama_dir, folder, "my saw")
        num_tokens = len(AutoTokenizer.from_pretrained(tiny_llama_dir)("tool")["input_ids"]) + 1
        assert report["contenders"][name]["answers"] == [answer]
        assert report["contenders"][name]["perplexity"]["value"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-3)


def test_report_has_scores_tests_and_confusion_pictures(request_: EvaluateRequest) -> None:
    report, _ = run_evaluation(request_)

    assert request_.out is not None
    assert json.loads((request_.out / "evaluate.json").read_text()) == report
    names = sorted(p.name for p in request_.out.iterdir())
    assert names == ["confusion-a1.png", "confusion-a2.png", "confusion-base.png", "evaluate.json"]
    assert report["reference"] == "base"
    assert set(report["contenders"]["a1"]["against_reference"]) == {
        "accuracy", "macro_precision", "macro_recall", "macro_f1", "perplexity",
    }  # fmt: skip
    assert sum(map(sum, report["contenders"]["a1"]["confusion"])) == report["num_examples"]


def test_same_seed_gives_the_same_report(request_: EvaluateRequest) -> None:
    assert run_evaluation(replace(request_, out=None)) == run_evaluation(replace(request_, out=None))


def test_interrupted_evaluation_goes_on_with_what_is_left(request_: EvaluateRequest) -> None:
    stages: list[str] = []

    def interrupt(event: Progress) -> None:
        if event.stage == "a1: answers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_evaluation(request_, interrupt)
    with pytest.raises(InvalidRequest, match="interrupted evaluation"):
        run_evaluation(request_)
    with pytest.raises(InvalidRequest, match="other data or settings"):
        run_evaluation(replace(request_, max_tokens=3, resume=True))
    resumed, _ = run_evaluation(replace(request_, resume=True), lambda e: stages.append(e.stage))
    whole, _ = run_evaluation(replace(request_, out=None))

    assert resumed == whole
    assert "a1: answers" in stages
    assert not [stage for stage in stages if stage.startswith("base")]
    assert request_.out is not None
    assert sorted(p.name for p in request_.out.parent.iterdir() if p.name.startswith(".")) == []


def test_right_answers_longer_than_may_be_given_are_warned_of(request_: EvaluateRequest) -> None:
    events: list[Progress] = []

    run_evaluation(replace(request_, max_tokens=2, out=None), events.append)

    warned = [e.message for e in events if e.stage == "warning"]
    assert warned == ["11 right answers are longer than `max_tokens` 2: they cannot be given."]


def test_prompt_that_leaves_no_room_for_an_answer_is_refused(request_: EvaluateRequest) -> None:
    with pytest.raises(InvalidRequest, match=r"The prompt of row \d+ has \d+ tokens; with `max_tokens` 500"):
        run_evaluation(replace(request_, max_tokens=500))


def test_adapter_that_answers_nan_is_named(request_: EvaluateRequest) -> None:
    weights = Path(request_.adapters[0]) / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(math.nan)
    save_file(tensors, weights, metadata={"format": "pt"})

    with pytest.raises(ManyloraError, match=r"a1 gives no finite likelihood for row \d+"):
        run_evaluation(replace(request_, metrics=("perplexity",)))
    assert request_.out is not None
    assert not request_.out.exists()


def test_two_folders_of_one_name_are_told_apart(
    request_: EvaluateRequest, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    twin = make_adapter(tiny_llama_dir, tmp_path / "elsewhere" / "a1", seed=5)

    report, _ = run_evaluation(replace(request_, adapters=(request_.adapters[0], str(twin)), with_base=False))

    assert list(report["contenders"]) == ["a1", "a1-2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": (), "with_base": False}, "Nothing to evaluate"),
        ({"metrics": ("bleu",)}, "'bleu' is not one of"),
        ({"metrics": ("valid_json",)}, "valid_json"),
        ({"max_tokens": 0}, "`max_tokens` must be positive"),
        ({"promote_if_better": "accuracy"}, "give `server`"),
        ({"promote_if_better": "accuracy", "server": "http://x", "adapters": ("a",)}, "must name its version"),
        ({"promote_if_better": "valid_json", "server": "http://x"}, "must be one of the metrics computed"),
        ({"promote_if_better": "accuracy", "server": "http://x", "min_gain": -1.0}, "`min_gain` must not be negative"),
        ({"promote_if_better": "accuracy", "server": "http://x", "adapters": ()}, "needs a candidate"),
        ({"seed": -1}, "`seed` must be"),
        ({"max_length": 0}, "`max_length` must be positive"),
        ({"resume": True, "out": None}, "give `out`"),
        ({"adapters": ("/no/such/folder",)}, "is not an adapter in PEFT layout"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    request_: EvaluateRequest, change: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        run_evaluation(replace(request_, model="/no/such/model", **change))  # type: ignore[arg-type]


def test_label_metrics_need_labels(request_: EvaluateRequest, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])

    with pytest.raises(InvalidRequest, match="accuracy needs rows of text and label"):
        run_evaluation(replace(request_, data=data, metrics=("accuracy",)))


@pytest.mark.parametrize(
    ("gain", "p", "deserved"), [(0.1, 0.01, True), (0.1, 0.2, False), (0.04, 0.01, False), (-0.1, 0.001, False)]
)
def test_promotion_needs_the_gain_and_the_evidence(gain: float, p: float, deserved: bool) -> None:
    assert deserves_promotion(Comparison("accuracy", gain, p), min_gain=0.05) is deserved
    assert not deserves_promotion(Comparison("accuracy", 0.0, 0.001), min_gain=0.0)


def test_a_token_that_the_model_has_no_embedding_for_is_refused_with_its_row(
    request_: EvaluateRequest, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    base = with_a_token_more(tiny_llama_dir, tmp_path / "base")
    data = write_rows(tmp_path / "bad.jsonl", [*label_rows()[:2], {"text": "<extra>", "label": "fruit"}])

    with pytest.raises(InvalidRequest, match="row 3 has the token"):
        run_evaluation(replace(request_, data=data, model=str(base)))
