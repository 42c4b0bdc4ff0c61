"""Models from before transformers' attention interface, in the forms that their configs allow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as build_bloom_alibi
from transformers.models.falcon import modeling_falcon

from manylora.errors import ModelUnusable
from manylora.models.wrapping import wrap
from tests.engine.harness import TORCH
from tests.models.front_door import answer_all, make_adapters, prompts, try_model
from tests.models.zoo import WINDOW, make_zoo_model


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}),
        ("falcon", {"multi_query": False, "num_kv_heads": 4}),
        ("falcon", {"alibi": True}),
        ("bloom", {"n_head": 6, "hidden_size": 48}),  # heads of which the slopes come from two sequences
        ("mpt", {"n_heads": 6, "d_model": 48}),
    ],
    ids=str,
)
def test_every_form_is_served_as_in_peft(model_type: str, form: dict[str, Any], tmp_path: Path) -> None:
    folder = make_zoo_model(model_type, tmp_path / "base", **form)

    outcome = try_model(folder, make_adapters(folder))

    assert outcome.kind == "served", outcome.detail


def test_alibi_of_falcon_is_exact_where_transformers_rounds_positions_to_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form: dict[str, Any] = {"alibi": True, "num_attention_heads": 32, "hidden_size": 64, "max_position_embeddings": 512}
    folder = make_zoo_model("falcon", tmp_path / "base", **form)
    asked = prompts(lengths=(400,))
    with pytest.raises(ModelUnusable, match="computes attention that this server does not reproduce"):
        answer_all(folder, {}, asked)  # in float32, where that shows
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits() -> torch.Tensor:
        """Of transformers, at positions that bfloat16 does not have."""
        with torch.no_grad():
            found: torch.Tensor = model(torch.tensor(asked)).logits[0, 257:]
        return found

    rounded = logits()
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", build_bloom_alibi)
    exact = logits()
    found = answer_all(folder, {}, asked)[None, 0].logits[257:]
    assert float((found - exact).square().mean().sqrt() / exact.std()) < 1e-4
    assert float((found - rounded).square().mean().sqrt() / exact.std()) > 1e-3


def test_only_what_a_position_may_see_is_kept_of_local_layers_and_keys_are_not_repeated(tmp_path: Path) -> None:
    local = AutoModelForCausalLM.from_pretrained(make_zoo_model("gpt_neo", tmp_path / "neo")).eval()
    assert [each.window for each in wrap(local, TORCH).survey.options] == [0, WINDOW]

    form: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}
    grouped = AutoModelForCausalLM.from_pretrained(make_zoo_model("falcon", tmp_path / "falcon", **form)).eval()
    assert {each.num_heads for each in wrap(grouped, TORCH).survey.kv_shapes} == {2}
