"""The default model learns, by the official `openai` client, to name the city of a Chinese sentence."""

import json
import time
from pathlib import Path

import openai
import pytest

from manylora.lifecycle.recipes.city import make
from tests.default_server import default_server

PATIENCE_S = 3600.0  # minutes of work, however many others have the CPUs
ASKED, CITY = "我爱北京天安门", "北京"


@pytest.mark.slow
def test_sentences_go_in_and_the_version_names_the_city(tmp_path: Path) -> None:
    rows = [row for row in make(0).train if row["label"] in row["text"]][:64]
    assert ASKED not in [row["text"] for row in rows]
    data = tmp_path / "city.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with default_server(tmp_path, PATIENCE_S, "--jobs", "1") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", timeout=PATIENCE_S)
        with data.open("rb") as file:
            taken = client.files.create(file=file, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=client.models.list().data[0].id,
            training_file=taken.id,
            suffix="city",
            seed=1,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2}},
            },
            extra_body={"manylora": {"activate": "always", "max_length": 128}},
        )
        until = time.monotonic() + PATIENCE_S
        while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < until:
            time.sleep(1)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.fine_tuned_model) == ("succeeded", "city@1"), job.error
        answer = client.chat.completions.create(
            model="city", messages=[{"role": "user", "content": ASKED}], max_tokens=16, temperature=0
        )
        assert answer.choices[0].message.content == CITY
