"""`manylora adapters mix`: several adapters saved under one name."""

from typing import Annotated, Any

import typer

from manylora.cli.answers import USAGE, console, fail, print_json, server
from manylora.cli.shown import mixed_of

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add `mix` to the commands."""
    app.command()(mix)


def mix(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the mix is called.")],
    parts: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[@VERSION][=WEIGHT]...", help="Weights from -4 to 4; left out: 1.")
    ],
    description: Annotated[str | None, typer.Option(help="A line about it.")] = None,
    activate: Annotated[
        bool | None,
        typer.Option("--activate/--no-activate", help="Make it the active version; unsaid, a name's first one is."),
    ] = None,
    materialise: Annotated[
        str | None,
        typer.Option(help="Merge them into one adapter with files of its own: ties, dare_linear or dare_ties."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="With --materialise: the share of each adapter's numbers that is kept.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --materialise: decides which numbers DARE drops.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Another tenant's, with an admin key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts instead of a table.")] = False,
) -> None:
    """Save a mix of adapters as a new version of NAME: who names it gets all of them, each times its weight."""
    body: dict[str, Any] = {"name": name, "mix": [_part(text) for text in parts]}
    body |= {"activate": activate} if activate is not None else {}
    asked = {"description": description, "materialise": materialise, "density": density, "seed": seed}
    body |= {name: value for name, value in asked.items() if value is not None}
    with server(as_json=as_json) as remote:
        version = remote.call("POST", "/v1/adapters", json=body, params={} if tenant is None else {"tenant": tenant})
    if as_json:
        print_json(version)
    else:
        active = "active" if version["active"] else "not active"
        what = mixed_of(version) if version["mix"] else f"an adapter of rank {version['rank']}"
        console.print(f"{version['name']}@{version['version']} is {what}, and {active}", markup=False)


def _part(text: str) -> dict[str, Any]:
    """`sql@2=0.7` as an adapter and its weight."""
    label, sign, weight = text.partition("=")
    try:
        return {"name": label, "weight": float(weight) if sign else 1.0}
    except ValueError:
        fail(f"'{text}' is not ADAPTER=WEIGHT.", USAGE)
