"""Sixty-four tenants in one batch, each with labels of its own or with none, against PEFT one by one."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from manylora.engine.encoder_runner import EncoderRunner
from tests.tiny_models import VOCAB_SIZE

from .tiny import Served, make_encoder, make_encoder_adapter, peft_model, serve

NUM_TENANTS = 64
# What adapters touch; norms and the pooler are among it in the first.
TARGETS: list[list[str] | str] = ["all-linear", ["query", "value"], ["key", "dense"], ["query"]]


def has_adapter(number: int) -> bool:
    return number % 8 != 7


def num_labels(number: int) -> int:
    return 1 + number % 7


def text_of(number: int) -> list[int]:
    random = np.random.default_rng(number)
    return [0, *random.integers(5, VOCAB_SIZE, 1 + number * 5 % 60).tolist(), 2]


def make_tenants_adapter(base: Path, folder: Path, number: int) -> Path:
    made = make_encoder_adapter(
        base,
        folder,
        model_class=AutoModelForSequenceClassification,
        task="SEQ_CLS",
        rank=1 + number % 9,
        targets=TARGETS[number % len(TARGETS)],
        num_labels=num_labels(number),
        seed=number,
    )
    path = made / "adapter_config.json"
    names = {"id2label": {str(i): f"{number}-{i}" for i in range(num_labels(number))}}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    return made


class Gate:
    """Holds the first step until it is opened, and knows how many inputs each one had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._is_open = threading.Event()
        known = EncoderRunner.forward

        def forward(runner: EncoderRunner, scheduled: Any) -> Any:
            self.sizes.append(len(scheduled))
            self._is_open.wait(60)
            return known(runner, scheduled)

        monkeypatch.setattr(EncoderRunner, "forward", forward)

    async def together(self, served: Served, bodies: list[tuple[str, dict[str, Any]]]) -> list[Any]:
        """The answers to all, asked while the first one's step is held."""
        asked = [asyncio.create_task(served.client.post(path, json=body)) for path, body in bodies]
        while served.parts.engine.stats().waiting < len(bodies) - max(self.sizes, default=0) or not self.sizes:
            await asyncio.sleep(0.01)
        self._is_open.set()
        return list(await asyncio.gather(*asked))


def test_sixty_four_tenants_in_one_batch_get_what_peft_gives_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other numbers of labels, ranks and modules, and some tenants that ask the base for an embedding."""
    base = make_encoder("bert", tmp_path / "base")
    tuned = [number for number in range(NUM_TENANTS) if has_adapter(number)]
    wanted: dict[int, np.ndarray] = {}
    with serve(base, tmp_path / "data", max_slots=64, max_num_batched_tokens=4096) as served:
        for number in tuned:
            folder = make_tenants_adapter(base, tmp_path / str(number), number)
            said = served.upload(folder, f"of-{number}")
            assert said.status_code == 201, said.text
            count = num_labels(number)
            model = peft_model(base, folder, model_class=AutoModelForSequenceClassification, num_labels=count)
            with torch.inference_mode():
                wanted[number] = model(input_ids=torch.tensor([text_of(number)])).logits[0].numpy()
        bodies: list[tuple[str, dict[str, Any]]] = [
            (
                ("/v1/classify", {"model": f"of-{number}", "input": [text_of(number)], "use_activation": False})
                if has_adapter(number)
                else ("/v1/embeddings", {"model": "base", "input": [text_of(number)]})
            )
            for number in range(NUM_TENANTS)
        ]
        alone = [served.post(path, **body).json()["data"] for path, body in bodies]
        gate = Gate(monkeypatch)
        answers = served.portal.call(gate.together, served, bodies)
    assert max(gate.sizes) >= NUM_TENANTS // 2, "they shared a batch"
    assert [answer.json()["data"] for answer in answers] == alone, "to the last bit"
    for number in tuned:
        [entry] = answers[number].json()["data"]
        np.testing.assert_allclose(entry["probs"], wanted[number], atol=2e-5)
        assert entry["label"] == f"{number}-{wanted[number].argmax()}"
