"""`manylora worker`: takes up fine-tuning jobs of a server, on the server's machine or another."""

from pathlib import Path
from typing import Annotated

import typer

from manylora.cli.store import DatabaseUrl, DataDir, StoreUrl

__all__ = ["register"]


def register(program: typer.Typer) -> None:
    """Add `worker` to the program."""
    program.command()(worker)


def worker(
    model: Annotated[
        str | None, typer.Argument(help="The server's base model; default: MANYLORA_MODEL, or the embedded one.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Jobs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each job (default: 1).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto (default: cpu).")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Train fine-tuning jobs until a signal ends it: what is under way is put back with its checkpoint.

    It works on the server's own database and store. On another machine these are a PostgreSQL database and a store that
    both reach, and --data-dir is a folder of its own.
    """
    from manylora.jobs.worker_process import Assignment, stop_on_signals, work
    from manylora.log import configure_logging
    from manylora.settings import load_settings

    settings = load_settings(
        model=model, data_dir=data_dir, database_url=database_url, store_url=store_url, job_threads=threads,
        job_device=device,
    )  # fmt: skip
    configure_logging(level=settings.log_level, as_json=settings.log_json)
    typer.echo(f"A worker for up to {jobs} jobs at a time on {Path(settings.data_dir)} starts …", err=True)
    work(Assignment.of(settings, seats=jobs), stop_on_signals())
