"""What the untouched model tells of itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from manylora.models.survey import survey
from tests.tiny_models import ARCHITECTURES, make_tiny_model


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_is_the_embedding_too_is_replaced_like_every_other(
    architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    """The embedding reads its own weight, which no linear has to be kept for: a head costs a fifth of a small model."""
    folder = make_tiny_model(architecture, tmp_path / "model", tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = survey(model, 64)
    assert model.get_output_embeddings() is not None
    assert found.kept == set()


def test_a_head_whose_weight_the_model_reads_by_itself_is_kept(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama", tmp_path / "model", tie_word_embeddings=True))

    weight = model.get_input_embeddings().weight

    def read(*_: object) -> None:
        torch.nn.functional.embedding(torch.tensor([0]), weight)

    model.model.norm.register_forward_pre_hook(read)
    assert survey(model, 64).kept == {"lm_head"}
