"""What the lifecycle's commands print on standard output: tables for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from manylora.lifecycle.data.look import Seen

_MANY = 40  # from here modules are shown by kind, and one by one in the report


def print_scores(report: dict[str, Any]) -> None:
    """The metrics side by side, then each label by itself."""
    table = Table(title=f"{report['data']}: {report['num_examples']} examples, 95 % intervals", title_justify="left")
    names = list(report["metrics"])
    for column in ("contender", *names):
        table.add_column(column)
    for contender, entry in report["contenders"].items():
        cells = []
        for name in names:
            cell = f"{entry[name]['value']:.4g} [{entry[name]['low']:.4g}, {entry[name]['high']:.4g}]"
            test = entry.get("against_reference", {}).get(name)
            cells.append(cell + (f" p={test['p']:.2g}" if test else ""))
        table.add_row(contender, *cells)
    _console().print(table)
    if report["labels"]:
        _print_labels(report)


def _print_labels(report: dict[str, Any]) -> None:
    table = Table("contender", "label", "precision", "recall", "F1", "examples")
    for contender, entry in report["contenders"].items():
        for label, scores in entry["per_class"].items():
            figures = (f"{scores[name]:.3f}" for name in ("precision", "recall", "f1"))
            table.add_row(contender, label, *figures, str(scores["support"]))
    _console().print(table)


def print_seen(rows: "Sequence[Seen]") -> None:
    """Rows as training gets them: what is learnt in green on a terminal, and between [[ and ]] elsewhere."""
    console = _console()
    for row in rows:
        cut = f", {row.num_cut} cut on the left" if row.num_cut else ""
        console.print(f"row {row.row}: {row.num_tokens} tokens{cut}", style="bold", markup=False)
        for text, is_learnt in row.pieces:
            shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
            marked = f"[[{shown}]]" if is_learnt and not console.is_terminal else shown
            console.print(marked, style="green" if is_learnt else "", markup=False, end="", soft_wrap=True)
        console.print()


def print_ranks(report: dict[str, Any]) -> None:
    """Every candidate with its loss and size, the chosen one marked."""
    table = Table("", "rank", "targets", "loss", "± standard error", "MB")
    for row in report["candidates"]:
        table.add_row(
            "*" if row == report["chosen"] else "", str(row["rank"]), ", ".join(row["targets"]) or "every linear",
            f"{row['mean']:.4f}", f"{row['standard_error']:.4f}", f"{row['size_bytes'] / 1e6:.2f}",
        )  # fmt: skip
    _console().print(table)
    chosen = report["chosen"]
    print(
        f"chosen: rank {chosen['rank']}, loss {chosen['mean']:.4f} ± {chosen['standard_error']:.4f}, "
        f"{chosen['size_bytes'] / 1e6:.2f} MB: the smallest within one standard error of the best"
    )


def print_factors(modules: Mapping[str, Mapping[str, float]]) -> None:
    """Rank, energy and error of each module; by kind of module when there are many."""
    if len(modules) > _MANY:
        _print_kinds(modules)
        return
    table = Table("module", "rank", "energy kept", "error")
    for path, m in modules.items():
        table.add_row(path, str(m["rank"]), f"{m['energy']:.4%}", f"{m['error']:.3g}")
    _console().print(table)


def _print_kinds(modules: Mapping[str, Mapping[str, float]]) -> None:
    table = Table("kind", "modules", "ranks", "least energy kept", "largest error")
    for kind, found in by_kind(modules).items():
        ranks = [int(m["rank"]) for m in found]
        table.add_row(
            kind, str(len(found)), f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else str(ranks[0]),
            f"{min(m['energy'] for m in found):.4%}", f"{max(m['error'] for m in found):.3g}",
        )  # fmt: skip
    _console().print(table)
    print("Module by module in the report.")


def print_inspection(report: dict[str, Any], *, is_by_kind: bool) -> None:
    """An adapter's facts, its modules (many of them by kind, if that may be), and how like the other one it is."""
    size = f"{report['num_parameters']:,} parameters, {report['size_bytes'] / 1e6:.2f} MB"
    scale = "alpha/sqrt(rank)" if report["rslora"] else "alpha/rank"
    print(f"{report['adapter']}: rank {report['rank']}, alpha {report['alpha']} ({scale}), {report['dtype']}, {size}")
    targets = report["target_modules"]
    print(f"base {report['base']}; targets {targets if isinstance(targets, str) else ', '.join(targets or ())}")
    if is_by_kind and len(report["modules"]) > _MANY:
        _print_inspected_kinds(report["modules"])
    else:
        _print_inspected(report["modules"])
    if "against" in report:
        _print_similarity(report["against"])


def _print_inspected(modules: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("module", "rank", "used", "effective", "‖ΔW‖", "‖ΔW‖/‖W‖", "σ₁")
    for path, m in modules.items():
        relative = "" if m["relative_norm"] is None else f"{m['relative_norm']:.3g}"
        table.add_row(
            path, str(m["rank"]), str(m["num_used"]), f"{m['effective_rank']:.2f}", f"{m['norm']:.3g}", relative,
            f"{m['singular_values'][0]:.3g}",
        )  # fmt: skip
    _console().print(table)


def _print_inspected_kinds(modules: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("kind", "modules", "ranks", "effective", "‖ΔW‖", "‖ΔW‖/‖W‖", "σ₁")
    for kind, found in by_kind(modules).items():
        relative = [m["relative_norm"] for m in found if m["relative_norm"] is not None]
        columns: list[tuple[list[float], str]] = [
            ([m["rank"] for m in found], "d"),
            ([m["effective_rank"] for m in found], ".2f"),
            ([m["norm"] for m in found], ".3g"),
            (relative, ".3g"),
            ([m["singular_values"][0] for m in found], ".3g"),
        ]
        table.add_row(kind, str(len(found)), *(_span(values, form) for values, form in columns))
    _console().print(table)
    print("Module by module with --modules, and in the report (--json).")


def _span(values: list[float], form: str) -> str:
    """`4`, or `2 to 8`; empty for none."""
    if not values:
        return ""
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def _print_similarity(against: dict[str, Any]) -> None:
    shared = f"over {against['num_shared']} modules"
    print(f"against {against['adapter']}: cosine of the changes {against['cosine']:.3f} {shared}")
    table = Table("kind", "modules", "mean cosine", "nearest input angle", "nearest output angle")
    for kind, found in by_kind(against["modules"]).items():
        angles = [
            min((m[side][0] for m in found if m[side]), default=90.0) for side in ("input_angles", "output_angles")
        ]
        mean = sum(m["cosine"] for m in found) / len(found)
        table.add_row(kind, str(len(found)), f"{mean:.3f}", *(f"{angle:.1f}°" for angle in angles))
    _console().print(table)


def by_kind(modules: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Modules by the last part of their path, as `q_proj`."""
    kinds: dict[str, list[Any]] = {}
    for path, module in modules.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(module)
    return kinds


def _console() -> Console:
    """Standard output as it is now; without a terminal there is no width to keep to."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=240)
