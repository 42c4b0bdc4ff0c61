"""Embeddings through the front door: OpenAI's client, against transformers and PEFT, beside streams."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Server
from tests.tiny_models import make_tokenizer

TEXTS = ["hello", "a longer text, of which every token counts", "naïve 🙂 café " * 12]


def expected(model_dir: Path, adapter: Path | None, how: str) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter).eval()
    rows = []
    for text in TEXTS:
        with torch.inference_mode():
            states = model(torch.tensor([make_tokenizer().encode(text)]), output_hidden_states=True).hidden_states[-1][
                0
            ]
        vector = (states[-1] if how == "last" else states.mean(0)).numpy()
        rows.append(vector / np.linalg.norm(vector))
    return np.array(rows)


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("name", ["tiny", "middle", "large"])
def test_openais_client_gets_the_vectors_of_transformers_and_peft(
    name: str, how: str, server: Server, tiny_llama_dir: Path, adapters_dir: Path
) -> None:
    """The client asks for base64 unless told; both formats are the same numbers."""
    with server.client() as client:
        body = {"pooling": how}
        stream = client.completions.create(model="small", prompt="go on", max_tokens=30, stream=True)
        packed = client.embeddings.create(model=name, input=TEXTS, extra_body=body)
        plain = client.embeddings.create(model=name, input=TEXTS, encoding_format="float", extra_body=body)
        assert len(list(stream)) > 1
    found = np.array([entry.embedding for entry in packed.data])
    wanted = expected(tiny_llama_dir, None if name == "tiny" else adapters_dir / name, how)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(
        found.astype(np.float32), np.array([entry.embedding for entry in plain.data], np.float32)
    )
    assert packed.usage.prompt_tokens == sum(len(make_tokenizer().encode(text)) for text in TEXTS)
