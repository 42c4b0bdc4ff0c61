"""The commands of an adapter's life: recipe, train, and what follows. `register` adds them to the program.

Heavy modules are imported inside the commands, so that `manylora --help` does not load torch.
"""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from manylora.errors import InvalidRequest, ManyloraError

if TYPE_CHECKING:
    from manylora.lifecycle.progress import Progress

_T = TypeVar("_T", bound=str)
_console = Console(stderr=True)
INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add every lifecycle command to `app`."""
    app.command()(recipe)
    app.command()(train)
    app.command()(evaluate)


def recipe(
    name: Annotated[str, typer.Argument(help="city-zh, sentiment-en, sql, order-json or devil; `list` shows them")],
    out: Annotated[Path | None, typer.Option(help="Folder for train.jsonl, valid.jsonl and test.jsonl")] = None,
    source: Annotated[Path | None, typer.Option(help="The package's file, instead of downloading it")] = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Make a recipe's data and print the command that trains its adapter."""
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.recipes import RECIPES, write_splits

    with _errors():
        if name == "list":
            for known in RECIPES.values():
                print(f"{known.name:14} {known.summary}")
            return
        if name not in RECIPES:
            raise InvalidRequest(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
        chosen = RECIPES[name]
        folder = out or Path("data") / name
        refuse_existing(folder, overwrite=overwrite)
        splits = chosen.make(seed, source)
        write_splits(splits, folder)
        _console.print(
            f"{folder}: {len(splits.train)} to learn from, {len(splits.valid)} to choose by, {len(splits.test)} to test"
        )
        files = ["--data", str(folder / "train.jsonl"), "--eval", str(folder / "valid.jsonl")]
        print(shlex.join(["manylora", "train", *files, "--out", f"adapters/{name}", *chosen.flags]))


def train(
    data: Annotated[Path, typer.Option(help="Training rows: .jsonl, .csv or .parquet")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter")],
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out rows, to keep the best step")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "--base", help="The base; the default model when left out")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="The base's name in the adapter's config")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank matrices")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Scale numerator; twice the rank when left out")] = None,
    targets: Annotated[str, typer.Option(help="Linears by name, comma-separated; all but the head when left out")] = "",
    rslora: Annotated[bool, typer.Option(help="Scale by alpha/sqrt(rank)")] = False,
    dropout: Annotated[float, typer.Option(help="Dropout before A")] = 0.0,
    epochs: int = 3,
    batch_size: int = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step")] = 1,
    lr: float = 5e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps with rising learning rate")] = 0.06,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    early_stop: Annotated[int, typer.Option(help="Stop after so many evaluations without gain; 0: never")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: once an epoch")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints")] = 50,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer prompts are cut on the left")] = 1024,
    render: Annotated[str, typer.Option(help="auto, chat or plain")] = "auto",
    instruction: Annotated[str, typer.Option(help="Text before every prompt")] = "",
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
    title: Annotated[str, typer.Option(help="Title of the card")] = "",
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted training stopped")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Train a LoRA adapter on the frozen base; write it in PEFT layout with its loss curve, report and card."""
    from manylora.lifecycle.train import LoraShape, TrainConfig
    from manylora.lifecycle.train import train as run
    from manylora.lifecycle.training import Schedule

    with _errors():
        config = TrainConfig(
            data=data, out=out, eval_data=eval_data, base=model, base_name=base_name,
            lora=LoraShape(rank, alpha, tuple(t.strip() for t in targets.split(",") if t.strip()), dropout, rslora),
            schedule=Schedule(
                epochs=epochs, batch_size=batch_size, accumulate=accumulate, lr=lr, warmup=warmup,
                weight_decay=weight_decay, max_grad_norm=max_grad_norm, early_stop=early_stop, eval_every=eval_every,
                checkpoint_every=checkpoint_every, seed=seed,
            ),
            render=_one_of("--render", render, ("auto", "chat", "plain")),
            instruction=instruction, max_length=max_length,
            device=_one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=_one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")),
            threads=threads, title=title, command=_command(),
        )  # fmt: skip
        with _stop_on_interrupt() as stopped, _progress() as listen:
            result = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
        if not result.finished:
            _console.print(f"Stopped after step {result.report['steps']}. Run the same command with --resume to go on.")
            raise typer.Exit(INTERRUPTED)
        print(f"{out}: {result.report['steps']} steps, {result.report['size_bytes'] / 1e6:.2f} MB")


def evaluate(
    data: Annotated[Path, typer.Option(help="Held-out rows: .jsonl, .csv or .parquet")],
    adapter: Annotated[list[str] | None, typer.Option(help="A folder, or with --server NAME or NAME@VERSION")] = None,
    with_base: Annotated[bool, typer.Option("--base", help="The bare base too, as the reference")] = False,
    server: Annotated[str, typer.Option(help="URL of a running server; without it, in this process")] = "",
    key: Annotated[str, typer.Option(envvar="MANYLORA_KEY", help="API key for --server")] = "",
    metrics: Annotated[str, typer.Option(help="Comma-separated; those that fit the data when left out")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluate.json and the confusion matrices")] = None,
    promote_if_better: Annotated[str, typer.Option(help="Metric that decides; promotes the last --adapter")] = "",
    min_gain: Annotated[float, typer.Option(help="Least gain over the first contender")] = 0.0,
    model: Annotated[str | None, typer.Option(help="The base; the default model when left out")] = None,
    max_length: int = 1024,
    render: str = "auto",
    instruction: str = "",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> None:
    """Score adapters and the base side by side, with intervals and a paired test against the first."""
    from manylora.lifecycle.evaluate_command import EvaluateRequest, run_evaluation

    with _errors(), _progress() as listen:
        request = EvaluateRequest(
            data=data, adapters=tuple(adapter or ()), with_base=with_base, server=server, key=key,
            metrics=tuple(m.strip() for m in metrics.split(",") if m.strip()), max_tokens=max_tokens, out=out,
            promote_if_better=promote_if_better, min_gain=min_gain, model=model, max_length=max_length,
            render=_one_of("--render", render, ("auto", "chat", "plain")), instruction=instruction, seed=seed,
            device=_one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=_one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")), overwrite=overwrite,
        )  # fmt: skip
        report, promotion = run_evaluation(request, listen)
    _print_scores(report)
    if promotion:
        print(promotion)


def _print_scores(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{report['data']}: {report['num_examples']} examples, 95 % intervals")
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
    Console().print(table)


def _one_of(flag: str, value: str, allowed: tuple[_T, ...]) -> _T:
    for known in allowed:
        if value == known:
            return known
    raise InvalidRequest(f"{flag} must be one of {', '.join(allowed)}, not {value!r}.")


def _command() -> str:
    """The command as it can be typed again, without this machine's way of starting the program."""
    return shlex.join(["manylora", *sys.argv[1:]])


@contextmanager
def _errors() -> Iterator[None]:
    """A refusal or a failure is one line on stderr and exit code 1."""
    try:
        yield
    except ManyloraError as error:
        _console.print(f"[red]error:[/red] {error.message}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the work to stop at a good place; the second ends it."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, previous[number])
        _console.print("stopping after this step; once more to stop at once")

    previous: dict[int, Any] = {int(n): signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Callable[["Progress"], None]]:
    """A bar with the newest figures; messages and warnings above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bar(*columns, console=_console) as bar:
        tasks: dict[str, int] = {}

        def listen(event: "Progress") -> None:
            if event.message:
                bar.console.print(f"[yellow]{event.message}[/yellow]" if event.stage == "warning" else event.message)
            if not event.total:
                return
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, total=event.total, figures="")
            task = tasks[event.stage]
            bar.update(bar.task_ids[task], completed=event.done, total=event.total, figures=_figures(event.values))

        yield listen


def _figures(values: dict[str, float]) -> str:
    parts = [f"{name} {value:.4f}" for name, value in values.items() if name != "remaining_s"]
    if "remaining_s" in values:
        parts.append(f"about {max(1, round(values['remaining_s'] / 60))} min left")
    return "  ".join(parts)
