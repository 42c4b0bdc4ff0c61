"""The commands of an adapter's life: recipe, train, and what follows. `register` adds them to the program.

Heavy modules are imported inside the commands, so that `manylora --help` does not load torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from manylora.cli_lifecycle_tools import (
    command,
    console,
    errors,
    names_of,
    numbers_of,
    one_of,
    progress,
    stop_on_interrupt,
)
from manylora.cli_lifecycle_weights import compress, extract, inspect, merge
from manylora.errors import InvalidRequest

if TYPE_CHECKING:
    from manylora.lifecycle.train import TrainConfig

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add every lifecycle command to `app`."""
    app.command()(recipe)
    app.command()(train)
    app.command()(evaluate)
    app.command()(choose_rank)
    app.command()(extract)
    app.command()(compress)
    app.command()(merge)
    app.command()(inspect)


def recipe(
    name: Annotated[str, typer.Argument(help="city-zh, sentiment-en, sql, order-json or devil; `list` shows them")],
    out: Annotated[Path | None, typer.Option(help="Folder for train.jsonl, valid.jsonl and test.jsonl")] = None,
    source: Annotated[Path | None, typer.Option(help="The package's file, instead of downloading it")] = None,
    seed: int = 0,
    ship: Annotated[Path | None, typer.Option(help="A trained adapter, to write into --out with its full card")] = None,
    scores: Annotated[Path | None, typer.Option(help="Its evaluate.json, for the card")] = None,
    told: Annotated[Path | None, typer.Option(help="evaluate.json of the base with the recipe's instruction")] = None,
    machine: Annotated[str, typer.Option(help="What it was trained on, for the card")] = "this machine",
    overwrite: bool = False,
) -> None:
    """Make a recipe's data and print the commands that train and score its adapter; --ship writes its folder."""
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.recipes import RECIPES, Places, all_commands, write_splits

    with errors():
        if name == "list":
            for known in RECIPES.values():
                print(f"{known.name:14} {known.summary}")
            return
        if name not in RECIPES:
            raise InvalidRequest(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
        chosen = RECIPES[name]
        if ship is not None:
            _ship(name, ship, scores, told, machine, out or Path("adapters") / name, overwrite=overwrite)
            return
        if scores is not None or told is not None:
            raise InvalidRequest("--scores and --told go into the card: give --ship too.")
        folder = out or Path("data") / name
        refuse_existing(folder, overwrite=overwrite, ours=frozenset({".jsonl"}))
        splits = chosen.splits(seed, source)
        write_splits(splits, folder)
        console.print(
            f"{folder}: {len(splits.train)} to learn from, {len(splits.valid)} to choose by, {len(splits.test)} to test"
        )
        for line in all_commands(chosen, Places(folder, Path("out") / name))[1:]:
            print(line)


def _ship(
    name: str, adapter: Path, scores: Path | None, told: Path | None, machine: str, out: Path, *, overwrite: bool
) -> None:
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.recipes import RECIPES
    from manylora.lifecycle.recipes.ship import Made, ship
    from manylora.lifecycle.train import REPORT, report_folder

    if scores is None:
        raise InvalidRequest("--ship writes the scores into the card: give --scores evaluate.json.")
    refuse_existing(out, overwrite=overwrite)
    ship(RECIPES[name], Made(adapter, report_folder(adapter) / REPORT, scores, machine, told), out)
    print(out)


def train(
    data: Annotated[Path, typer.Option(help="Training rows: .jsonl, .csv or .parquet")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter")],
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out rows, to keep the best step")] = None,
    model: Annotated[str | None, typer.Option(help="The base; the default model when left out")] = None,
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
    publish: Annotated[str, typer.Option(help="Upload it under this name when it is done")] = "",
    server: Annotated[str, typer.Option(help="Server to publish to", envvar="MANYLORA_URL")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(envvar="MANYLORA_KEY", help="API key for --publish")] = "",
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted training stopped")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Train a LoRA adapter on the frozen base; write it in PEFT layout with its loss curve, report and card."""
    from manylora.lifecycle.train import LoraShape, TrainConfig
    from manylora.lifecycle.training import Schedule

    with errors():
        config = TrainConfig(
            data=data, out=out, eval_data=eval_data, base=model, base_name=base_name,
            lora=LoraShape(rank, alpha, names_of(targets), dropout, rslora),
            schedule=Schedule(
                epochs=epochs, batch_size=batch_size, accumulate=accumulate, lr=lr, warmup=warmup,
                weight_decay=weight_decay, max_grad_norm=max_grad_norm, early_stop=early_stop, eval_every=eval_every,
                checkpoint_every=checkpoint_every, seed=seed,
            ),
            render=one_of("--render", render, ("auto", "chat", "plain")),
            instruction=instruction, max_length=max_length,
            device=one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")),
            threads=threads, title=title, command=command(),
        )  # fmt: skip
        _run_training(config, publish, server, key, resume=resume, overwrite=overwrite)


def _run_training(config: "TrainConfig", name: str, server: str, key: str, *, resume: bool, overwrite: bool) -> None:
    from manylora.lifecycle.publish import connect, publish
    from manylora.lifecycle.train import train as run

    if name:
        with connect(server, key):  # a server that is not there is said before the work, not after it
            pass
    with stop_on_interrupt() as stopped, progress() as listen:
        result = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
    if not result.finished:
        console.print(f"Stopped after step {result.report['steps']}. Run the same command with --resume to go on.")
        raise typer.Exit(INTERRUPTED)
    print(f"{config.out}: {result.report['steps']} steps, {result.report['size_bytes'] / 1e6:.2f} MB")
    if name:
        with connect(server, key) as client:
            print(f"published as {publish(client, config.out, name, description=config.title)}")


def choose_rank(
    data: Annotated[Path, typer.Option(help="Rows to cross-validate on: .jsonl, .csv or .parquet")],
    out: Annotated[Path, typer.Option(help="The table and plot go into OUT.ranks, the final adapter into OUT")],
    ranks: Annotated[str, typer.Option(help="Ranks to compare, comma-separated")] = "1,2,4,8,16,32",
    folds: int = 5,
    targets: Annotated[list[str] | None, typer.Option(help="A set of linears, comma-separated; several times")] = None,
    final: Annotated[bool, typer.Option("--train-final", help="Train the chosen shape on all rows")] = False,
    model: Annotated[str | None, typer.Option(help="The base; the default model when left out")] = None,
    base_name: Annotated[str | None, typer.Option(help="The base's name in the adapter's config")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale numerator; twice the rank when left out")] = None,
    rslora: bool = False,
    dropout: float = 0.0,
    epochs: int = 3,
    batch_size: int = 8,
    lr: float = 5e-4,
    max_length: int = 1024,
    render: str = "auto",
    instruction: str = "",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Cross-validate ranks and targets; choose the smallest adapter within one standard error of the best."""
    from manylora.lifecycle.choose_rank import ChooseConfig
    from manylora.lifecycle.choose_rank import choose_rank as run
    from manylora.lifecycle.train import LoraShape, TrainConfig
    from manylora.lifecycle.training import Schedule

    with errors():
        training = TrainConfig(
            data=data, out=out, base=model, base_name=base_name,
            lora=LoraShape(alpha=alpha, dropout=dropout, rslora=rslora),
            schedule=Schedule(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed),
            render=one_of("--render", render, ("auto", "chat", "plain")), instruction=instruction,
            max_length=max_length, device=one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")), command=command(),
        )  # fmt: skip
        sets = tuple(names_of(one) for one in targets or ())
        config = ChooseConfig(training, numbers_of("--ranks", ranks), folds, sets, final)
        with stop_on_interrupt() as stopped, progress() as listen:
            report, trained = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
        if report is None or (trained is not None and not trained.finished):
            console.print("Stopped. Run the same command with --resume to go on.")
            raise typer.Exit(INTERRUPTED)
        chosen = report["chosen"]
        print(f"chosen: rank {chosen['rank']}, loss {chosen['mean']:.4f} ± {chosen['standard_error']:.4f}, "
              f"{chosen['size_bytes'] / 1e6:.2f} MB")  # fmt: skip


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

    with errors(), progress() as listen:
        request = EvaluateRequest(
            data=data, adapters=tuple(adapter or ()), with_base=with_base, server=server, key=key,
            metrics=names_of(metrics), max_tokens=max_tokens, out=out,
            promote_if_better=promote_if_better, min_gain=min_gain, model=model, max_length=max_length,
            render=one_of("--render", render, ("auto", "chat", "plain")), instruction=instruction, seed=seed,
            device=one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")), overwrite=overwrite,
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
