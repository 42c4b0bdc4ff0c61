"""The program `manylora`. What takes long to import is imported by the command that needs it."""

import importlib
import sys
from typing import Annotated

import typer

from manylora import __version__
from manylora.errors import InvalidSettings, ManyloraError

__all__ = ["build", "main"]

# Each has `register(app)`, which adds commands without importing torch.
_COMMANDS = ("serve", "cluster", "ask", "adapters", "keys", "usage", "lifecycle", "data", "jobs", "worker")
_USAGE, _FAILURE, _INTERRUPTED = 2, 1, 130


def build() -> typer.Typer:
    """The program with all its commands."""
    app = typer.Typer(
        name="manylora",
        help="One base model, many LoRA adapters, every forward pass shared.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_program)
    for name in _COMMANDS:
        importlib.import_module(f"manylora.cli.{name}").register(app)
    return app


def main() -> None:
    """Run the program; an error of ours is one line on standard error and an exit code."""
    try:
        build()()
    except InvalidSettings as error:
        _fail(error.message, _USAGE)
    except ManyloraError as error:
        _fail(error.message, _FAILURE)
    except OSError as error:  # of a disk that is full, a folder that may not be written, …
        from manylora.faults import file_error

        _fail(file_error(error, "The program cannot go on").message, _FAILURE)
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)


def _fail(message: str, code: int) -> None:
    from rich.console import Console

    Console(stderr=True).print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manylora {__version__}")
        raise typer.Exit


def _program(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One base model, many LoRA adapters, every forward pass shared."""
