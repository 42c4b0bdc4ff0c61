"""The comparison of policies: a table for each setting, as Markdown, and a picture if asked for."""

from pathlib import Path
from typing import Annotated, Final

import typer

from manylora_loadtest.cluster.picture import draw
from manylora_loadtest.cluster.policies import POLICIES
from manylora_loadtest.cluster.replicas import DEVICE, STORE, Shape
from manylora_loadtest.cluster.simulation import Loss, Outcome, simulate
from manylora_loadtest.cluster.workload import Crowd, Workload, drawn, read_llm_trace

app = typer.Typer(pretty_exceptions_enable=False)
SETTINGS: Final = ((0.7, 1.0), (0.9, 0.9), (0.9, 1.1))  # load, and exponent of Zipf
_RUN_S: Final = 2.0
_HEAD: Final = (
    "| policy | on the device | from the store | p99, s | p99 of the crowd, s | imbalance |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


def row(name: str, outcome: Outcome) -> str:
    shares = f"{outcome.share(DEVICE):.0%} | {outcome.share(STORE):.0%}"
    return f"| {name} | {shares} | {outcome.p99_s():.1f} | {outcome.crowd_p99_s():.1f} | {outcome.imbalance:.2f} |"


@app.command()
def compare(
    requests: Annotated[int, typer.Option(help="Requests of each run.")] = 150_000,
    adapters: Annotated[int, typer.Option(help="Adapters there are.")] = 100_000,
    replicas: Annotated[int, typer.Option(help="Servers.")] = 100,
    lose: Annotated[int, typer.Option(help="Servers that are gone at once, after six tenths of the time.")] = 0,
    seed: int = 1,
    trace: Annotated[Path | None, typer.Option(help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens.")] = None,
    speed: Annotated[float, typer.Option(help="How much faster the trace runs.")] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="Picture to write, such as a .png.")] = None,
) -> None:
    """Send the same requests through a simulated cluster with each policy."""
    shape = Shape(num_replicas=replicas)
    loss = Loss(num_replicas=lose) if lose else None
    found: dict[str, dict[str, Outcome]] = {}
    for load, zipf in SETTINGS if trace is None else ((0.0, 1.0),):
        work: Workload
        if trace is None:
            rate = load * shape.num_replicas * shape.seats / _RUN_S
            work = drawn(requests, adapters, rate, zipf, _RUN_S, crowd=Crowd(), seed=seed)
            title = f"Load {load}, Zipf {zipf}"
        else:
            work = read_llm_trace(trace, adapters, zipf, speed=speed, seed=seed)
            title = f"{trace.name}, {speed:g} times as fast, Zipf {zipf}"
        typer.echo(f"\n{title}:\n\n{_HEAD}")
        found[title] = {}
        for name, policy in POLICIES.items():
            found[title][name] = simulate(work, policy, shape, loss=loss, seed=seed)
            typer.echo(row(name, found[title][name]))
    if picture is not None:
        draw(found, picture)


if __name__ == "__main__":
    app()
