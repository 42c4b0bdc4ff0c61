"""An adapter whose logits are no numbers behind one token: its request fails and says why, nobody else's does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.engine.effect import PROBE_TEXT
from manylora.models.checkpoint import load_tokenizer
from tests.tiny_adapters import make_adapter_that_spoils

from .conftest import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def spoiling(tiny_llama_dir: Path, tmp_path: Path) -> tuple[Path, str, int]:
    """The adapter, its token, and a text that has it; what uploads are measured with has it not."""
    tokenizer = load_tokenizer(tiny_llama_dir)
    text = "我"
    token_id = tokenizer(text)["input_ids"][-1]
    assert token_id not in tokenizer(PROBE_TEXT)["input_ids"]
    return make_adapter_that_spoils(tiny_llama_dir, tmp_path / "spoiling", token_id), text, token_id


def test_a_row_of_no_numbers_is_an_error_of_its_own_request(
    own_server: Callable[..., Any], spoiling: tuple[Path, str, int]
) -> None:
    folder, text, token_id = spoiling
    with own_server() as server:
        upload(server, folder)

        def ask(prompt: str, model: str = "spoiling", **fields: Any) -> httpx.Response:
            body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 4, **fields}
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

        for fields in ({}, {"stream": True}, {"temperature": 1.0, "seed": 3}, {"echo": True, "logprobs": 2}):
            answer = ask(text, **fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_not_finite")
            assert answer.json()["error"]["type"] == "server_error"
            assert "spoiling@1" in answer.json()["error"]["message"]
            assert ask("The quick").status_code == ask(text, model="tiny").status_code == 200

        late = ask("The", stream=True, logprobs=1, logit_bias={str(token_id): 100}, ignore_eos=True)
        assert late.status_code == 200
        events = [line.removeprefix("data: ") for line in late.text.splitlines() if line]
        assert json.loads(events[-1])["error"]["code"] == "adapter_not_finite"

        stats = httpx.get(f"{server.url}/v1/stats").json()
        assert next(row for row in stats["adapters"] if row["name"] == "spoiling")["not_finite"] == 5
        assert stats["recent_errors"][0]["code"] == "adapter_not_finite"
        assert (stats["running"], stats["kv_blocks_used"]) == (0, 0)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'manylora_adapter_not_finite_total{adapter="spoiling",tenant="public"} 5.0' in metrics
        assert 'manylora_engine_step_failures_total{phase="forward",result="isolated"} 0.0' in metrics
        log = server.stderr.read_text()
        assert log.count("sequence_failed") == 5
        assert "Traceback" not in log


def upload(server: Server, folder: Path) -> None:
    files = [("files", (n, (folder / n).read_bytes())) for n in ("adapter_config.json", "adapter_model.safetensors")]
    answer = httpx.post(f"{server.url}/v1/adapters", data={"name": "spoiling"}, files=files, timeout=60)
    assert answer.status_code == 201, answer.text
