"""The official `openai` client, unmodified, from rows to a version that answers: a server with a worker beside it."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from typer.testing import CliRunner, Result

from manylora.cli.main import build
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


def _first_loss(shown: str) -> float:
    return float(shown.partition("training loss=")[2].split()[0].rstrip(","))


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
