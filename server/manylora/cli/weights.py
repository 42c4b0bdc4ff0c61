"""The commands that work on weights alone: extract, compress, merge, inspect."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from manylora.cli.flags import Flags, Spelling
from manylora.cli.tables import print_factors, print_inspection
from manylora.cli.terminal import command, console, progress
from manylora.lifecycle.weights.config import (
    DEFAULT,
    CompressConfig,
    ExtractConfig,
    InspectConfig,
    MergeConfig,
    parse_adapter,
)

_Overwrite = Annotated[bool, typer.Option(help="Replace --out.")]


def _model(base: str) -> str | None:
    return None if base == DEFAULT else base


_EXTRACTION = Flags(
    ExtractConfig, spelled={"base": Spelling(read=_model, default=DEFAULT)}, without=frozenset({"command"})
)
_COMPRESSION = Flags(CompressConfig, spelled={"adapter": Spelling(is_argument=True)}, without=frozenset({"command"}))
_MERGE = Flags(
    MergeConfig,
    spelled={"adapters": Spelling("--adapter", read=parse_adapter, is_repeated=True)},
    without=frozenset({"command", "into_base", "base"}),
)
_INSPECTION = Flags(InspectConfig, spelled={"adapter": Spelling(is_argument=True)}, called={"out": "--png"})


@_EXTRACTION.command
def extract(config: ExtractConfig, overwrite: _Overwrite = False) -> None:
    """Make an adapter out of a full fine-tune, by the truncated SVD of each linear's change."""
    from manylora.lifecycle.weights.extract import extract as run

    with progress(_EXTRACTION.rendered) as listen:
        report = run(replace(config, command=command()), overwrite=overwrite, listen=listen)
    print_factors(report["modules"])
    for entry in report["not_expressed"]:
        console.print(f"not expressed: {entry['parameter']} changed by {entry['norm']:.3g}", style="yellow")
    found = report["difference"]["adapter"]
    print(f"{config.out}: {_difference('the fine-tune', found)}")


@_COMPRESSION.command
def compress(config: CompressConfig, overwrite: _Overwrite = False) -> None:
    """Re-factorise an adapter at a smaller rank, the best possible for each module."""
    from manylora.lifecycle.weights.compress import compress as run

    with progress(_COMPRESSION.rendered) as listen:
        report = run(replace(config, command=command()), overwrite=overwrite, listen=listen)
    print_factors(report["modules"])
    print(f"{config.out}: {report['size_bytes'] / 1e6:.2f} MB, was {report['size_bytes_before'] / 1e6:.2f} MB")


@_MERGE.command
def merge(
    config: MergeConfig,
    base: Annotated[str, typer.Option(help="Into this base (`default`: the default model); else one adapter.")] = "",
    overwrite: _Overwrite = False,
) -> None:
    """Merge adapters into the base as an ordinary checkpoint, or several adapters into one."""
    from manylora.lifecycle.weights.merge import merge as run

    config = replace(config, into_base=bool(base), base=_model(base) if base else None, command=command())
    with progress(_MERGE.rendered) as listen:
        report = run(config, overwrite=overwrite, listen=listen)
    if "modules" in report:
        print_factors(report["modules"])
        print(f"{config.out}: {report['size_bytes'] / 1e6:.2f} MB")
    if "difference" in report:
        print(f"{config.out}: {_difference('base + adapters', report['difference'])}")


@_INSPECTION.command
def inspect(
    config: InspectConfig,
    png: Annotated[Path | None, typer.Option(help="Folder for the pictures and inspect.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON on stdout.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --png.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="A line for each module, however many there are.")] = False,
) -> None:
    """Show what an adapter changes, how much of its rank it uses, and how like another one it is."""
    from manylora.lifecycle.extras import need
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.weights.inspection import draw, inspect_adapter

    with progress(_INSPECTION.rendered) as listen:
        need(*(["scipy"] if config.against is not None else []), *(["matplotlib"] if png is not None else []))
        if png is not None:
            refuse_existing(png, overwrite=overwrite)
        report = inspect_adapter(config, listen)
        if png is not None:
            draw(report, png, overwrite=overwrite, listen=listen)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    print_inspection(report, is_by_kind=not modules)
    for warning in report["warnings"]:
        console.print(warning, style="yellow", markup=False)


def _difference(reference: str, found: dict[str, float]) -> str:
    largest, same = found["max_abs_logit"], found["same_top_token"]
    return f"largest logit difference from {reference} {largest:.3g}, same top token {same:.1%}"
