"""Every picture of the lifecycle, drawn with matplotlib's file backend."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_DPI = 110
_DEFAULT_FONT = "DejaVu Sans"
_FAINTEST = 1e-8  # of a module's largest singular value; below is rounding


def _figure(width: float = 7.0, height: float = 4.2, *, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def loss_curve(
    path: Path,
    train: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    best_step: int,
    *,
    of: str = "answer token (nats)",
) -> None:
    """Training loss per step (thin) with its running mean, and evaluation loss with the best step marked."""
    figure, axes = _figure()
    steps, losses = np.array([s for s, _ in train]), np.array([v for _, v in train])
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="#3182bd", label=f"training, mean of {width}")
    if held_out:
        axes.plot([s for s, _ in held_out], [v for _, v in held_out], "o-", color="#e6550d", label="held out")
        axes.axvline(best_step, color="#e6550d", linestyle=":", label=f"kept: step {best_step}")
    axes.set(xlabel="optimizer step", ylabel=f"loss per {of}", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=_DPI, format="png")


def confusion_matrix(path: Path, table: Any, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Counts [gold, predicted] as a heat map with the numbers in it."""
    figure, axes = _figure(1.6 + 0.7 * len(columns), 1.6 + 0.6 * len(rows))
    axes.imshow(table, cmap="Blues")
    half = np.max(table) / 2
    for (row, column), count in np.ndenumerate(table):
        axes.text(column, row, int(count), ha="center", va="center", color="white" if count > half else "black")
    families = fonts_for("".join((*columns, title)))
    names = list(columns) if families else [*map(str, range(1, len(rows) + 1)), *columns[len(rows) :]]
    axes.set_xticks(range(len(columns)), names, rotation=45, ha="right", fontfamily=families)
    axes.set_yticks(range(len(rows)), names[: len(rows)], fontfamily=families)
    axes.set(xlabel="answered", ylabel="right")
    axes.set_title(title, fontfamily=families)
    if not families:
        figure.supxlabel("no font here has the labels: classes by number, as ordered in the report", fontsize="x-small")
    figure.savefig(path, dpi=_DPI, format="png")


def fonts_for(text: str) -> list[str] | None:
    """Fonts of this machine that have every character of `text` together, or None: then classes are numbered instead.

    The default comes first, then those that have most of what is missing. Fonts that were installed after matplotlib
    made its list of them are looked for too.
    """
    from matplotlib import font_manager

    chosen = [_DEFAULT_FONT]
    missing = set(text) - _characters(font_manager.findfont(_DEFAULT_FONT))
    if not missing:
        return chosen
    _add_new_fonts()
    known = {entry.name: _characters(entry.fname) for entry in font_manager.fontManager.ttflist}
    while missing:
        name = max(known, key=lambda each: len(known[each] & missing))
        if not known[name] & missing:
            return None
        chosen.append(name)
        missing -= known[name]
    return chosen


def _add_new_fonts() -> None:
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        with suppress(OSError, RuntimeError, ValueError):  # a font that cannot be read is as if it were not there
            manager.addfont(path)


@lru_cache(1024)
def _characters(path: str) -> frozenset[str]:
    """Characters that a font has; none of one that has a box for every character, which comes with matplotlib."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset() if font.family_name.startswith("Last Resort") else frozenset(map(chr, font.get_charmap()))


def heat_map(path: Path, values: dict[str, float], label: str, title: str) -> None:
    """A value of each module, by layer and kind of module."""
    cells = {_place(name): value for name, value in values.items()}
    layers = sorted({layer for layer, _ in cells})
    leaves = list(dict.fromkeys(leaf for _, leaf in cells))
    grid = np.full((len(layers), len(leaves)), np.nan)
    for (layer, leaf), value in cells.items():
        grid[layers.index(layer), leaves.index(leaf)] = value
    figure, axes = _figure(1.8 + 0.7 * len(leaves), 1.8 + 0.2 * len(layers))
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(leaves)), leaves, rotation=45, ha="right")
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [layers[i] for i in range(0, len(layers), step)])
    axes.set(ylabel="layer", title=title)
    figure.colorbar(image, label=label)
    figure.savefig(path, dpi=_DPI, format="png")


def spectra(path: Path, modules: dict[str, dict[str, Any]]) -> None:
    """Singular values of every module's ΔW, one thin line each, coloured by kind of module; zeros are left out."""
    figure, axes = _figure()
    leaves = list(dict.fromkeys(_place(name)[1] for name in modules))
    for name, m in modules.items():
        leaf = _place(name)[1]
        values = np.array(m["singular_values"], dtype=float)
        values[values < _FAINTEST * max(values.max(), 1e-30)] = np.nan
        axes.plot(np.arange(1, len(values) + 1), values, color=f"C{leaves.index(leaf) % 10}", alpha=0.4, linewidth=0.9)
    for index, leaf in enumerate(leaves):
        axes.plot([], [], color=f"C{index % 10}", label=leaf)
    axes.set(xlabel="index", ylabel="singular value of ΔW", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI, format="png")


def _place(path: str) -> tuple[int, str]:
    """(layer, leaf) of a module path; layer -1 for what lies outside the layers."""
    parts = path.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), -1)
    return layer, parts[-1]


def rank_curve(path: Path, candidates: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> None:
    """Held-out loss with its standard error, against rank on the left and against bytes on the right."""
    figure, (by_rank, by_size) = _figure(10.0, 4.2, columns=2)
    of: tuple[tuple[Any, Callable[[dict[str, Any]], float]], ...] = (
        (by_rank, lambda c: float(c["rank"])),
        (by_size, lambda c: float(c["size_bytes"]) / 1e6),
    )
    for axes, value in of:
        for name in dict.fromkeys(",".join(c["targets"]) for c in candidates):
            mine = [c for c in candidates if ",".join(c["targets"]) == name]
            axes.errorbar(
                [value(c) for c in mine], [c["mean"] for c in mine], yerr=[c["standard_error"] for c in mine],
                marker="o", capsize=3, label=name or "every linear",
            )  # fmt: skip
        axes.plot(value(chosen), chosen["mean"], "*", color="black", markersize=13, label="chosen", zorder=5)
        axes.set_xscale("log", base=2)
        ticks = sorted({round(value(c), 3) for c in candidates})
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.grid(alpha=0.3)
    by_rank.set(xlabel="rank", ylabel="held-out loss per answer token (nats)")
    by_size.set(xlabel="size of the adapter in bfloat16 (MB)")
    by_rank.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI, format="png")
