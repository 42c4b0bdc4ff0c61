"""From the fields of a dataclass to flags and back, and messages that name them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from manylora.cli.flags import Flags, Spelling
from manylora.errors import InvalidRequest
from manylora.lifecycle.parameters import InvalidParameter, renamed
from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig, check_settings


@dataclass(frozen=True)
class Inner:
    """A part of another one."""

    rank: Annotated[int, "How much, less than `size_limit`"] = 8
    names: Annotated[tuple[str, ...], "Names"] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    """One field of each kind."""

    data: Annotated[Path, "Where from"]
    inner: Inner = field(default_factory=Inner)
    size_limit: Annotated[float | None, "At most"] = None
    kind: Annotated[Literal["one", "two"], "Which"] = "one"
    numbers: Annotated[tuple[int, ...], "Numbers"] = (1, 2)
    parts: Annotated[tuple[int, ...], "Parts"] = ()
    is_loud: Annotated[bool, "Louder"] = False
    command: str = "none"


def run(*words: str, refuse: str = "") -> tuple[Result, list[Any]]:
    got: list[Any] = []
    flags = Flags(
        Outer,
        spelled={"size_limit": Spelling("--limit"), "parts": Spelling("--part", read=len, is_repeated=True)},
        without=frozenset({"command"}),
    )

    def command(outer: Outer, over_again: bool = False) -> None:
        """Do it."""
        got.extend([outer, over_again])
        if refuse:
            raise InvalidParameter(refuse)

    app = typer.Typer()
    app.command()(flags.command(command))
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"}), got


def test_what_is_not_typed_is_the_fields_default() -> None:
    assert run("--data", "x")[1] == [Outer(Path("x")), False]


def test_every_kind_of_field_is_read_from_its_flag() -> None:
    words = ("--rank", "3", "--names", "c, d,", "--limit", "0.5", "--kind", "two", "--numbers", "4,5")
    done, got = run("--data", "x", *words, "--part", "ab", "--part", "abc", "--is-loud", "--over-again")

    assert done.exit_code == 0, done.output
    assert got == [Outer(Path("x"), Inner(3, ("c", "d")), 0.5, "two", (4, 5), (2, 3), is_loud=True), True]


def test_a_field_without_a_default_has_to_be_typed_and_one_that_is_left_out_has_no_flag() -> None:
    assert run()[0].exit_code == 2
    assert run("--data", "x", "--command", "y")[0].exit_code == 2
    assert "less than --limit" in run("--help")[0].output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kind", "three"), "error: --kind must be one of one, two, not 'three'."),
        (("--numbers", "1,x"), "error: --numbers must be whole numbers with commas between, not '1,x'."),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_flag(words: tuple[str, ...], said: str) -> None:
    done, got = run("--data", "x", *words)

    assert (done.exit_code, done.stderr.strip(), got) == (1, said, [])


def test_a_refusal_calls_parameters_by_their_flags_and_leaves_other_words() -> None:
    refusal = "`size_limit` is below `rank`; see `over_again` and `elsewhere`."

    assert run("--data", "x", refuse=refusal)[0].stderr.strip() == (
        "error: --limit is below --rank; see --over-again and `elsewhere`."
    )


def test_a_refusal_of_the_library_names_its_parameter_for_whoever_asked() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_settings(LoraShape(rank=0), Schedule(), 8, None)

    assert caught.value.message == "`rank` must be positive, not 0."
    assert caught.value.param == "rank"
    assert renamed(caught.value.message, {"rank": "hyperparameters.rank"}) == (
        "hyperparameters.rank must be positive, not 0."
    )


def test_training_has_a_flag_for_every_field_but_its_own_command_line() -> None:
    def command(config: TrainConfig) -> None: ...

    made: Any = Flags(TrainConfig, without=frozenset({"command"})).command(command)
    names = set(made.__annotations__)

    assert {"rank", "lr", "seed", "data", "max_length"} <= names
    assert "command" not in names
