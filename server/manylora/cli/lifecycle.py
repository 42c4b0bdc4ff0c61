"""The commands of an adapter's life: recipe, train, and what follows. `register` adds them to the program.

Heavy modules are imported inside the commands, so that `manylora --help` does not load torch.
"""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.cli.tables import print_ranks, print_scores
from manylora.cli.terminal import (
    INTERRUPTED,
    command,
    console,
    errors,
    names_of,
    numbers_of,
    one_of,
    progress,
    stop_on_interrupt,
)
from manylora.cli.weights import compress, extract, inspect, merge
from manylora.errors import InvalidRequest, ManyloraError

if TYPE_CHECKING:
    from manylora.lifecycle.train.train import TrainConfig

_Model = Annotated[str | None, typer.Option(help="The base; the default model when left out")]
_BaseName = Annotated[str | None, typer.Option(help="The base's name in the adapter's config")]
_Alpha = Annotated[float | None, typer.Option(help="Scale numerator; twice the rank when left out")]
_Rslora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha/sqrt(rank) instead of alpha/rank")]
_Dropout = Annotated[float, typer.Option(help="Dropout before A")]
_Epochs = Annotated[int, typer.Option(help="Times that each row is seen")]
_BatchSize = Annotated[int, typer.Option(help="Rows in one forward pass")]
_Accumulate = Annotated[int, typer.Option(help="Batches per optimizer step")]
_Lr = Annotated[float, typer.Option(help="Highest learning rate, after the warm-up; then a cosine to zero")]
_Warmup = Annotated[float, typer.Option(help="Share of the steps with rising learning rate")]
_WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay")]
_MaxLength = Annotated[int, typer.Option(help="Tokens of an example; longer prompts are cut on the left")]
_Render = Annotated[str, typer.Option(help="How a row becomes text: chat (the base's template), plain, or auto")]
_Instruction = Annotated[str, typer.Option(help="Text before every prompt, on a line of its own")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
_Dtype = Annotated[str, typer.Option(help="The base's: auto, bfloat16, float16 or float32")]
_Threads = Annotated[int | None, typer.Option(help="CPU threads")]


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
    from manylora.lifecycle.train.train import REPORT, report_folder

    if scores is None:
        raise InvalidRequest("--ship writes the scores into the card: give --scores evaluate.json.")
    refuse_existing(out, overwrite=overwrite)
    ship(RECIPES[name], Made(adapter, report_folder(adapter) / REPORT, scores, machine, told), out)
    print(out)


def train(
    data: Annotated[Path, typer.Option(help="Training rows: .jsonl, .csv or .parquet")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter")],
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out rows, to keep the best step")] = None,
    model: _Model = None,
    base_name: _BaseName = None,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank matrices")] = 8,
    alpha: _Alpha = None,
    targets: Annotated[str, typer.Option(help="Linears by name, comma-separated; all but the head when left out")] = "",
    rslora: _Rslora = False,
    dropout: _Dropout = 0.0,
    epochs: _Epochs = 3,
    batch_size: _BatchSize = 8,
    accumulate: _Accumulate = 1,
    lr: _Lr = 5e-4,
    warmup: _Warmup = 0.06,
    weight_decay: _WeightDecay = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Longest gradient; a longer one is clipped")] = 1.0,
    early_stop: Annotated[int, typer.Option(help="Stop after so many evaluations without gain; 0: never")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: once an epoch")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints")] = 50,
    max_length: _MaxLength = 1024,
    render: _Render = "auto",
    instruction: _Instruction = "",
    seed: Annotated[int, typer.Option(help="Decides the order of the rows, the first weights and the dropout")] = 0,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    threads: _Threads = None,
    title: Annotated[str, typer.Option(help="Title of the card")] = "",
    publish: Annotated[str, typer.Option(help="Upload it under this name when it is done")] = "",
    server: Annotated[str, typer.Option(help="Server to publish to", envvar="MANYLORA_URL")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(envvar="MANYLORA_KEY", help="API key for --publish")] = "",
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted training stopped")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Train a LoRA adapter on the frozen base; write it in PEFT layout with its loss curve, report and card."""
    from manylora.lifecycle.train.train import LoraShape, TrainConfig
    from manylora.lifecycle.train.training import Schedule

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
    from manylora.client.adapters import check_name, publish
    from manylora.client.server import connect
    from manylora.lifecycle.train.train import train as run

    if name:
        with connect(
            server, key, is_patient=True
        ) as client:  # what would refuse the result is said before the work, not after it
            check_name(client, name)
    with stop_on_interrupt() as stopped, progress() as listen:
        result = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
    if not result.finished:
        console.print(f"Stopped after step {result.report['steps']}. Run the same command with --resume to go on.")
        raise typer.Exit(INTERRUPTED)
    print(f"{config.out}: {result.report['steps']} steps, {result.report['size_bytes'] / 1e6:.2f} MB")
    if not name:
        return
    try:
        with connect(server, key, is_patient=True) as client:
            print(f"published as {publish(client, config.out, name, description=config.title)}")
    except ManyloraError:
        again = shlex.join(["manylora", "adapters", "push", str(config.out), "--name", name])
        console.print(f"The adapter is whole in {config.out}. Publish it with: {again}", highlight=False)
        raise


def choose_rank(
    data: Annotated[Path, typer.Option(help="Rows to cross-validate on: .jsonl, .csv or .parquet")],
    out: Annotated[Path, typer.Option(help="The table and plot go into OUT.ranks, the final adapter into OUT")],
    ranks: Annotated[str, typer.Option(help="Ranks to compare, comma-separated")] = "1,2,4,8,16,32",
    folds: Annotated[int, typer.Option(help="Parts of the data; each is held out once")] = 5,
    targets: Annotated[list[str] | None, typer.Option(help="A set of linears, comma-separated")] = None,
    final: Annotated[bool, typer.Option("--train-final", help="Train the chosen shape on all rows")] = False,
    model: _Model = None,
    base_name: _BaseName = None,
    alpha: _Alpha = None,
    rslora: _Rslora = False,
    dropout: _Dropout = 0.0,
    epochs: _Epochs = 3,
    batch_size: _BatchSize = 8,
    accumulate: _Accumulate = 1,
    lr: _Lr = 5e-4,
    warmup: _Warmup = 0.06,
    weight_decay: _WeightDecay = 0.01,
    max_length: _MaxLength = 1024,
    render: _Render = "auto",
    instruction: _Instruction = "",
    seed: Annotated[int, typer.Option(help="Decides the folds, the order of the rows and the first weights")] = 0,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    threads: _Threads = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted search stopped")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.ranks, and with --train-final OUT")] = False,
) -> None:
    """Cross-validate ranks and targets; choose the smallest adapter within one standard error of the best."""
    from manylora.lifecycle.train.choose_rank import ChooseConfig
    from manylora.lifecycle.train.choose_rank import choose_rank as run
    from manylora.lifecycle.train.train import LoraShape, TrainConfig
    from manylora.lifecycle.train.training import Schedule

    with errors():
        training = TrainConfig(
            data=data, out=out, base=model, base_name=base_name,
            lora=LoraShape(alpha=alpha, dropout=dropout, rslora=rslora),
            schedule=Schedule(
                epochs=epochs, batch_size=batch_size, accumulate=accumulate, lr=lr, warmup=warmup,
                weight_decay=weight_decay, seed=seed,
            ),
            render=one_of("--render", render, ("auto", "chat", "plain")), instruction=instruction,
            max_length=max_length, device=one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")), threads=threads,
            command=command(),
        )  # fmt: skip
        sets = tuple(names_of(one) for one in targets or ())
        config = ChooseConfig(training, numbers_of("--ranks", ranks), folds, sets, final)
        with stop_on_interrupt() as stopped, progress() as listen:
            report, trained = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
    if report is not None:
        print_ranks(report)
    if report is None or (trained is not None and not trained.finished):
        console.print("Stopped. Run the same command with --resume to go on.")
        raise typer.Exit(INTERRUPTED)
    if trained is not None:
        print(f"{out}: {trained.report['steps']} steps, {trained.report['size_bytes'] / 1e6:.2f} MB")


def evaluate(
    data: Annotated[Path, typer.Option(help="Held-out rows: .jsonl, .csv or .parquet")],
    adapter: Annotated[list[str] | None, typer.Option(help="A folder, or with --server NAME or NAME@VERSION")] = None,
    with_base: Annotated[bool, typer.Option("--base", help="The bare base too, as the reference")] = False,
    server: Annotated[str, typer.Option(help="URL of a running server; without it, in this process")] = "",
    key: Annotated[str, typer.Option(envvar="MANYLORA_KEY", help="API key for --server")] = "",
    metrics: Annotated[str, typer.Option(help="Comma-separated; those that fit the data when left out")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluate.json and the confusion matrices")] = None,
    promote_if_better: Annotated[str, typer.Option(help="Metric by which the last --adapter becomes active")] = "",
    min_gain: Annotated[float, typer.Option(help="Least gain over the active version, in the metric's unit")] = 0.0,
    model: _Model = None,
    max_length: _MaxLength = 1024,
    render: _Render = "auto",
    instruction: _Instruction = "",
    seed: Annotated[int, typer.Option(help="Decides the resampling of intervals and tests")] = 0,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON on stdout")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted evaluation with this --out stopped")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --out")] = False,
) -> None:
    """Score adapters and the base side by side, with intervals and a paired test against the first."""
    from manylora.lifecycle.evaluate.command import EvaluateRequest, run_evaluation

    with errors(), progress() as listen:
        request = EvaluateRequest(
            data=data, adapters=tuple(adapter or ()), with_base=with_base, server=server, key=key,
            metrics=names_of(metrics), max_tokens=max_tokens, out=out,
            promote_if_better=promote_if_better, min_gain=min_gain, model=model, max_length=max_length,
            render=one_of("--render", render, ("auto", "chat", "plain")), instruction=instruction, seed=seed,
            device=one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")), resume=resume,
            overwrite=overwrite,
        )  # fmt: skip
        report, promotion = run_evaluation(request, listen)
    if as_json:
        print(json.dumps(report | {"promotion": promotion or None}, ensure_ascii=False, indent=2))
        return
    print_scores(report)
    if promotion:
        print(promotion)
