"""`manylora train --server URL`: the training runs as a job of that server, and is followed here.

Each option that was typed is a field of the job, or is refused by its name: nothing is typed for nothing.
"""

import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import typer

from manylora.cli.answers import next_steps, program_at
from manylora.cli.terminal import INTERRUPTED, Rendered, console, progress
from manylora.client.adapters import Publication, active_version, check_name, served_base
from manylora.client.jobs import JOBS, create_job, follow
from manylora.client.server import Refused, Server, connect
from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.train.config import JOB_LR, TrainConfig

if TYPE_CHECKING:
    from manylora.lifecycle.progress import Progress

__all__ = ["REFUSED", "SENT", "train_on", "typed_options"]

_HYPERPARAMETERS: Final = {"epochs": "n_epochs", "batch_size": "batch_size", "beta": "beta"}
_OF_SHAPE: Final = ("rank", "alpha", "targets", "dropout", "rslora", "dora", "init", "trained_tokens")
_OF_SCHEDULE: Final = ("accumulate", "lr_ratio", "warmup", "weight_decay", "early_stop", "eval_every")
_OF_TRAINING: Final = ("instruction", "render", "max_length", "sample")
SENT: Final = frozenset(
    {
        *_HYPERPARAMETERS, *_OF_SHAPE, *_OF_SCHEDULE, *_OF_TRAINING,
        "data", "eval_data", "columns", "encoding", "base", "start", "method", "lr", "seed", "name", "activate",
        "server", "key", "settings_file",
    }
)  # fmt: skip
"""Options of `train` that a job has a field for, or that say where to send it."""
REFUSED: Final[Mapping[str, str]] = {
    "out": "the adapter becomes a version on the server",
    "overwrite": "nothing is written here, and a name that is there gets its next version",
    "resume": "a job goes on by itself, and a paused one with `manylora jobs resume`",
    "publish": "a job publishes its adapter: say `--name`",
    "report_to": "`manylora jobs events JOB --follow --report-to` writes a job's curves",
    "preview": "it needs the base here: leave `--server` out",
    "test_data": "`manylora evaluate --server` scores the version",
    "task": "jobs train what writes",
    "title": "the card is called as the adapter",
    "base_name": "the server knows its base's name",
    "device": "the server's worker decides",
    "dtype": "the server's worker decides",
    "threads": "the server's worker decides",
    "tool_prompt": "the server's `--tool-prompt` decides",
    "max_grad_norm": "a job has no field for it",
    "checkpoint_every": "a job has no field for it",
}
"""Options of `train` that a job has no field for, and why."""
_TYPED: Final = ("COMMANDLINE", "DEFAULT_MAP")
# A field of a job where a message of the server names it: in quotes, as the place of a fault, or a file as it is.
_FIELD: Final = re.compile(
    r"'?\b(?:manylora|method(?:\.\w+\.hyperparameters)?)\.(\w+)'?|'(\w+)'|\b(training_file|validation_file)\b"
)
_FIELDS: Final = {
    "training_file": "data", "validation_file": "eval_data", "model": "base", "suffix": "name", "n_epochs": "epochs",
    "learning_rate_multiplier": "lr", "type": "method",
}  # fmt: skip


def typed_options(context: typer.Context) -> frozenset[str]:
    """The options of the command that were typed, or stand in the file of `--config`: not by the environment."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name in _TYPED)


def train_on(
    address: str,
    key: str,
    config: TrainConfig,
    typed: frozenset[str],
    *,
    name: str,
    activate: bool | None,
    rendered: Rendered,
) -> None:
    """Submit the training, show how it goes, and say which version came of it. Raises ManyloraError or typer.Exit."""
    _check(typed)
    with connect(address, key, is_patient=True) as server:
        if name:
            check_name(server, name, called="name")
        job = _submitted(server, config, typed, name, activate)
        try:
            console.print(f"{job['id']}: submitted to {address}", highlight=False)
            with progress(rendered) as listen:
                job = follow(server, job["id"], lambda job, event: listen(_as_progress(job, event)))
        except KeyboardInterrupt:
            _leave(server, address, job["id"])
            raise typer.Exit(INTERRUPTED) from None
        except ManyloraError:
            _say_how_to_follow(address, job["id"])
            raise
        if job["status"] != "succeeded":
            why = "" if job["error"] is None else f": {job['error']['message']}"
            raise ManyloraError(f"{job['id']} has {'been ' * (not why)}{job['status']}{why}")
        _say_result(server, address, job)


def _check(typed: frozenset[str]) -> None:
    """Raises InvalidRequest, naming each option that a job has no place for."""
    refused = [f"`{option}` ({REFUSED[option]})" for option in sorted(typed - SENT)]
    if refused:
        raise InvalidRequest(f"With `server`, which trains on that server, there is no {', no '.join(refused)}.")
    if {"base", "start"} <= typed:
        raise InvalidRequest("`start` names the adapter of the server to go on from, which has its base: drop `base`.")


def _submitted(
    server: Server, config: TrainConfig, typed: frozenset[str], name: str, activate: bool | None
) -> dict[str, Any]:
    from manylora.lifecycle.data.upload import upload_data

    if config.start is not None and config.start.is_dir():
        raise InvalidRequest(f"`start` is an adapter of the server, NAME[@VERSION]; {config.start} is a folder here.")
    if activate is None:  # as of an upload: only a name's first version answers to it at once
        activate = not name or _active_version(server, name) is None
    try:
        training_file, validation_file = upload_data(server, config.data, config.eval_data, config.reading)
        return create_job(
            server,
            model=_model(server, config, typed),
            training_file=training_file,
            validation_file=validation_file,
            seed=config.schedule.seed,
            method=config.method,
            hyperparameters=_hyperparameters(config, typed),
            more={"name": name or None, "activate": "always" if activate else "never", **_more(config, typed)},
        )
    except Refused as refused:
        if refused.error is None:
            raise
        raise InvalidRequest(_as_typed(refused.error["message"])) from refused


def _model(server: Server, config: TrainConfig, typed: frozenset[str]) -> str:
    if "start" in typed:
        return str(config.start)
    return str(config.base) if "base" in typed else served_base(server)


def _hyperparameters(config: TrainConfig, typed: frozenset[str]) -> dict[str, Any]:
    values = {"epochs": config.schedule.epochs, "batch_size": config.schedule.batch_size, "beta": config.beta}
    chosen: dict[str, Any] = {_HYPERPARAMETERS[option]: value for option, value in values.items() if option in typed}
    if "lr" in typed:
        chosen["learning_rate_multiplier"] = config.schedule.lr / JOB_LR[config.method]
    return chosen


def _more(config: TrainConfig, typed: frozenset[str]) -> dict[str, Any]:
    parts = ((config.lora, _OF_SHAPE), (config.schedule, _OF_SCHEDULE), (config, _OF_TRAINING))
    return {option: getattr(part, option) for part, options in parts for option in options if option in typed}


def _active_version(server: Server, name: str) -> str | None:
    try:
        return active_version(server, name)
    except Refused as refused:
        if refused.answered != 404:
            raise
        return None


def _as_typed(message: str) -> str:
    """The server's message with a job's fields called as the lifecycle's parameters are, in backticks."""

    def called(field: re.Match[str]) -> str:
        name = next(filter(None, field.groups()))
        option = _FIELDS.get(name, name)
        return f"`{option}`" if option in SENT else field[0]

    return _FIELD.sub(called, message)


def _as_progress(job: Mapping[str, Any], event: Mapping[str, Any]) -> "Progress":
    """An event as the local command tells it."""
    from manylora.lifecycle.progress import Progress

    if event["type"] == "metrics":
        figures = dict(event["data"])
        step, total = figures.pop("step"), figures.pop("total_steps")
        values = {name.removeprefix("train_").replace("valid_", "eval_"): value for name, value in figures.items()}
        if job["estimated_finish"] is not None:
            values["remaining_s"] = max(0.0, job["estimated_finish"] - time.time())
        return Progress("train", step, total, values=values)
    message, data = event["message"], event["data"] or {}
    if "answered" in data:
        message = f"step {data['step']}, row {data['row']}: {data['answered']!r}, wanted {data['wanted']!r}"
    text = "".join(c if c.isprintable() else "�" for c in _as_typed(message))
    return Progress("job" if event["level"] == "info" else "warning", message=text)


def _leave(server: Server, address: str, job_id: str) -> None:
    """The job is kept, unless a person says otherwise."""
    if sys.stdin.isatty():
        try:
            is_over = typer.confirm(f"End {job_id}, too?", default=False, err=True)
        except typer.Abort:
            console.print()
            is_over = False
        if is_over:
            server.call("POST", f"{JOBS}/{job_id}/cancel")
            console.print(f"{job_id} is cancelled.", highlight=False)
            return
    _say_how_to_follow(address, job_id)


def _say_how_to_follow(address: str, job_id: str) -> None:
    manylora = program_at(address)
    for line in (
        f"{job_id} goes on without this command.",
        f"  follow: {manylora} jobs events {job_id} --follow",
        f"  end:    {manylora} jobs cancel {job_id}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _say_result(server: Server, address: str, job: Mapping[str, Any]) -> None:
    label = str(job["fine_tuned_model"])
    print(f"{label}: {job['manylora']['step']} steps")
    done = Publication(label, active_version(server, label.partition("@")[0]))
    for line in next_steps(done, address):
        print(line)
