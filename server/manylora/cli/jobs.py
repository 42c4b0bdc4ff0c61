"""`manylora jobs …`: fine-tuning jobs of a server: submit rows, follow a training, end it.

The server is `MANYLORA_URL`, the key `MANYLORA_KEY`; see `cli.answers` for the exit codes.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import typer

from manylora.cli.answers import FAILED, USAGE, Remote, as_time, complaints, console, fail, print_json, server, table
from manylora.cli.flags import words_of

if TYPE_CHECKING:
    from manylora.lifecycle.progress import Progress

__all__ = ["register"]

app = typer.Typer(
    no_args_is_help=True,
    help="Submit, follow and end fine-tuning jobs of a server.",
    epilog="Asks the server at MANYLORA_URL (http://127.0.0.1:8000 unless set) with the key in MANYLORA_KEY.",
)

AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts instead of text.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `jobs list` shows it.")]
_JOBS: Final = "/v1/fine_tuning/jobs"
_ENDED: Final = ("succeeded", "failed", "cancelled")
_EVERY_S: Final = 1.0
_PAGE: Final = 1000
_ARROW: Final = ".arrow"


def register(program: typer.Typer) -> None:
    """Add `jobs` to the program."""
    program.add_typer(app, name="jobs")


@app.command()
def submit(
    data: Annotated[Path, typer.Argument(help="Rows: .jsonl, .json, .csv, .tsv or .parquet, or a folder of them.")],
    held_out: Annotated[Path | None, typer.Option("--eval", help="Held-out rows, to keep the best step.")] = None,
    start: Annotated[str | None, typer.Option(help="An adapter of the server to go on from, NAME[@VERSION].")] = None,
    name: Annotated[str | None, typer.Option(help="The adapter whose next version comes out.")] = None,
    activate: Annotated[
        str, typer.Option(help="Whether its name means the version: never, always or if_better.")
    ] = "never",
    epochs: Annotated[int | None, typer.Option(help="Times that each row is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one forward pass.")] = None,
    lr_multiplier: Annotated[float | None, typer.Option(help="Multiplies the default learning rate.")] = None,
    method: Annotated[str, typer.Option(help="How it learns: supervised, or dpo from preferences.")] = "supervised",
    beta: Annotated[float | None, typer.Option(help="DPO: how dearly it pays to leave the base's answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same one gives the same adapter.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank matrices.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale numerator; twice the rank when left out.")] = None,
    targets: Annotated[str | None, typer.Option(help="Linears by name, comma-separated.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Text before every prompt, on a line of its own.")] = None,
    render: Annotated[str | None, typer.Option(help="How a row becomes text: auto, chat or plain.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for the end, and show what happens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload rows and ask for a training on them. With --follow, exit code 1 if it fails or is cancelled."""
    for path in (data, held_out):
        if path is not None and not _parts(path)[0].is_file():
            fail(f"{path} is not a file.", USAGE)
    chosen = {
        "n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": lr_multiplier, "beta": beta,
    }  # fmt: skip
    more = {
        "name": name, "activate": activate, "rank": rank, "alpha": alpha, "instruction": instruction, "render": render,
        "max_length": max_length, "targets": None if targets is None else list(words_of(targets)),
    }  # fmt: skip
    with server(as_json=as_json) as remote:
        body: dict[str, Any] = {
            "model": start or _base(remote),
            "training_file": _uploaded(remote, data),
            "validation_file": None if held_out is None else _uploaded(remote, held_out),
            "seed": seed,
            "method": {"type": method, method: {"hyperparameters": _given(chosen)}},
            "manylora": _given(more),
        }
        job = remote.call("POST", _JOBS, json=_given(body))
        if follow:
            job = _follow(remote, job["id"], as_json=as_json)
        _show(job, as_json=as_json)
    if follow and job["status"] != "succeeded":
        raise typer.Exit(FAILED)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=_PAGE, help="The newest so many.")] = 20, as_json: AsJson = False
) -> None:
    """Your jobs, newest first."""
    with server(as_json=as_json) as remote:
        jobs = remote.call("GET", _JOBS, params={"limit": limit})["data"]
    if as_json:
        print_json(jobs)
        return
    rows = [[job["id"], job["manylora"]["name"], _state(job), as_time(job["created_at"])] for job in jobs]
    console.print(table(["job", "adapter", "status", "created"], rows))


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """One job, as it stands now."""
    with server(as_json=as_json) as remote:
        _show(remote.call("GET", f"{_JOBS}/{job_id}"), as_json=as_json)


@app.command()
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job has ended.")] = False,
    report_to: Annotated[
        str, typer.Option(help="Write the curves for tensorboard, wandb or mlflow, comma-separated, on this machine.")
    ] = "",
    report_dir: Annotated[Path, typer.Option(help="Where to.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """What was told of a job, oldest first. With --json each event is a line."""
    with server(as_json=as_json) as remote, _figures_in(report_dir, words_of(report_to), remote, job_id) as figures:
        if follow:
            _follow(remote, job_id, as_json=as_json, figures=figures)
            return
        for event in _events(remote, job_id, after=0):
            _tell(event, as_json=as_json)
            figures(event)


@contextmanager
def _figures_in(
    folder: Path, names: tuple[str, ...], remote: Remote, job_id: str
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes events, and writes the figures of steps for the packages that were named."""
    if not names:
        yield lambda _: None
        return
    from manylora.errors import InvalidRequest
    from manylora.lifecycle.parameters import renamed
    from manylora.lifecycle.progress import Progress
    from manylora.lifecycle.trackers import check_trackers, tracked

    try:
        check_trackers(names)
    except InvalidRequest as error:
        fail(renamed(error.message, {"report_to": "--report-to"}), USAGE)
    job = remote.call("GET", f"{_JOBS}/{job_id}")
    settings = {"job": job_id, "model": job["model"], "seed": job["seed"], **job["hyperparameters"]}
    with tracked(names, folder, job["manylora"]["name"], settings, _warn) as listen:

        def take(event: dict[str, Any]) -> None:
            if event["type"] == "metrics":
                values = dict(event["data"])
                step, total = values.pop("step"), values.pop("total_steps")
                listen(Progress("train", step, total, values=values))

        yield take


def _warn(event: "Progress") -> None:
    if event.message:
        complaints.print(event.message, style="yellow", markup=False, soft_wrap=True)


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """End a job at once; nothing more of it is published."""
    _change(job_id, "cancel", as_json=as_json)


@app.command()
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a job leave off after the step that runs."""
    _change(job_id, "pause", as_json=as_json)


@app.command()
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on."""
    _change(job_id, "resume", as_json=as_json)


def _change(job_id: str, action: str, *, as_json: bool) -> None:
    with server(as_json=as_json) as remote:
        _show(remote.call("POST", f"{_JOBS}/{job_id}/{action}"), as_json=as_json)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _base(remote: Remote) -> str:
    """What the server calls its base: the model that has no parent."""
    models = remote.call("GET", "/v1/models")["data"]
    return str(next(model["id"] for model in models if not model.get("parent")))


def _parts(path: Path) -> list[Path]:
    from manylora.errors import InvalidRequest
    from manylora.lifecycle.data.folders import parts_of

    try:
        return parts_of(path)
    except InvalidRequest as error:
        fail(error.message, USAGE)


def _uploaded(remote: Remote, path: Path) -> str:
    with _as_one_file(path) as file:
        name = path.name if _parts(path) == [path] and path.suffix != _ARROW else f"{path.stem}.jsonl"
        made = remote.call("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, file)})
    return str(made["id"])


@contextmanager
def _as_one_file(path: Path) -> Iterator[IO[bytes]]:
    """The file; of a folder, and of Arrow's files, which servers do not take from strangers, the rows as JSON lines."""
    from manylora.errors import InvalidRequest
    from manylora.lifecycle.data.files import AS_IT_IS, rows_of

    if _parts(path) == [path] and path.suffix != _ARROW:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        try:
            for _, row in rows_of(path, AS_IT_IS):
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        except InvalidRequest as error:
            fail(error.message, USAGE)
        file.seek(0)
        yield file


def _events(remote: Remote, job_id: str, *, after: int) -> list[dict[str, Any]]:
    """The events behind number `after`, oldest first."""
    return list(reversed(list(_newest(remote, job_id, after))))


def _newest(remote: Remote, job_id: str, until: int) -> Iterator[dict[str, Any]]:
    params: dict[str, Any] = {"limit": _PAGE}
    while True:
        page = remote.call("GET", f"{_JOBS}/{job_id}/events", params=params)
        for event in page["data"]:
            if _number(event) <= until:
                return
            yield event
        if not page["has_more"]:
            return
        params["after"] = page["last_id"]


def _number(event: dict[str, Any]) -> int:
    return int(event["id"].rpartition("-")[2])


def _follow(
    remote: Remote, job_id: str, *, as_json: bool, figures: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Tell what happens until the job has ended; the job. `figures` takes each event, too."""
    seen = 0
    while True:
        job: dict[str, Any] = remote.call("GET", f"{_JOBS}/{job_id}")  # before its events: the last one is not missed
        for event in _events(remote, job_id, after=seen):
            _tell(event, as_json=as_json)
            figures(event)
            seen = _number(event)
        if job["status"] in _ENDED:
            return job
        time.sleep(_EVERY_S)


def _tell(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(event) + "\n")  # a line each, as they come
        sys.stdout.flush()
        return
    style = {"warn": "yellow", "error": "red"}.get(event["level"])
    text = "".join(c if c.isprintable() else "�" for c in event["message"])
    console.print(f"{as_time(event['created_at'])}  {text}", style=style, markup=False, soft_wrap=True)


def _state(job: dict[str, Any]) -> str:
    if job["status"] == "succeeded":
        return f"succeeded: {job['fine_tuned_model']}"
    return f"failed: {job['error']['message']}" if job["status"] == "failed" else str(job["status"])


def _show(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    chosen = job["hyperparameters"]
    rows = [
        ["job", job["id"]],
        ["adapter", job["manylora"]["name"]],
        ["status", _state(job)],
        ["steps done", str(job["manylora"]["step"])],
        ["training", ", ".join(f"{name} {value:g}" for name, value in chosen.items())],
        ["created", as_time(job["created_at"])],
        *([["ends about", as_time(job["estimated_finish"])]] if job["estimated_finish"] else []),
    ]
    console.print(table(["", ""], rows))
