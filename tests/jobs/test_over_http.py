"""Files and jobs over HTTP, over a server without a model: what is taken, refused, kept apart, and published."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from manylora.database.database import Database
from manylora.database.tables import FileRow, JobRow, VersionRow
from manylora.errors import Conflict
from manylora.jobs import board, judge, leases
from manylora.jobs.files import DataFiles
from manylora.jobs.judge import Judge
from manylora.jobs.publisher import Publisher
from manylora.jobs.queue import Claim, JobQueue
from manylora.settings import Settings
from manylora.tenants.limits import TenantStore
from tests.catalog.rig import Rig, running, sound_files

pytestmark = pytest.mark.anyio

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]
LABELS = [{"text": "apple", "label": "fruit"}, {"text": "saw", "label": "tool"}]
KEYS = ("acme:manager", "acme:user", "other:manager")
PATIENCE_S = 60.0


@pytest.fixture
async def rig(settings: Settings) -> AsyncIterator[Rig]:
    async with running(settings, *KEYS) as rig:
        yield rig


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def upload(rig: Rig, data: bytes, name: str = "rows.jsonl", who: str = "acme:manager", **fields: str) -> Any:
    form = {"purpose": "fine-tune", **fields}
    return await rig.call("POST", "/v1/files", who, data=form, files={"file": (name, data)})


async def uploaded(rig: Rig, rows: list[Any] = ROWS, who: str = "acme:manager") -> str:
    answer = await upload(rig, lines(rows), who=who)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def submit(rig: Rig, file_id: str, who: str = "acme:manager", **fields: Any) -> Any:
    body = {"model": "base-model", "training_file": file_id, **fields}
    return await rig.call("POST", "/v1/fine_tuning/jobs", who, json=body)


async def handed_in(rig: Rig, job_id: str, seed: float = 1.0) -> Claim:
    """The job, trained to a sound adapter."""
    queue = JobQueue(rig.catalog.database)
    claim = await rig.catalog.database.run(partial(queue.claim, "w1", rig.catalog.base))
    assert claim is not None
    assert claim.job.id == job_id
    scratch = rig.settings.data_dir / "made"
    scratch.mkdir(exist_ok=True)
    for name, data in {**sound_files(seed), "train.json": b"{}"}.items():
        (scratch / name).write_bytes(data)
        rig.catalog.store.keep_file(f"{claim.remains}-{name}", scratch / name)
    figures = {"tokens": 12, "best_step": 3, "train_loss": 0.5, "best_eval_loss": None, "remains": claim.remains}
    assert await rig.catalog.database.run(partial(queue.hand_in, claim, figures))
    return claim


async def until(rig: Rig, job_id: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so(job := (await rig.call("GET", f"/v1/fine_tuning/jobs/{job_id}", "acme:manager")).json()):
            await asyncio.sleep(0.05)
    return dict(job)


REFUSED_UPLOADS: list[tuple[bytes, str, dict[str, str], str, str]] = [
    (lines([*ROWS, {"prompt": "x"}]), "rows.jsonl", {}, "file", "row 3: missing completion"),
    (b'{"prompt": "a", "completion": "b"}\n{"prompt"\n', "rows.jsonl", {}, "file", "row 2, column"),
    (b"", "mine.jsonl", {}, "file", "mine.jsonl is empty"),
    (lines([{"question": "a", "answer": "b"}]), "q.jsonl", {}, "file", "q.jsonl: the first row has the fields answer"),
    (lines(ROWS), "rows.xlsx", {}, "file", "ends in .jsonl"),
    (lines(ROWS), "rows.jsonl", {"purpose": "assistants"}, "purpose", "fine-tune"),
    (lines(ROWS), "rows.jsonl", {"expires_after[anchor]": "now"}, "expires_after[anchor]", "created_at"),
    (
        lines(ROWS),
        "rows.jsonl",
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
        "expires_after[seconds]",
        "3600",
    ),
    (lines(ROWS), "rows.jsonl", {"colour": "red"}, "colour", "not supported"),
]


async def test_an_upload_is_refused_by_its_field(rig: Rig) -> None:
    for data, name, fields, param, said in REFUSED_UPLOADS:
        answer = await upload(rig, data, name, **fields)
        assert answer.status_code == 400, (name, fields)
        assert answer.json()["error"]["param"] == param
        assert said in answer.json()["error"]["message"]
        assert "`" not in answer.json()["error"]["message"], "what it calls things is the command line's"
    assert (await rig.call("GET", "/v1/files", "acme:manager")).json()["data"] == []
    assert list((rig.settings.data_dir / "received").iterdir()) == []


async def test_a_file_has_a_limit_and_a_tenant_a_quota(rig: Rig) -> None:
    answer = await upload(rig, lines(ROWS) * 20_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    TenantStore(rig.catalog.database).change("acme", max_file_bytes=len(lines(ROWS)) + 1)
    first = await uploaded(rig)
    assert (await upload(rig, lines(ROWS))).json()["error"]["code"] == "quota_exceeded"
    await uploaded(rig, who="other:manager")
    assert (await rig.call("DELETE", f"/v1/files/{first}", "acme:manager")).json()["deleted"]
    await uploaded(rig)


async def test_rows_from_which_nothing_is_written_make_no_job(rig: Rig) -> None:
    pairs = await upload(rig, lines([{"anchor": f"a{number}", "positive": "b"} for number in range(3)]))
    answer = await submit(rig, pairs.json()["id"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training_file")
    assert "Jobs train what writes" in answer.json()["error"]["message"]


async def test_files_and_jobs_of_one_tenant_are_nobody_elses(rig: Rig) -> None:
    file_id = await uploaded(rig)
    job_id = (await submit(rig, file_id)).json()["id"]
    for method, path in (
        ("GET", f"/v1/files/{file_id}"),
        ("GET", f"/v1/files/{file_id}/content"),
        ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}/events"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}/checkpoints"),
        *(("POST", f"/v1/fine_tuning/jobs/{job_id}/{action}") for action in ("cancel", "pause", "resume")),
    ):
        foreign = await rig.call(method, path, "other:manager")
        missing = await rig.call(method, path.replace(file_id, "file-x").replace(job_id, "ftjob-x"), "other:manager")
        assert foreign.status_code == missing.status_code == 404, path
        said = foreign.json()["error"]["message"].replace(file_id, "file-x").replace(job_id, "ftjob-x")
        assert said == missing.json()["error"]["message"]
        assert (await rig.call(method, path, "acme:user")).status_code == 403
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        assert (await rig.call("GET", path, "other:manager")).json()["data"] == []
    foreign = await submit(rig, file_id, "other:manager")
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (400, "training_file")


REFUSED_JOBS: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4o"}, "model"),
    ({"training_file": "file-x"}, "training_file"),
    ({"validation_file": "file-x"}, "validation_file"),
    ({"suffix": "Not A Name"}, "suffix"),
    ({"suffix": "base-model"}, "suffix"),
    ({"manylora": {"name": "no/name"}}, "manylora.name"),
    ({"seed": -1}, "seed"),
    ({"method": {"type": "reinforcement"}}, "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
    ({"method": {"type": "dpo"}}, "method.type"),  # of rows with one answer
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo"}, "manylora": {"init": "pissa"}}, "manylora.init"),
    ({"integrations": [{"type": "wandb"}]}, "integrations"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e6}}, "hyperparameters.learning_rate_multiplier"),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 1e6}}}},
        "method.supervised.hyperparameters.learning_rate_multiplier",
    ),
    ({"manylora": {"rank": 65}}, "manylora.rank"),
    ({"manylora": {"rank": 0}}, "manylora.rank"),
    ({"manylora": {"dropout": 1.0}}, "manylora.dropout"),
    ({"manylora": {"max_length": 10**6}}, "manylora.max_length"),
    ({"manylora": {"early_stop": 2}}, "manylora.early_stop"),
    ({"manylora": {"eval_every": 2}}, "manylora.eval_every"),
    ({"manylora": {"activate": "perhaps"}}, "manylora.activate"),
    ({"manylora": {"activate": "if_better"}}, "manylora.activate"),
    ({"manylora": {"metric": "bleu"}}, "manylora.metric"),
    ({"manylora": {"colour": "red"}}, "manylora.colour"),
    ({"colour": "red"}, "colour"),
]


async def test_a_job_is_refused_by_its_field(rig: Rig) -> None:
    file_id = await uploaded(rig)
    for fields, param in REFUSED_JOBS:
        answer = await submit(rig, file_id, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert (await rig.call("GET", "/v1/fine_tuning/jobs", "acme:manager")).json()["data"] == []


async def test_rows_that_do_not_fit_together_are_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    train, other, strange, one = [
        await uploaded(rig, rows)
        for rows in (LABELS, ROWS, [{"text": "sky", "label": "place"}], [{"text": "a", "label": "b"}])
    ]
    for validation, said in ((other, "completion rows"), (strange, "place")):
        answer = await submit(rig, train, validation_file=validation)
        assert answer.json()["error"]["param"] == "validation_file"
        assert said in answer.json()["error"]["message"]
    assert (await submit(rig, one)).json()["error"]["param"] == "training_file"
    monkeypatch.setattr(board, "MAX_JUDGED_ROWS", 1)
    many = await submit(rig, train, validation_file=train, manylora={"activate": "if_better"})
    assert many.json()["error"]["param"] == "validation_file"
    monkeypatch.undo()
    judged = {"activate": "if_better", "metric": "accuracy"}
    unfit = await submit(rig, other, validation_file=other, manylora=judged)
    assert unfit.json()["error"]["param"] == "manylora.metric"


async def test_pages_and_a_job_that_nobody_works_at(rig: Rig) -> None:
    file_id = await uploaded(rig)
    jobs = [(await submit(rig, file_id, suffix="letters")).json() for _ in range(3)]
    assert jobs[0]["status"] == "queued"
    assert jobs[0]["hyperparameters"] == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    page = (await rig.call("GET", "/v1/fine_tuning/jobs?limit=2", "acme:manager")).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([jobs[2]["id"], jobs[1]["id"]], True)
    rest = await rig.call("GET", f"/v1/fine_tuning/jobs?after={page['last_id']}", "acme:manager")
    assert [job["id"] for job in rest.json()["data"]] == [jobs[0]["id"]]
    path = f"/v1/fine_tuning/jobs/{jobs[0]['id']}"
    events = (await rig.call("GET", f"{path}/events", "acme:manager")).json()
    assert [event["level"] for event in events["data"]] == ["warn", "info", "info"]
    assert "--jobs" in events["data"][0]["message"]
    second = (await rig.call("GET", f"{path}/events?limit=1&after={events['first_id']}", "acme:manager")).json()
    assert second["data"] == [events["data"][1]]
    other = events["first_id"].replace(jobs[0]["id"].removeprefix("ftjob-"), jobs[1]["id"].removeprefix("ftjob-"))
    assert other != events["first_id"]
    for strange in (
        f"{path}/events?after=x",
        f"{path}/events?after={other}",
        f"{path}/checkpoints?after=x",
        "/v1/fine_tuning/jobs?after=x",
    ):
        assert (await rig.call("GET", strange, "acme:manager")).json()["error"]["param"] == "after"
    assert (await rig.call("DELETE", f"/v1/files/{file_id}", "acme:manager")).status_code == 409


async def test_what_was_trained_becomes_a_version_once(rig: Rig) -> None:
    file_id = await uploaded(rig)
    first = (await submit(rig, file_id, suffix="sums", manylora={"activate": "always"})).json()["id"]
    await handed_in(rig, first)
    job = await until(rig, first, lambda job: job["status"] == "succeeded")
    assert (job["fine_tuned_model"], job["trained_tokens"]) == ("sums@1", 12)
    adapter = (await rig.call("GET", "/v1/adapters/sums", "acme:manager")).json()
    assert adapter["active_version"] == 1
    history = (await rig.call("GET", "/v1/adapters/sums/history", "acme:manager")).json()["data"]
    assert history[0]["note"] == f"fine-tuning job {first}"
    (report,) = job["result_files"]
    assert (await rig.call("GET", f"/v1/files/{report}/content", "acme:manager")).content == b"{}"

    second = (await submit(rig, file_id, suffix="sums")).json()["id"]
    await handed_in(rig, second, seed=2.0)
    job = await until(rig, second, lambda job: job["status"] == "succeeded")
    assert job["fine_tuned_model"] == "sums@2"
    assert (await rig.call("GET", "/v1/adapters/sums", "acme:manager")).json()["active_version"] == 1
    checkpoint = (await rig.call("GET", f"/v1/fine_tuning/jobs/{second}/checkpoints", "acme:manager")).json()["data"][0]
    assert checkpoint["fine_tuned_model_checkpoint"] == "sums@2"
    rig.catalog.check_integrity()


async def test_a_version_is_judged_before_its_job_has_ended(rig: Rig) -> None:
    file_id = await uploaded(rig)
    fields: dict[str, Any] = {"suffix": "sums", "validation_file": file_id, "manylora": {"activate": "if_better"}}
    queue, run = JobQueue(rig.catalog.database), rig.catalog.database.run
    ends = []
    for seed, number in ((1.0, 1), (2.0, 2), (3.0, 3)):
        job_id = (await submit(rig, file_id, **fields)).json()["id"]
        await handed_in(rig, job_id, seed)
        claim = None
        async with asyncio.timeout(PATIENCE_S):
            while claim is None:
                claim = await run(partial(queue.claim_result, "j1", rig.catalog.base, "judging"))
                await asyncio.sleep(0.05)
        assert (await until(rig, job_id, lambda job: True))["status"] == "running"
        assert (await rig.call("POST", f"/v1/fine_tuning/jobs/{job_id}/pause", "acme:manager")).status_code == 409
        shown = (await rig.call("GET", "/v1/adapters/sums", "acme:manager")).json()
        assert (len(shown["versions"]), shown["active_version"]) == (number, None)
        assert await run(partial(queue.hold, claim))
        if number == 1:
            await run(partial(queue.judged, claim, {"promoted": False, "said": "It is no better."}))
        elif number == 2:
            for _ in range(3):  # the judge dies of it
                await run(partial(queue.publish_later, claim, counts=True))
        else:
            assert (await rig.call("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel", "acme:manager")).status_code == 200
        assert not await run(partial(queue.hold, claim))
        ends.append(await until(rig, job_id, lambda job: job["status"] in ("succeeded", "cancelled")))
    assert [job["fine_tuned_model"] for job in ends] == ["sums@1", "sums@2", None]
    assert ends[2]["status"] == "cancelled"
    assert ends[0]["manylora"]["promotion"] == {"promoted": False, "said": "It is no better."}
    assert "could not be compared" in ends[1]["manylora"]["promotion"]["said"]


async def test_a_comparison_goes_past_proxies_and_ends_in_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(judge, "_HOLD_EVERY_S", 0.05)
    file_id = await uploaded(rig)
    fields: dict[str, Any] = {"validation_file": file_id, "manylora": {"activate": "if_better"}}
    job_id = (await submit(rig, file_id, suffix="sums", **fields)).json()["id"]
    await handed_in(rig, job_id)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as proxy:
        silent.setblocking(False)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        files = DataFiles(rig.catalog.database, rig.catalog.store, tmp_path / "got", max_bytes=1, kept_days=1.0)
        compare = Judge(rig.catalog, rig.gate, files, tmp_path / "judged", address=address, model=None)
        compare.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                asking, _ = await loop.sock_accept(silent)
            with asking:
                monkeypatch.setattr(judge, "MAX_JUDGE_S", 0.0)
                job = await until(rig, job_id, lambda job: job["status"] == "succeeded")
            assert "took more than" in job["manylora"]["promotion"]["said"]
        finally:
            await compare.aclose()
            await files.aclose()


async def test_what_cannot_be_published_fails_with_its_reason(rig: Rig) -> None:
    job_id = (await submit(rig, await uploaded(rig), suffix="sums")).json()["id"]
    TenantStore(rig.catalog.database).change("acme", max_adapter_bytes=1)
    await handed_in(rig, job_id)
    job = await until(rig, job_id, lambda job: job["status"] == "failed")
    assert job["error"]["code"] == "quota_exceeded"
    refused = await submit(rig, job["training_file"], suffix="other", validation_file="file-x")
    assert refused.status_code == 400


async def test_a_publication_is_held_while_it_takes_long_and_refused_only_so_often(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HOLD_EVERY_S", 0.01)
    database = rig.catalog.database
    was_held: list[bool] = []

    def run_out() -> None:
        with database.write(None) as session:
            session.execute(update(JobRow).values(lease_until=0))

    def lease() -> int:
        with database.read() as session:
            return session.execute(select(JobRow.lease_until)).scalar_one()

    def refuse(*_: Any, **__: Any) -> Any:
        run_out()
        end = time.monotonic() + PATIENCE_S
        while lease() == 0 and time.monotonic() < end:
            time.sleep(0.01)
        was_held.append(lease() > 0)
        raise Conflict("Somebody else is at it.")

    monkeypatch.setattr(rig.catalog._registry, "publish", refuse)
    job_id = (await submit(rig, await uploaded(rig), suffix="sums")).json()["id"]
    await handed_in(rig, job_id)
    for tries in (1, 2, 3):
        async with asyncio.timeout(PATIENCE_S):
            while len(was_held) < tries:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(PATIENCE_S):
            while (await database.run(partial(_num_lost, database))) < tries:
                await asyncio.sleep(0.05)
        await database.run(run_out)
    assert (await until(rig, job_id, lambda job: job["status"] == "failed"))["error"]["code"] == "server_error"
    assert was_held == [True] * 3


def _num_lost(database: Database) -> int:
    with database.read() as session:
        return session.execute(select(JobRow.num_lost)).scalar_one()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_server_that_dies_while_it_publishes_publishes_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    died = asyncio.Event()
    async with running(settings, *KEYS) as rig:
        registry = rig.catalog._registry
        publish = registry.publish

        def dying(*args: Any, **named: Any) -> Any:
            if moment == "after":
                publish(*args, **named)
            rig.catalog._registry.publish = None  # type: ignore[assignment, method-assign]
            died.set()
            raise KeyError("the process ends here")

        monkeypatch.setattr(registry, "publish", dying)
        job_id = (await submit(rig, await uploaded(rig), suffix="sums")).json()["id"]
        await handed_in(rig, job_id)
        async with asyncio.timeout(PATIENCE_S):
            await died.wait()
    async with running(settings) as rig:
        await rig.make_keys("acme:manager")
        with rig.catalog.database.write(None) as session:
            session.execute(update(JobRow).values(lease_until=0))
        job = await until(rig, job_id, lambda job: job["status"] == "succeeded")
        versions = (await rig.call("GET", "/v1/adapters/sums", "acme:manager")).json()["versions"]
        assert [(each["version"], job["fine_tuned_model"]) for each in versions] == [(1, "sums@1")]


async def test_a_job_cancelled_before_its_publication_publishes_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = (await submit(rig, await uploaded(rig), suffix="sums")).json()["id"]
    keep = rig.catalog._blobs.keep
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()

    def cancel_first(*args: Any) -> Any:
        with rig.catalog.database.write(None) as session:
            session.execute(update(JobRow).values(status="cancelled", worker=None))
        try:
            return keep(*args)
        finally:
            loop.call_soon_threadsafe(tried.set)

    monkeypatch.setattr(rig.catalog._blobs, "keep", cancel_first)
    await handed_in(rig, job_id)
    async with asyncio.timeout(PATIENCE_S):
        await tried.wait()
    with rig.catalog.database.read() as session:
        assert session.execute(select(VersionRow)).first() is None
    assert (await until(rig, job_id, lambda job: True))["status"] == "cancelled"


async def test_files_expire_and_ended_jobs_leave_nothing_behind(rig: Rig, settings: Settings) -> None:
    kept, old = await uploaded(rig), await uploaded(rig)
    job_id = (await submit(rig, kept, suffix="sums")).json()["id"]
    await handed_in(rig, job_id)
    await until(rig, job_id, lambda job: job["status"] == "succeeded")
    with rig.catalog.database.write(None) as session:
        session.execute(update(FileRow).where(FileRow.id == old).values(expires=1))
    assert (await rig.call("GET", f"/v1/files/{old}", "acme:manager")).status_code == 404
    store = settings.data_dir / "store"
    assert len(list((store / "jobs" / job_id).iterdir())) == 3

    await _sweep(rig)

    assert list((store / "jobs" / job_id).iterdir()) == []
    assert old not in {path.name for path in (store / "files").iterdir()}
    assert kept in {path.name for path in (store / "files").iterdir()}
    assert (await rig.call("GET", f"/v1/files/{kept}/content", "acme:manager")).content == lines(ROWS)


async def test_a_file_outlives_its_time_while_a_job_needs_it(rig: Rig, tmp_path: Path) -> None:
    file_id = await uploaded(rig)
    fields: dict[str, Any] = {"suffix": "sums", "validation_file": file_id, "manylora": {"activate": "if_better"}}
    job_id = (await submit(rig, file_id, **fields)).json()["id"]
    with rig.catalog.database.write(None) as session:
        session.execute(update(FileRow).values(expires=1))
    await _sweep(rig)
    assert (await rig.call("GET", f"/v1/files/{file_id}", "acme:manager")).status_code == 404
    claim = await rig.catalog.database.run(partial(JobQueue(rig.catalog.database).claim, "w1", rig.catalog.base))
    assert claim is not None
    assert claim.job.id == job_id
    claim = replace(claim, job=replace(claim.job, result={"label": "sums@1"}))
    files = DataFiles(rig.catalog.database, rig.catalog.store, tmp_path / "other", max_bytes=1, kept_days=1.0)
    judge = Judge(rig.catalog, rig.gate, files, tmp_path, address="http://127.0.0.1", model=None)
    told = await judge._told(claim, tmp_path / "judged")
    assert Path(told["data"]).read_bytes() == lines(ROWS)
    await files.aclose()


async def _sweep(rig: Rig) -> None:
    scratch: Path = rig.settings.data_dir / "swept"
    files = DataFiles(rig.catalog.database, rig.catalog.store, scratch, max_bytes=1, kept_days=1.0)
    await Publisher(rig.catalog, JobQueue(rig.catalog.database), files, rig.metrics).sweep()
    await files.aclose()
