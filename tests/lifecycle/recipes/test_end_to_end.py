"""Data, training, publishing, scores and a question, by the commands alone: the default model behind a real server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    settings = {
        "port": 0, "max_model_len": 512, "kv_cache_memory": "128MiB", "adapter_memory": "64MiB",
        "host_tier_memory": "64MiB", "data_dir": str(folder / "data"),
    }  # fmt: skip
    with running(settings, folder / "log") as server:
        yield server.url


def manylora(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "manylora", *words], capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def keep(path: Path, count: int, labels: tuple[str, ...] = ()) -> None:
    """The first `count` rows, of these labels or of all."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = [line for line in lines if not labels or json.loads(line)["label"] in labels]
    path.write_text("".join(chosen[:count]), encoding="utf-8")


def ask(url: str, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["manylora"]["adapter"]["name"] == model
    return str(answer["choices"][0]["message"]["content"])


def train_and_score(name: str, url: str, cwd: Path, *flags: str) -> float:
    """Train on the data in `data/`, publish, compare with the base there; the published adapter's accuracy."""
    files = ["--data", f"data/{name}/train.jsonl", "--out", f"out/{name}", "--epochs", "1", "--max-length", "96"]
    said = manylora("train", *files, *flags, "--publish", name, "--server", url, cwd=cwd)
    assert f"published as {name}@1" in said

    scored = ["--data", f"data/{name}/test.jsonl", "--metrics", "accuracy", "--max-tokens", "8", "--out", "scores"]
    manylora("evaluate", *scored, "--base", "--adapter", f"{name}@1", "--server", url, cwd=cwd)
    adapter = json.loads((cwd / "scores/evaluate.json").read_text(encoding="utf-8"))["contenders"][f"{name}@1"]
    assert adapter["against_reference"]["accuracy"]["gain"] > 0
    assert adapter["against_reference"]["accuracy"]["p"] < 0.05
    return float(adapter["accuracy"]["value"])


def test_cities_are_learnt_and_read_off_two_new_sentences(url: str, tmp_path: Path) -> None:
    manylora("recipe", "city-zh", cwd=tmp_path)
    keep(tmp_path / "data/city-zh/train.jsonl", 96)
    keep(tmp_path / "data/city-zh/test.jsonl", 24)

    accuracy = train_and_score(
        "city-zh", url, tmp_path, "--rank", "4", "--targets", "q_proj,v_proj,o_proj", "--lr", "5e-3"
    )

    assert accuracy >= 0.5  # of ten cities
    assert ask(url, "city-zh", "我爱北京天安门") == "北京"
    assert ask(url, "city-zh", "我爱上海东方明珠") == "上海"


def test_sentiment_is_learnt_from_rated_sentences(url: str, tmp_path: Path, ratings: Path) -> None:
    manylora("recipe", "sentiment-en", "--source", str(ratings), cwd=tmp_path)
    sides = ("negative", "positive")
    keep(tmp_path / "data/sentiment-en/train.jsonl", 144, sides)
    keep(tmp_path / "data/sentiment-en/test.jsonl", 30, sides)

    accuracy = train_and_score(
        "sentiment-en", url, tmp_path, "--targets", "q_proj,v_proj", "--lr", "2e-3", "--batch-size", "4"
    )

    assert accuracy >= 0.7  # of two sides
    assert ask(url, "sentiment-en", "I love this phone, it is wonderful!") == "positive"
    assert ask(url, "sentiment-en", "This is awful, I hate it.") == "negative"
