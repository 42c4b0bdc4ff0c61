"""`manylora adapters canary`: a version is tried on a share of an adapter's requests."""

import re
import time
from typing import Annotated, Any, Final

import typer

from manylora.cli.answers import USAGE, as_time, console, fail, print_json, server, table
from manylora.cli.shown import or_dash

__all__ = ["register"]

_LABEL: Final = re.compile(r"([^@/?#]+)(?:@([1-9][0-9]*))?")


def register(app: typer.Typer) -> None:
    """Add `canary` to the commands."""
    app.command()(canary)


def canary(
    label: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The version to try; without one, show it.")],
    share: Annotated[float | None, typer.Option(help="The part of the requests that it answers, such as 0.1.")] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="End it after so long; unsaid, somebody does.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the one that runs.")] = False,
    note: Annotated[str | None, typer.Option(help="Why, for the history.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Another tenant's, with an admin key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts instead of a table.")] = False,
) -> None:
    """Let NAME@VERSION answer a share of the requests for NAME, beside the active version.

    It ends by itself where it fails more often, and with any promotion. NAME alone shows what came of it so far.
    """
    match = _LABEL.fullmatch(label)
    if match is None:
        fail(f"'{label}' is not NAME or NAME@VERSION.", USAGE)
    name, version = match[1], match[2]
    if (share is None) != (version is None or stop):
        fail("Say NAME@VERSION with --share to begin one, NAME --stop to end it, and NAME to see it.", USAGE)
    path, params = f"/v1/adapters/{name}/canary", {} if tenant is None else {"tenant": tenant}
    with server(as_json=as_json) as remote:
        if share is not None:
            body: dict[str, Any] = {"version": int(version or 0), "share": share}
            body |= {} if hours is None else {"until": int(time.time() + hours * 3600)}
            body |= {} if note is None else {"note": note}
            found = remote.call("PUT", path, json=body, params=params)
        else:
            found = remote.call("DELETE" if stop else "GET", path, params=params)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    state = "runs" if found["ended"] is None else f"ended {as_time(found['ended'])} ({found['reason']})"
    until = "" if found["until"] is None or found["ended"] else f" until {as_time(found['until'])}"
    console.print(f"{found['name']}@{found['version']} at {found['share']:.4g} {state}{until}", markup=False)
    rows = [
        [
            str(arm["version"]),
            "canary" if arm["version"] == found["version"] else "active",
            str(arm["requests"]),
            str(arm["outcomes"].get("error", 0)),
            str(arm["completion_tokens"]),
            or_dash(arm["mean_ttft_s"] and f"{arm['mean_ttft_s'] * 1000:.0f} ms"),
        ]
        for arm in found["versions"]
    ]
    console.print(table(["version", "", "requests", "failed", "tokens", "mean TTFT"], rows))
