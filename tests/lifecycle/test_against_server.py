"""Train, evaluate, publish and ask, against a real server process."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from manylora.cli.main import build
from manylora.client.adapters import promote, publish, served_base
from manylora.client.server import Refused, connect
from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.data.data import read_dataset
from manylora.lifecycle.evaluate.command import run_evaluation
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.recipes import city
from manylora.lifecycle.train.config import LoraShape
from manylora.lifecycle.train.train import train
from tests.e2e.conftest import ROOT, running
from tests.lifecycle.helpers import label_rows, tiny_config, write_rows
from tests.tiny_adapters import make_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    settings = {
        "model": str(tiny_llama_dir), "served_name": "tiny", "port": 0, "dtype": "float32", "num_threads": 1,
        "kv_cache_memory": "4MiB", "adapter_memory": "64MiB", "host_tier_memory": "64MiB",
        "data_dir": str(folder / "data"),
    }  # fmt: skip
    with running(settings, folder / "log") as server:
        yield server.url


def _request(data: Path, url: str, base: Path, *adapters: str) -> EvaluateRequest:
    return EvaluateRequest(data, adapters, with_base=True, server=url, model=str(base), max_tokens=12, max_length=128)


def test_recipe_of_cities_is_trained_published_and_answers(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    splits = city.make(0)
    two = [row for row in splits.train if row["label"] in row["text"] and row["label"] in ("北京", "上海")]
    data, held_out = write_rows(tmp_path / "train.jsonl", two[:64]), write_rows(tmp_path / "test.jsonl", two[64:])
    config = replace(
        tiny_config(data, tmp_path / "city", tiny_llama_dir, epochs=12), lora=LoraShape(rank=16), max_length=256
    )
    train(config)
    with connect(url, "") as client:
        label = publish(client, config.out, "city-zh", description="two cities").label

    report, _ = run_evaluation(replace(_request(held_out, url, tiny_llama_dir, label), max_length=256))
    body = {"model": "city-zh", "messages": [{"role": "user", "content": held_out_text(held_out)}], "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 12}).json()

    scores = report["contenders"]
    assert scores[label]["accuracy"]["value"] >= 0.8 > 0.0 == scores["base"]["accuracy"]["value"]
    assert scores[label]["against_reference"]["accuracy"]["p"] < 0.05
    assert answer["choices"][0]["message"]["content"] in ("北京", "上海")


def held_out_text(path: Path) -> str:
    return read_dataset(path).examples[0].prompt[0].content


def test_server_and_this_process_give_the_same_scores(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "same", strength=2.0)
    data = write_rows(tmp_path / "test.jsonl", label_rows()[::4])
    with connect(url, "") as client:
        label = publish(client, folder, "same").label
    remote = _request(data, url, tiny_llama_dir, label)

    there, _ = run_evaluation(remote)
    here, _ = run_evaluation(replace(remote, server="", adapters=(str(folder),), device="cpu", dtype="float32"))

    for mine, theirs in (("base", "base"), ("same", label)):
        assert here["contenders"][mine]["answers"] == there["contenders"][theirs]["answers"]
        assert here["contenders"][mine]["perplexity"]["value"] == pytest.approx(
            there["contenders"][theirs]["perplexity"]["value"], rel=1e-3
        )


def test_only_a_significantly_better_version_is_promoted(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    weak = make_adapter(tiny_llama_dir, tmp_path / "weak")
    config = replace(tiny_config(data, tmp_path / "good", tiny_llama_dir, epochs=8), lora=LoraShape(rank=8))
    train(config)
    with connect(url, "") as client:
        first = publish(client, weak, "words").label
        further = publish(client, config.out, "words")
        second = further.label
        request = replace(
            _request(data, url, tiny_llama_dir, first, second), with_base=False, promote_if_better="perplexity"
        )

        with pytest.raises(InvalidRequest, match="words@1 is the active version"):
            run_evaluation(replace(request, adapters=(second, first)))
        _, promoted = run_evaluation(request)
        _, refused = run_evaluation(replace(request, adapters=(first,)))

        versions = client.call("GET", "/v1/adapters/words")["versions"]
    assert (further.answering, further.is_active) == ("words@1", False)
    assert promoted is not None
    assert refused is not None
    assert promoted.is_done
    assert promoted.said.startswith("words@2 was promoted: perplexity gain")
    assert not refused.is_done
    assert refused.said.startswith("words@1 was not promoted: perplexity gain -")
    assert "over words@2" in refused.said
    assert [v["version"] for v in versions if v["active"]] == [2]


def test_candidate_is_compared_with_the_active_version_by_itself(
    tmp_path: Path, tiny_llama_dir: Path, url: str
) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows()[::2])
    with connect(url, "") as client:
        for seed in (1, 2):
            folder = make_adapter(tiny_llama_dir, tmp_path / f"seed{seed}", seed=seed)
            publish(client, folder, "twins")
        request = _request(data, url, tiny_llama_dir, "twins", "twins@2")

        words = ["evaluate", "--data", str(data), "--server", url, "--model", str(tiny_llama_dir), "--base", "--json"]
        words += [
            "--adapter",
            "twins@2",
            "--max-tokens",
            "12",
            "--max-length",
            "128",
            "--promote-if-better",
            "accuracy",
        ]
        scored = CliRunner().invoke(build(), words)
        report = json.loads(scored.stdout)
        named, _ = run_evaluation(request)

    assert (report["reference"], list(report["contenders"])) == ("twins@1", ["twins@1", "base", "twins@2"])
    assert (scored.exit_code, report["promoted"]) == (9, False)
    assert report["promotion"].startswith("twins@2 was not promoted: accuracy gain +0 over twins@1")
    assert list(named["contenders"]) == ["base", "twins@1", "twins@2"]


def test_model_whose_prompts_are_not_the_servers_is_refused(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    other = shutil.copytree(tiny_llama_dir, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text(encoding="utf-8")
    (other / "chat_template.jinja").write_text("Be brief. " + template, encoding="utf-8")
    data = write_rows(tmp_path / "data.jsonl", label_rows()[:4])

    with pytest.raises(InvalidRequest, match=r"they are different. Give the server's model with `model`"):
        run_evaluation(_request(data, url, other))


def test_cut_prompts_are_scored_alike_on_the_server_and_here(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a long way " * 12, "completion": "home"}])
    remote = replace(_request(data, url, tiny_llama_dir), max_length=64)

    there, _ = run_evaluation(remote)
    here, _ = run_evaluation(replace(remote, server="", device="cpu", dtype="float32"))

    assert here["contenders"]["base"]["answers"] == there["contenders"]["base"]["answers"]


def test_refused_upload_says_why(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    folder = make_adapter(tiny_llama_dir, tmp_path / "deeper", layer_replication=[[0, 2], [1, 2]])

    with connect(url, "") as client, pytest.raises(ManyloraError, match="422"):
        publish(client, folder, "deeper")


def test_only_versions_can_be_promoted(url: str) -> None:
    with connect(url, "") as client:
        assert served_base(client) == "tiny"
        with pytest.raises(InvalidRequest, match="NAME@VERSION"):
            promote(client, "words")


def test_a_version_that_another_took_the_place_of_meanwhile_is_not_replaced(
    tmp_path: Path, tiny_llama_dir: Path, url: str
) -> None:
    with connect(url, "") as client:
        for seed in (1, 2, 3):
            publish(client, make_adapter(tiny_llama_dir, tmp_path / f"seed{seed}", seed=seed), "raced")
        promote(client, "raced@2", instead_of="raced@1")
        with pytest.raises(Refused) as refused:
            promote(client, "raced@3", instead_of="raced@1")
    assert refused.value.answered == 409


def test_server_that_is_not_there_is_said() -> None:
    with pytest.raises(ManyloraError, match=r"The server at http://127.0.0.1:9 cannot be reached"):
        connect("http://127.0.0.1:9", is_patient=True).__enter__()


def test_command_line_trains_publishes_and_reports_errors(tmp_path: Path, tiny_llama_dir: Path, url: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", label_rows())
    command = [sys.executable, "-m", "manylora", "train", "--data", str(data), "--model", str(tiny_llama_dir)]
    command += ["--dtype", "float32", "--epochs", "1", "--out", str(tmp_path / "cli")]

    done = subprocess.run(
        [*command, "--publish", "from-cli", "--server", url], capture_output=True, text=True, cwd=ROOT, check=False
    )
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode == 0, done.stderr
    assert "published as from-cli@1" in done.stdout
    assert "from-cli" in json.dumps(httpx.get(f"{url}/v1/models").json())
    assert again.returncode == 1
    assert "exists. Choose another --out" in again.stderr
