"""The commands of an adapter's life: recipe, train, and what follows. `register` adds them to the program.

Heavy modules are imported inside the commands, so that `manylora --help` does not load torch.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.cli.answers import NOT_PROMOTED, next_steps
from manylora.cli.flags import Flags, Spelling, settings_from, words_of
from manylora.cli.remote_training import train_on, typed_options
from manylora.cli.tables import print_ranks, print_scores, print_seen
from manylora.cli.terminal import INTERRUPTED, command, console, errors, progress, stop_on_interrupt
from manylora.cli.weights import compress, extract, inspect, merge
from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.parameters import renamed
from manylora.lifecycle.train.config import ChooseConfig, TrainConfig

if TYPE_CHECKING:
    from manylora.lifecycle.recipes.cases import Case

_Name = Annotated[str, typer.Option(help="Upload it under this name when it is done.")]
_Server = Annotated[
    str,
    typer.Option(
        help="Typed without --publish: train there, as a job of that server. With --publish: the server to upload to.",
        envvar="MANYLORA_URL",
    ),
]
_JobName = Annotated[str, typer.Option(help="With --server: the adapter whose next version comes out.")]
_Activate = Annotated[
    bool | None,
    typer.Option(
        "--activate/--no-activate",
        help="Whether the published version answers to the bare name at once; unsaid, only its first version does.",
    ),
]
_SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=settings_from, is_eager=True, help="These flags in a .toml file; typed ones win."
    ),
]
_Key = Annotated[str, typer.Option(envvar="MANYLORA_KEY", help="API key for --server.")]

_TRAINING = Flags(
    TrainConfig,
    spelled={
        "out": Spelling(help="Folder for the adapter; needed but with --server", read=Path, default=""),
        "eval_data": Spelling("--eval"),
        "test_data": Spelling("--test"),
        "base": Spelling("--model"),
        "reading.columns": Spelling("--map", is_repeated=True),
    },
    without=frozenset({"command"}),
)
_CHOOSING = Flags(
    ChooseConfig,
    spelled={
        "training.data": Spelling(help="Rows to cross-validate on, a file or a folder, as train takes them"),
        "training.out": Spelling(help="The table and plot go into OUT.ranks, the final adapter into OUT"),
        "training.base": Spelling("--model"),
        "training.reading.columns": Spelling("--map", is_repeated=True),
        "training.schedule.seed": Spelling(help="Decides the folds, the order of the rows and the first weights"),
        "targets": Spelling(read=words_of, is_repeated=True),
    },
    without=frozenset(
        f"training.{name}"
        for name in (
            "eval_data", "test_data", "start", "method", "beta", "report_to", "lora.rank", "lora.targets",
            "schedule.max_grad_norm", "schedule.early_stop", "schedule.eval_every",
            "schedule.checkpoint_every", "title", "command",
        )
    ),
)  # fmt: skip
_EVALUATION = Flags(
    EvaluateRequest,
    spelled={
        "adapters": Spelling("--adapter", is_repeated=True),
        "with_base": Spelling("--base"),
        "key": Spelling(envvar="MANYLORA_KEY"),
        "reading.columns": Spelling("--map", is_repeated=True),
        "resume": Spelling("--resume/--no-resume"),
        "overwrite": Spelling("--overwrite/--no-overwrite"),
    },
)


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
    name: Annotated[str, typer.Argument(help="A recipe, such as city-zh; `list` shows them all.")],
    out: Annotated[Path | None, typer.Option(help="Folder for train.jsonl, valid.jsonl and test.jsonl.")] = None,
    source: Annotated[Path | None, typer.Option(help="The package's file, instead of downloading it.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the rows and their order.")] = 0,
    ship: Annotated[Path | None, typer.Option(help="A trained adapter, to write into --out with a full card.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Its evaluate.json, for the card.")] = None,
    told: Annotated[Path | None, typer.Option(help="The same of the base with the recipe's instruction.")] = None,
    held: Annotated[Path | None, typer.Option(help="The evaluate.json of --out with and without its defaults.")] = None,
    machine: Annotated[str, typer.Option(help="What it was trained on, for the card.")] = "this machine",
    overwrite: Annotated[bool, typer.Option(help="Replace --out.")] = False,
) -> None:
    """Make a recipe's data and print the commands that train and score it; --ship and --held write its folder."""
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.recipes import RECIPES, Places, all_commands, write_splits
    from manylora.lifecycle.recipes.cases import CASES
    from manylora.lifecycle.recipes.ship import ship_held

    with errors(lambda message: renamed(message, {"out": "--out", "overwrite": "--overwrite"})):
        if name == "list":
            for known in RECIPES.values():
                print(f"{known.name:14} {known.summary}")
            for case in CASES.values():
                print(f"{case.name:14} {case.title.partition(': ')[2]} (of {case.base})")
            return
        if name in CASES:
            _case(CASES[name], out, source, seed, ship, machine, overwrite=overwrite)
            return
        if name not in RECIPES:
            raise InvalidRequest(f"There is no recipe {name!r}: choose one of {', '.join((*RECIPES, *CASES))}.")
        chosen = RECIPES[name]
        if held is not None:
            ship_held(chosen, held, out or Path("adapters") / name)
            return
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


def _case(
    case: "Case",
    out: Path | None,
    source: Path | None,
    seed: int,
    adapter: Path | None,
    machine: str,
    *,
    overwrite: bool,
) -> None:
    """The data of an adapter that does not write, or with `adapter` its shipped folder."""
    from manylora.lifecycle.output import refuse_existing
    from manylora.lifecycle.recipes.cases import case_commands, ship_case
    from manylora.lifecycle.recipes.recipe import source_of, write_splits
    from manylora.lifecycle.train.train import REPORT, report_folder

    if adapter is not None:
        refuse_existing(out or case.home, overwrite=overwrite)
        ship_case(case, adapter, report_folder(adapter) / REPORT, machine, out or case.home)
        print(out or case.home)
        return
    folder = out or Path("data") / case.name
    refuse_existing(folder, overwrite=overwrite, ours=frozenset({".jsonl"}))
    splits = case.make(seed, source_of(case.name, "", source))
    write_splits(splits, folder)
    console.print(
        f"{folder}: {len(splits.train)} to learn from, {len(splits.valid)} to choose by, {len(splits.test)} to test"
    )
    for line in case_commands(case, folder)[1:]:
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


@_TRAINING.command
def train(
    config: TrainConfig,
    context: typer.Context,
    publish: _Name = "",
    server: _Server = "http://127.0.0.1:8000",
    key: _Key = "",
    name: _JobName = "",
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted training stopped.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace --out.")] = False,
    activate: _Activate = None,
    preview: Annotated[int, typer.Option(min=0, help="Show so many rows as training gets them; train nothing.")] = 0,
    settings_file: _SettingsFile = None,
) -> None:
    """Train a LoRA adapter on the frozen base; write it in PEFT layout with its loss curve, report and card."""
    from manylora.client.adapters import check_name
    from manylora.client.server import connect
    from manylora.lifecycle.train.train import train as run

    typed = typed_options(context)
    if "server" in typed and not publish:
        train_on(server, key, config, typed, name=name, activate=activate, rendered=_TRAINING.rendered)
        return
    _check_trains_here(typed)
    if preview:
        _preview(config, preview)
        return
    config = replace(config, command=command())
    if publish:
        # what would refuse the result is said before the work, not after it
        with connect(server, key, is_patient=True) as client:
            check_name(client, publish)
    with stop_on_interrupt() as stopped, progress(_TRAINING.rendered) as listen:
        result = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
    if not result.finished:
        console.print(f"Stopped after step {result.report['steps']}. Run the same command with --resume to go on.")
        raise typer.Exit(INTERRUPTED)
    print(f"{config.out}: {result.report['steps']} steps, {result.report['size_bytes'] / 1e6:.2f} MB")
    if publish:
        _publish(config, publish, server, key, activate=activate)


def _check_trains_here(typed: frozenset[str]) -> None:
    if "out" not in typed:
        raise typer.BadParameter("it is needed to train here.", param_hint="'--out'")
    if "name" in typed:
        raise InvalidRequest("`name` is of a training on a `server`: a folder that is uploaded is named by `publish`.")


def _preview(config: TrainConfig, count: int) -> None:
    from manylora.lifecycle.train.train import preview

    with progress(_TRAINING.rendered) as listen:
        rows = preview(config, count, listen)
    print_seen(rows)


def _publish(config: TrainConfig, name: str, server: str, key: str, *, activate: bool | None) -> None:
    from manylora.client.adapters import publish
    from manylora.client.server import connect

    try:
        with connect(server, key, is_patient=True) as client:
            done = publish(client, config.out, name, description=config.title, activate=activate)
    except ManyloraError:
        wish = [] if activate is None else ["--activate" if activate else "--no-activate"]
        again = shlex.join(["manylora", "adapters", "push", str(config.out), "--name", name, *wish])
        console.print(f"The adapter is whole in {config.out}. Publish it with: {again}", highlight=False)
        raise
    print(f"published as {done.label}")
    for line in next_steps(done, server):
        print(line)


@_CHOOSING.command
def choose_rank(
    config: ChooseConfig,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted search stopped.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.ranks, and with --train-final OUT.")] = False,
) -> None:
    """Cross-validate ranks and targets; choose the smallest adapter within one standard error of the best."""
    from manylora.lifecycle.train.choose_rank import choose_rank as run

    config = replace(config, training=replace(config.training, command=command()))
    with stop_on_interrupt() as stopped, progress(_CHOOSING.rendered) as listen:
        report, trained = run(config, resume=resume, overwrite=overwrite, listen=listen, should_stop=stopped)
    if report is not None:
        print_ranks(report)
    if report is None or (trained is not None and not trained.finished):
        console.print("Stopped. Run the same command with --resume to go on.")
        raise typer.Exit(INTERRUPTED)
    if trained is not None:
        out = config.training.out
        print(f"{out}: {trained.report['steps']} steps, {trained.report['size_bytes'] / 1e6:.2f} MB")


@_EVALUATION.command
def evaluate(
    request: EvaluateRequest,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON on stdout.")] = False,
) -> None:
    """Score adapters and the base side by side, with intervals and a paired test against the first.

    Exit code 9: it was asked to promote if better, and did not.
    """
    from manylora.lifecycle.evaluate.command import run_evaluation

    with progress(_EVALUATION.rendered) as listen:
        report, promotion = run_evaluation(request, listen)
    if as_json:
        told = {"promotion": promotion.said, "promoted": promotion.is_done} if promotion else {"promotion": None}
        print(json.dumps(report | told, ensure_ascii=False, indent=2))
    else:
        print_scores(report)
        if promotion:
            print(promotion.said)
    if promotion and not promotion.is_done:
        raise typer.Exit(NOT_PROMOTED)
