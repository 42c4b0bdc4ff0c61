"""The commands that work on weights alone: extract, compress, merge, inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer

from manylora.cli.tables import print_factors, print_inspection
from manylora.cli.terminal import command, console, errors, one_of, progress

DEFAULT = "default"
_Rank = Annotated[int | None, typer.Option(help="Rank of every module")]
_Energy = Annotated[float | None, typer.Option(help="Share of each module's ‖ΔW‖² to keep, instead of --rank")]
_Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the source's when left out")]
_Base = Annotated[str, typer.Option(help="The base: a folder, a GGUF file, a Hugging Face id, or `default`")]


def extract(
    tuned: Annotated[str, typer.Option(help="The full fine-tune: a folder or a Hugging Face id")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter")],
    base: _Base = DEFAULT,
    rank: _Rank = None,
    energy: _Energy = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    base_name: Annotated[str | None, typer.Option(help="The base's name in the adapter's config")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Make an adapter out of a full fine-tune, by the truncated SVD of each linear's change."""
    from manylora.lifecycle.weights.extract import ExtractConfig
    from manylora.lifecycle.weights.extract import extract as run

    with errors(), progress() as listen:
        config = ExtractConfig(tuned, out, _model(base), rank, energy, dtype, base_name, command())
        report = run(config, overwrite=overwrite, listen=listen)
    print_factors(report["modules"])
    for entry in report["not_expressed"]:
        console.print(f"not expressed: {entry['parameter']} changed by {entry['norm']:.3g}", style="yellow")
    found = report["difference"]["adapter"]
    print(f"{out}: {_difference('the fine-tune', found)}")


def compress(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder")],
    out: Annotated[Path, typer.Option(help="Folder for the smaller adapter")],
    rank: _Rank = None,
    energy: _Energy = None,
    dtype: _Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Re-factorise an adapter at a smaller rank, the best possible for each module."""
    from manylora.lifecycle.weights.compress import CompressConfig
    from manylora.lifecycle.weights.compress import compress as run

    with errors(), progress() as listen:
        config = CompressConfig(adapter, out, rank, energy, dtype, command())
        report = run(config, overwrite=overwrite, listen=listen)
    print_factors(report["modules"])
    print(f"{out}: {report['size_bytes'] / 1e6:.2f} MB, was {report['size_bytes_before'] / 1e6:.2f} MB")


def merge(
    adapter: Annotated[list[str], typer.Option(help="FOLDER or FOLDER:WEIGHT")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint or the adapter")],
    base: Annotated[str, typer.Option(help="Into this base (`default`: the default model); else one adapter")] = "",
    method: Annotated[str, typer.Option(help="linear, cat, svd, ties or dare_ties")] = "linear",
    rank: Annotated[int | None, typer.Option(help="Rank of the merged adapter")] = None,
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare_ties keep")] = 0.5,
    dtype: _Dtype = None,
    seed: Annotated[int, typer.Option(help="Decides what dare_ties drops")] = 0,
    verify_on: Annotated[
        str,
        typer.Option(help="Base to verify a merged adapter on: a model, `default`, `none`; auto: the adapters' own"),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Merge adapters into the base as an ordinary checkpoint, or several adapters into one."""
    from manylora.lifecycle.weights.combine import METHODS
    from manylora.lifecycle.weights.merge import MergeConfig, parse_adapter
    from manylora.lifecycle.weights.merge import merge as run

    with errors(), progress() as listen:
        config = MergeConfig(
            tuple(parse_adapter(text) for text in adapter), out, bool(base), _model(base) if base else None,
            one_of("--method", method, METHODS), rank, density, dtype, seed, verify_on, command(),
        )  # fmt: skip
        report = run(config, overwrite=overwrite, listen=listen)
    if "modules" in report:
        print_factors(report["modules"])
        print(f"{out}: {report['size_bytes'] / 1e6:.2f} MB")
    if "difference" in report:
        print(f"{out}: {_difference('base + adapters', report['difference'])}")


def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder")],
    against: Annotated[Path | None, typer.Option(help="Another adapter of the same base")] = None,
    base: Annotated[
        str, typer.Option(help="Whose weights ‖ΔW‖ is relative to: a model, `default`, `none`; auto: the adapter's own")
    ] = "auto",
    png: Annotated[Path | None, typer.Option(help="Folder for the pictures and inspect.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON on stdout")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --png")] = False,
) -> None:
    """Show what an adapter changes, how much of its rank it uses, and how like another one it is."""
    from manylora.lifecycle.extras import need
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.weights.inspection import InspectConfig, draw, inspect_adapter

    with errors(), progress() as listen:
        config = InspectConfig(adapter, against, base)
        need(*(["scipy"] if against is not None else []), *(["matplotlib"] if png is not None else []))
        if png is not None:
            refuse_existing(png, overwrite=overwrite)
        report = inspect_adapter(config, listen)
        if png is not None:
            draw(report, png, overwrite=overwrite, listen=listen)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    print_inspection(report)
    for warning in report["warnings"]:
        console.print(warning, style="yellow", markup=False)


def _model(base: str) -> str | None:
    return None if base == DEFAULT else base


def _difference(reference: str, found: dict[str, float]) -> str:
    largest, same = found["max_abs_logit"], found["same_top_token"]
    return f"largest logit difference from {reference} {largest:.3g}, same top token {same:.1%}"
