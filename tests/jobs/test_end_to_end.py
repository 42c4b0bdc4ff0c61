"""The official `openai` client, unmodified, from rows to a version that answers: a server with a worker beside it."""

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import typer
from openai.types.fine_tuning import FineTuningJob
from typer.testing import CliRunner, Result

from manylora.cli.main import build
from manylora.cli.remote_training import REFUSED, SENT
from manylora.identity import TENSOR_FILE
from tests.catalog.real_server import Server, serving
from tests.lifecycle.helpers import label_rows, write_rows
from tests.lifecycle.test_data_folders import saved
from tests.lifecycle.test_trackers import curves

PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_llama_dir, tmp_path_factory.mktemp("server"), jobs=1) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ended(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    until = time.monotonic() + PATIENCE_S
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def test_rows_go_in_and_a_version_that_is_better_comes_out(
    client: openai.OpenAI, server: Server, tmp_path: Path
) -> None:
    rows = label_rows()
    with write_rows(tmp_path / "words.jsonl", rows).open("rb") as file:
        train = client.files.create(file=file, purpose="fine-tune")
    with write_rows(tmp_path / "held out.jsonl", rows[::2]).open("rb") as file:
        held_out = client.files.create(
            file=file, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert [each.id for each in client.files.list(purpose="fine-tune")][:2] == [held_out.id, train.id]
    assert held_out.expires_at == held_out.created_at + 3600
    assert client.files.content(train.id).read() == (tmp_path / "words.jsonl").read_bytes()

    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=train.id,
        validation_file=held_out.id,
        suffix="words",
        seed=1,
        metadata={"team": "letters"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": "auto", "learning_rate_multiplier": 20}},
        },
        extra_body={"manylora": {"rank": 4, "activate": "if_better", "render": "plain"}},
    )
    assert job.status == "queued"
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (20, 8)
    with pytest.raises(openai.ConflictError):
        client.files.delete(train.id)

    job = ended(client, job)

    assert next(iter(client.fine_tuning.jobs.list())).id == job.id
    check_result(client, server, job, rows)
    check_that_worse_is_not_promoted(client, server, train.id, held_out.id)
    assert client.files.delete(train.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(train.id)


def check_result(client: openai.OpenAI, server: Server, job: FineTuningJob, rows: list[dict[str, str]]) -> None:
    """What is told of a job whose version answers with the labels of `rows`, and was promoted for it."""
    assert job.status == "succeeded", client.fine_tuning.jobs.list_events(job.id).data[0].message
    assert job.fine_tuned_model == "words@1"
    assert job.trained_tokens
    assert job.finished_at is not None
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=30))  # over several pages
    metrics = [event for event in reversed(events) if event.type == "metrics"]
    assert not any(label in event.message for event in events for label in ("fruit", "tool")), "events quote no row"
    losses = [event.data["train_loss"] for event in metrics]  # type: ignore[index]
    assert [event.data["step"] for event in metrics] == list(range(1, 81))  # type: ignore[index]
    assert losses[-1] < losses[0] / 2
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == "words@1"
    assert checkpoint.metrics.full_valid_loss is not None
    (report,) = job.result_files
    assert client.files.retrieve(report).purpose == "fine-tune-results"
    answered = [
        client.completions.create(model="words", prompt=row["text"], max_tokens=8, temperature=0).choices[0].text
        for row in rows[::7]
    ]
    assert answered == [row["label"] for row in rows[::7]]
    (used,) = [row for row in server.client.get("/v1/usage").json()["data"] if row["adapter"] == "words"]
    assert used["training_tokens"] == job.trained_tokens
    assert used["training_seconds"] > 0
    lineage = server.client.get("/v1/adapters/words/versions/1").json()["lineage"]
    assert lineage["command"] == f"fine-tuning job {job.id}"
    assert lineage["data_sha256"] == hashlib.sha256(client.files.content(job.training_file).read()).hexdigest()
    assert lineage["scores"] == {"held-out loss": round(checkpoint.metrics.full_valid_loss, 4)}
    promotion = job.model_dump()["manylora"]["promotion"]
    assert promotion["promoted"]
    assert "words@1 was promoted: accuracy gain" in promotion["said"]
    assert "over base" in promotion["said"]


def check_that_worse_is_not_promoted(client: openai.OpenAI, server: Server, train: str, held_out: str) -> None:
    worse = ended(
        client,
        client.fine_tuning.jobs.create(
            model="tiny",
            training_file=train,
            validation_file=held_out,
            suffix="words",
            hyperparameters={"n_epochs": 1},
            extra_body={"manylora": {"activate": "if_better", "metric": "perplexity", "render": "plain"}},
        ),
    )
    assert (worse.status, worse.fine_tuned_model) == ("succeeded", "words@2")
    promotion = worse.model_dump()["manylora"]["promotion"]
    assert not promotion["promoted"]
    assert "words@2 was not promoted: perplexity gain -" in promotion["said"]
    assert server.client.get("/v1/adapters/words").json()["active_version"] == 1


def test_a_job_from_a_terminal(server: Server, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", label_rows())

    def run(*words: str) -> Result:
        env = {"MANYLORA_URL": str(server.client.base_url), "COLUMNS": "300"}
        return CliRunner().invoke(build(), ["jobs", *words], env=env)

    so = ("--name", "typed", "--epochs", "1", "--lr-multiplier", "20", "--seed", "1", "--follow")
    done = run("submit", str(rows), "--rank", "2", *so)
    assert done.exit_code == 0, done.output
    assert "Step 4/4: training loss=" in done.stdout
    assert "succeeded: typed@1" in done.stdout
    (newest, *_) = json.loads(run("list", "--json").stdout)
    assert newest["fine_tuned_model"] == "typed@1"
    assert "n_epochs 1" in run("show", newest["id"]).stdout
    shown = run("events", newest["id"], "--report-to", "tensorboard", "--report-dir", str(tmp_path / "runs"))
    assert shown.stdout.splitlines()[-1].endswith("The job has succeeded: typed@1")
    assert [step for step, _ in curves(tmp_path / "runs")["train_loss"]] == [1, 2, 3, 4]
    assert run("events", newest["id"], "--report-to", "comet").exit_code == 2
    further = run(
        "submit", str(rows), "--start", "typed@1", "--eval", str(saved(tmp_path / "held out", label_rows())), *so
    )
    assert "succeeded: typed@2" in further.stdout, further.output
    assert _first_loss(further.stdout) < _first_loss(done.stdout), "it begins where the other has ended"
    (latest, *_) = json.loads(run("list", "--json").stdout)
    assert (latest["manylora"]["started_from"], latest["manylora"]["rank"]) == ("typed@1", 2)
    told = [json.loads(line) for line in run("events", latest["id"], "--json").stdout.splitlines()]
    found = [event["data"]["report"] for event in told if "report" in (event["data"] or {})]
    reports = {report["file"]: report for report in found}
    assert reports["training_file"]["rows"]["used"] == reports["validation_file"]["shared"]["count"] == 32
    assert run("cancel", newest["id"]).exit_code == 6
    assert run("show", "ftjob-x").exit_code == 4
    assert run("submit", str(rows), "--rank", "0").exit_code == 2
    failed = run("submit", str(rows), "--targets", "nowhere", "--follow")
    assert failed.exit_code == 1
    assert "nowhere" in failed.stdout
    (latest, *_) = json.loads(run("list", "--json").stdout)
    assert run("events", latest["id"], "--follow").exit_code == 1
    assert run("events", newest["id"], "--follow").exit_code == 0


def _first_loss(shown: str) -> float:
    return float(shown.partition("training loss=")[2].split()[0].rstrip(","))


def typed(*words: str | Path) -> Result:
    return CliRunner().invoke(build(), [str(word) for word in words], env={"COLUMNS": "300"})


def test_the_train_command_makes_the_same_adapter_on_the_server(
    server: Server, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rows = [{"words": row["text"], "kind": row["label"]} for row in label_rows()]
    data, held_out = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "held out.jsonl", rows[:8])
    told = (
        "train", "--data", data, "--eval", held_out, "--map", "text=words", "--map", "label=kind", "--rank", "2",
        "--targets", "q_proj,v_proj", "--dropout", "0.1", "--epochs", "1", "--lr", "0.01", "--eval-every", "2",
        "--render", "plain", "--max-length", "128", "--sample", "1",
    )  # fmt: skip
    here = typed(*told, "--model", tiny_llama_dir, "--device", "cpu", "--threads", "1", "--out", tmp_path / "out")
    assert here.exit_code == 0, here.output

    there = typed(*told, "--server", str(server.client.base_url), "--name", "far")

    assert there.exit_code == 0, there.output
    assert "far@1: 4 steps" in there.stdout
    assert "train 4/4  loss" in there.stderr
    assert "eval_loss" in there.stderr
    assert "8 of 8 rows of --eval are in --data too" in there.stderr
    assert "step 2, row 1: " in there.stderr, "as the local command tells it"
    archive = server.client.get("/v1/adapters/far/versions/1/download").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        (name,) = (name for name in files.getnames() if name.endswith(TENSOR_FILE))
        weights = files.extractfile(name)
        assert weights is not None
        assert weights.read() == (tmp_path / "out" / TENSOR_FILE).read_bytes()
    assert server.client.get("/v1/adapters/far").json()["active_version"] == 1, "a name's first version answers to it"
    goes_on = typed("train", "--data", data, "--map", "text=words", "--map", "label=kind", "--epochs", "1",
                    "--start", "far@1", "--server", str(server.client.base_url), "--name", "far")  # fmt: skip
    assert "far@2: 4 steps" in goes_on.stdout, goes_on.output
    assert "promote: MANYLORA_URL=" in goes_on.stdout


def test_what_a_job_has_no_field_for_is_refused_by_its_flag(server: Server, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", label_rows())
    train = ("train", "--data", data, "--server", str(server.client.base_url))
    refused = typed(*train, "--out", tmp_path / "out", "--threads", "2")
    assert refused.exit_code == 1
    assert "With --server, which trains on that server, there is no --out (" in refused.stderr
    assert "no --threads (" in refused.stderr
    assert "--rank is 4096, and at most" in typed(*train, "--rank", "4096").stderr
    assert "--epochs: Input should be less" in typed(*train, "--epochs", "1000").stderr
    assert "rows.csv is not a file" in typed(*train, "--eval", tmp_path / "rows.csv").stderr
    assert server.client.get("/v1/files").json()["data"][0]["filename"] != "rows.csv"
    nameless = typed("train", "--data", data, "--publish", "near", "--server", str(server.client.base_url))
    assert (nameless.exit_code, "'--out'" in nameless.stderr) == (2, True)
    assert "--name is of a training on a --server" in typed("train", "--data", data, "--out", "x", "--name", "y").stderr


def test_every_option_of_train_is_sent_or_refused() -> None:
    command: Any = typer.main.get_command(build())
    options = {option.name for option in command.commands["train"].params}
    assert options == SENT | REFUSED.keys()
    assert not SENT & REFUSED.keys()


def test_a_job_outlives_the_command_that_follows_it(client: openai.OpenAI, server: Server, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", label_rows() * 100)
    command = [sys.executable, "-m", "manylora", "train", "--data", str(rows), "--epochs", "50", "--batch-size", "1",
               "--server", str(server.client.base_url)]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as following:
        assert following.stderr is not None
        job_id, _, said = following.stderr.readline().partition(": ")
        assert said.startswith("submitted to http")
        following.send_signal(signal.SIGINT)
        left = following.stderr.read()
    assert following.returncode == 130
    assert f"manylora jobs events {job_id} --follow" in left
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"


def test_a_job_is_cancelled_while_it_runs(client: openai.OpenAI, tmp_path: Path) -> None:
    # 160,000 steps, which end on no machine before they are cancelled
    with write_rows(tmp_path / "rows.jsonl", label_rows() * 100).open("rb") as file:
        train = client.files.create(file=file, purpose="fine-tune")
    long = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=train.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}},
    )
    until = time.monotonic() + PATIENCE_S
    while client.fine_tuning.jobs.retrieve(long.id).status == "queued" and time.monotonic() < until:
        time.sleep(0.2)

    assert client.fine_tuning.jobs.cancel(long.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.fine_tuning.jobs.pause(long.id)
