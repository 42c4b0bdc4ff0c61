"""`manylora cluster`: replicas of a server behind one address, on Ray Serve."""

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora import __version__
from manylora.cli.serve import given, with_flags
from manylora.settings import load_settings

if TYPE_CHECKING:
    from manylora.cluster.run import Started

__all__ = ["FLAGS", "register"]

_HELP = """Serve MODEL from several replicas behind one address, on Ray Serve.

Replicas share a PostgreSQL database (--database-url) and a store. Requests go to a replica that has their adapter in
memory. Settings are those of `manylora serve`; docs/cluster.md has the rest.
"""

# The fields of a cluster's shape, and where Ray is.
FLAGS: dict[str, tuple[Any, Any]] = {
    "replicas": (int, typer.Option("--replicas", min=1, help="Replicas of the model; where they scale, the fewest.")),
    "max_replicas": (
        int | None,
        typer.Option("--max-replicas", min=1, help="The most replicas that requests may bring about."),
    ),
    "target_requests": (
        float | None,
        typer.Option("--target-requests", help="Requests for each replica that scaling aims at."),
    ),
    "up_after_s": (
        float,
        typer.Option("--up-after-s", min=0, help="Seconds of too many requests before a replica is added."),
    ),
    "down_after_s": (
        float,
        typer.Option("--down-after-s", min=0, help="Seconds of too few requests before a replica goes."),
    ),
    "ingresses": (int, typer.Option("--ingresses", min=1, help="Processes that requests come in through.")),
    "cpus": (float, typer.Option("--cpus", min=0, help="CPUs that Ray counts as taken by each replica.")),
    "gpus": (float, typer.Option("--gpus", min=0, help="GPUs that each replica has to itself.")),
    "surge_percent": (
        int,
        typer.Option("--surge-percent", min=0, max=100, help="More replicas that an update may start first."),
    ),
    "address": (
        str | None,
        typer.Option("--address", help="A Ray cluster to start or update it on, and to leave (auto: this machine's)."),
    ),
}
_DEFAULTS = {
    "replicas": 2, "up_after_s": 20.0, "down_after_s": 300.0, "ingresses": 1, "cpus": 1.0, "gpus": 0.0,
    "surge_percent": 0,
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add `cluster` to `app`."""
    more = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=Annotated[kind, option]
        )
        for name, (kind, option) in FLAGS.items()
    ]
    app.command("cluster", help=_HELP)(with_flags(_cluster, *more))


def _cluster(*, address: str | None, **flags: Any) -> None:
    size = {name: value for name in FLAGS if (value := flags.pop(name, None)) is not None}
    settings = load_settings(**given(flags))
    from manylora.cluster.run import run

    typer.echo(f"manylora {__version__} is starting {size['replicas']} replicas …", err=True)
    run(settings, size, _announce, address=address)


def _announce(what: "Started") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]manylora[/] answers from [bold]{what.replicas}[/] replicas")
    for title, path in {"API": "/v1", "Dashboard": "/dashboard", "Docs": "/docs"}.items():
        console.print(f"  {title:10} {what.url}{path}")
    if what.goes_on:
        console.print("  It goes on. `serve status` says how it is, `serve shutdown` ends it.")
