"""The commands that work on weights alone: extract, compress, merge, inspect."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from manylora.cli_lifecycle_tools import console, errors, one_of, progress

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
    overwrite: bool = False,
) -> None:
    """Make an adapter out of a full fine-tune, by the truncated SVD of each linear's change."""
    from manylora.lifecycle.extract import ExtractConfig
    from manylora.lifecycle.extract import extract as run

    with errors(), progress() as listen:
        config = ExtractConfig(tuned, out, _model(base), rank, energy, dtype, base_name)
        report = run(config, overwrite=overwrite, listen=listen)
    _print_modules(report["modules"])
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
    overwrite: bool = False,
) -> None:
    """Re-factorise an adapter at a smaller rank, the best possible for each module."""
    from manylora.lifecycle.compress import CompressConfig
    from manylora.lifecycle.compress import compress as run

    with errors(), progress() as listen:
        report = run(CompressConfig(adapter, out, rank, energy, dtype), overwrite=overwrite, listen=listen)
    _print_modules(report["modules"])
    print(f"{out}: {report['size_bytes'] / 1e6:.2f} MB, was {report['size_bytes_before'] / 1e6:.2f} MB")


def merge(
    adapter: Annotated[list[str], typer.Option(help="FOLDER or FOLDER:WEIGHT; several times")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint or the adapter")],
    base: Annotated[str, typer.Option(help="Into this base (`default`: the default model); else one adapter")] = "",
    method: Annotated[str, typer.Option(help="linear, cat, svd, ties or dare_ties")] = "linear",
    rank: Annotated[int | None, typer.Option(help="Rank of the merged adapter")] = None,
    density: Annotated[float, typer.Option(help="Share of entries that ties and dare_ties keep")] = 0.5,
    dtype: _Dtype = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Merge adapters into the base as an ordinary checkpoint, or several adapters into one."""
    from manylora.lifecycle.combine import METHODS
    from manylora.lifecycle.merge import MergeConfig, parse_adapter
    from manylora.lifecycle.merge import merge as run

    with errors(), progress() as listen:
        config = MergeConfig(
            tuple(parse_adapter(text) for text in adapter), out, bool(base), _model(base) if base else None,
            one_of("--method", method, METHODS), rank, density, dtype, seed,
        )  # fmt: skip
        report = run(config, overwrite=overwrite, listen=listen)
    if "difference" in report:
        found = report["difference"]
        print(f"{out}: {_difference('base + adapter', found)}")
    else:
        _print_modules(report["modules"])
        print(f"{out}: {report['size_bytes'] / 1e6:.2f} MB")


def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder")],
    against: Annotated[Path | None, typer.Option(help="Another adapter of the same base")] = None,
    base: Annotated[str, typer.Option(help="Measure against this base's weights (`default`: the default model)")] = "",
    png: Annotated[Path | None, typer.Option(help="Folder for heatmap.png and spectra.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON on stdout")] = False,
    overwrite: bool = False,
) -> None:
    """Show what an adapter changes, how much of its rank it uses, and how like another one it is."""
    from manylora.lifecycle.inspection import InspectConfig, draw, inspect_adapter

    with errors(), progress() as listen:
        config = InspectConfig(adapter, against, _model(base) if base else None, bool(base))
        report = inspect_adapter(config, listen)
        if png is not None:
            draw(report, png, overwrite=overwrite)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print_inspection(report)


def _model(base: str) -> str | None:
    return None if base == DEFAULT else base


def _difference(reference: str, found: dict[str, float]) -> str:
    largest, same = found["max_abs_logit"], found["same_top_token"]
    return f"largest logit difference from {reference} {largest:.3g}, same top token {same:.1%}"


def _print_modules(modules: dict[str, dict[str, float]]) -> None:
    table = Table("module", "rank", "energy kept", "error")
    for path, m in modules.items():
        table.add_row(path, str(m["rank"]), f"{m['energy']:.4%}", f"{m['error']:.3g}")
    Console().print(table)


def _print_inspection(report: dict[str, Any]) -> None:
    size = f"{report['num_parameters']:,} parameters, {report['size_bytes'] / 1e6:.2f} MB"
    print(f"{report['adapter']}: rank {report['rank']}, alpha {report['alpha']}, {size}, base {report['base']}")
    table = Table("module", "rank", "used", "effective", "‖ΔW‖", "‖ΔW‖/‖W‖", "σ₁")
    for path, m in report["modules"].items():
        relative = "" if m["relative_norm"] is None else f"{m['relative_norm']:.3g}"
        table.add_row(
            path, str(m["rank"]), str(m["num_used"]), f"{m['effective_rank']:.2f}", f"{m['norm']:.3g}", relative,
            f"{m['singular_values'][0]:.3g}",
        )  # fmt: skip
    Console().print(table)
    for warning in report["warnings"]:
        console.print(warning, style="yellow")
    if "against" in report:
        against = report["against"]
        shared = f"over {against['num_shared']} modules"
        print(f"against {against['adapter']}: cosine of the changes {against['cosine']:.3f} {shared}")
