"""`manylora jobs …`: fine-tuning jobs of a server: submit rows, follow a training, end it.

The server is `MANYLORA_URL`, the key `MANYLORA_KEY`; see `cli.answers` for the exit codes.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.answers import FAILED, USAGE, Remote, as_time, complaints, console, fail, print_json, server, table
from manylora.cli.flags import words_of
from manylora.client.adapters import served_base
from manylora.client.jobs import JOBS, PAGE, create_job, events_behind
from manylora.errors import InvalidRequest

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
    is_followed: Annotated[bool, typer.Option("--follow", help="Wait for the end, and show what happens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload rows and ask for a training on them. With --follow, exit code 1 if it fails or is cancelled."""
    chosen = {
        "n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": lr_multiplier, "beta": beta,
    }  # fmt: skip
    more = {
        "name": name, "activate": activate, "rank": rank, "alpha": alpha, "instruction": instruction, "render": render,
        "max_length": max_length, "targets": None if targets is None else list(words_of(targets)),
    }  # fmt: skip
    with server(as_json=as_json) as remote:
        training_file, validation_file = _uploaded(remote, data, held_out)
        job = create_job(
            remote,
            model=start or served_base(remote),
            training_file=training_file,
            validation_file=validation_file,
            seed=seed,
            method=method,
            hyperparameters=chosen,
            more=more,
        )
        if is_followed:
            job = remote.follow(job["id"], partial(_tell, as_json=as_json))
        _show(job, as_json=as_json)
    if is_followed and job["status"] != "succeeded":
        raise typer.Exit(FAILED)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="The newest so many.")] = 20, as_json: AsJson = False
) -> None:
    """Your jobs, newest first."""
    with server(as_json=as_json) as remote:
        jobs = remote.call("GET", JOBS, params={"limit": limit})["data"]
    if as_json:
        print_json(jobs)
        return
    rows = [[job["id"], job["manylora"]["name"], _state(job), as_time(job["created_at"])] for job in jobs]
    console.print(table(["job", "adapter", "status", "created"], rows))


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """One job, as it stands now."""
    with server(as_json=as_json) as remote:
        _show(remote.call("GET", f"{JOBS}/{job_id}"), as_json=as_json)


@app.command()
def events(
    job_id: JobId,
    is_followed: Annotated[bool, typer.Option("--follow", help="Go on until the job has ended.")] = False,
    report_to: Annotated[
        str, typer.Option(help="Write the curves for tensorboard, wandb or mlflow, comma-separated, on this machine.")
    ] = "",
    report_dir: Annotated[Path, typer.Option(help="Where to.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """What was told of a job, oldest first. With --json each event is a line.

    With --follow, exit code 1 if it fails or is cancelled.
    """
    with server(as_json=as_json) as remote, _figures_in(report_dir, words_of(report_to), remote, job_id) as figures:

        def tell(job: dict[str, Any], event: dict[str, Any]) -> None:
            _tell(job, event, as_json=as_json)
            figures(event)

        if is_followed:
            job = remote.follow(job_id, tell)
            if job["status"] != "succeeded":
                raise typer.Exit(FAILED)
            return
        for event in events_behind(remote, job_id, 0):
            tell({}, event)


@contextmanager
def _figures_in(
    folder: Path, names: tuple[str, ...], remote: Remote, job_id: str
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes events, and writes the figures of steps for the packages that were named."""
    if not names:
        yield lambda _: None
        return
    from manylora.lifecycle.parameters import renamed
    from manylora.lifecycle.progress import Progress
    from manylora.lifecycle.trackers import check_trackers, tracked

    try:
        check_trackers(names)
    except InvalidRequest as error:
        fail(renamed(error.message, {"report_to": "--report-to"}), USAGE)
    job = remote.call("GET", f"{JOBS}/{job_id}")
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
        _show(remote.call("POST", f"{JOBS}/{job_id}/{action}"), as_json=as_json)


def _uploaded(remote: Remote, data: Path, held_out: Path | None) -> tuple[str, str | None]:
    from manylora.lifecycle.data.upload import upload_data

    try:
        return upload_data(remote, data, held_out)
    except InvalidRequest as error:
        fail(error.message, USAGE)


def _tell(_: dict[str, Any], event: dict[str, Any], *, as_json: bool) -> None:
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
