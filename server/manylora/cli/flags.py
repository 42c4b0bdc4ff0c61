"""Flags made from the parameters that the lifecycle declares, so that nothing is written twice.

`Flags(TrainConfig)` has one flag for each field, of nested dataclasses too, and reads what was typed back into one.
Where a message names a parameter, `rendered` calls it by its flag.
"""

import functools
import inspect
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from manylora.cli.terminal import errors
from manylora.errors import InvalidRequest
from manylora.lifecycle.parameters import InvalidParameter, renamed

__all__ = ["Flags", "Spelling", "settings_from", "words_of"]

T = TypeVar("T")
_WORDS: Final = tuple[str, ...]
_NUMBERS: Final = tuple[int, ...]
# A key does not belong into a file that is kept with the data, and these say what is to happen now.
_NOT_IN_FILES: Final = frozenset({"key", "config", "help", "resume", "overwrite", "preview"})


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a parameter is typed where that is not `--its-name` with its own default.

    `read` makes the field's value of what was typed; with `is_repeated` the flag may be given several times, and `read`
    makes one value of each. `default` is what an absent flag stands for, as it would be typed.
    """

    flag: str = ""
    help: str = ""
    read: Callable[[str], Any] | None = None
    default: str | None = None
    envvar: str | None = None
    is_repeated: bool = False
    is_argument: bool = False


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One field: `path` leads to it from the outermost dataclass, `kind` is its type without None."""

    path: tuple[str, ...]
    kind: Any
    is_optional: bool
    default: Any
    help: str
    spelling: Spelling

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def flag(self) -> str:
        return self.spelling.flag or f"--{self.name.replace('_', '-')}"


class Flags(Generic[T]):
    """The flags of a dataclass.

    `spelled` and `without`, the fields that no flag sets, name fields by dotted paths; `called` are flags of the
    command's own by the name that messages have for them.
    """

    def __init__(
        self,
        kind: type[T],
        *,
        spelled: Mapping[str, Spelling] | None = None,
        without: frozenset[str] = frozenset(),
        called: Mapping[str, str] | None = None,
    ) -> None:
        self._kind = kind
        self._parameters = list(_parameters(kind, (), spelled or {}, without))
        self._names = {**(called or {}), **{one.name: one.flag.partition("/")[0] for one in self._parameters}}

    def rendered(self, message: str) -> str:
        """A message of the lifecycle with its parameters called by their flags."""
        return renamed(message, self._names)

    def command(self, function: Callable[..., None]) -> Callable[..., None]:
        """The typer command of a function that takes the dataclass first, and other flags after it.

        What the lifecycle refuses becomes one line on standard error; see `terminal.errors`.
        """
        own = list(inspect.signature(function).parameters.values())[1:]
        hints = get_type_hints(function, include_extras=True)
        self._names |= {one.name: f"--{one.name.replace('_', '-')}" for one in own if one.name not in self._names}

        @functools.wraps(function)
        def run(**typed: Any) -> None:
            with errors(self.rendered):
                config = self._read({p.name: typed.pop(p.name) for p in self._parameters})
                function(config, **typed)

        made = [self._signed(parameter) for parameter in self._parameters]
        made += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name]) for one in own]
        run.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in made}
        return run

    def _signed(self, parameter: _Parameter) -> inspect.Parameter:
        spelling = parameter.spelling
        text = self.rendered(spelling.help or parameter.help).rstrip(".")
        text = f"{text[:1].upper()}{text[1:]}."
        choices = "|".join(get_args(parameter.kind)) if get_origin(parameter.kind) is Literal else None
        kind, default = _typed(parameter)
        if spelling.is_argument:
            option: Any = typer.Argument(help=text, metavar=choices)
        else:
            option = typer.Option(parameter.flag, help=text, envvar=spelling.envvar, metavar=choices)
        missing = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(
            parameter.name, inspect.Parameter.KEYWORD_ONLY, default=missing, annotation=Annotated[kind, option]
        )

    def _read(self, typed: Mapping[str, Any]) -> T:
        """Raises InvalidParameter."""
        values = {parameter.path: _value(parameter, typed[parameter.name]) for parameter in self._parameters}
        built: T = _built(self._kind, (), values)
        return built


def _parameters(
    kind: Any, path: tuple[str, ...], spelled: Mapping[str, Spelling], without: frozenset[str]
) -> Iterator[_Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        here = (*path, one.name)
        dotted = ".".join(here)
        hint = hints[one.name]
        if is_dataclass(hint):
            yield from _parameters(hint, here, spelled, without)
        elif dotted not in without:
            text = hint.__metadata__[0] if get_origin(hint) is Annotated else ""
            bare, is_optional = _without_none(get_args(hint)[0] if get_origin(hint) is Annotated else hint)
            yield _Parameter(here, bare, is_optional, _default(one), text, spelled.get(dotted, Spelling()))


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    (bare,) = (one for one in get_args(kind) if one is not type(None))
    return bare, True


def _default(one: "Field[Any]") -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _typed(parameter: _Parameter) -> tuple[Any, Any]:
    """What typer is told: the type of what is typed, and its default (MISSING: it has to be typed)."""
    spelling, default = parameter.spelling, parameter.default
    if spelling.is_repeated:
        return (list[str], MISSING) if default is MISSING else (list[str] | None, None)
    if spelling.default is not None:
        return str, spelling.default
    if parameter.kind in (_WORDS, _NUMBERS):
        return str, default if default is MISSING else ",".join(map(str, default))
    if spelling.read is not None or get_origin(parameter.kind) is Literal:
        return str, default
    return (parameter.kind | None if parameter.is_optional else parameter.kind), default


def _value(parameter: _Parameter, typed: Any) -> Any:
    """Raises InvalidParameter."""
    read = parameter.spelling.read
    if parameter.spelling.is_repeated:
        return tuple(text if read is None else read(text) for text in typed or ())
    if read is not None:
        return read(typed)
    if parameter.kind == _WORDS:
        return words_of(typed)
    if parameter.kind == _NUMBERS:
        return _numbers_of(parameter.name, typed)
    if get_origin(parameter.kind) is Literal and typed not in get_args(parameter.kind):
        raise InvalidParameter(
            f"`{parameter.name}` must be one of {', '.join(get_args(parameter.kind))}, not {typed!r}."
        )
    return typed


def settings_from(context: typer.Context, path: Path | None) -> Path | None:
    """A callback of `--config`: what the file says stands in for flags that are not typed.

    Its names are those of flags, `batch-size` or `batch_size`; a list is several values of one flag.
    """
    if path is None:
        return None
    with errors(str):
        context.default_map = {**(context.default_map or {}), **_defaults_in(path, context.command.params)}
    return path


def _defaults_in(path: Path, params: Sequence[Any]) -> dict[str, Any]:
    """Raises InvalidRequest."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as TOML: {error}") from error
    known = {option.lstrip("-").replace("-", "_"): one for one in params for option in one.opts if option[0] == "-"}
    strange = [name for name in found if name.replace("-", "_") not in known.keys() - _NOT_IN_FILES]
    if strange:
        raise InvalidRequest(f"{path}: {', '.join(strange)} is no flag of this command, or one to be typed.")
    values: dict[str, Any] = {}
    for name, value in found.items():
        one = known[name.replace("-", "_")]
        if isinstance(value, dict):
            raise InvalidRequest(f"{path}: {name} must be a value or a list, not a table.")
        is_joined = isinstance(value, list) and not one.multiple
        values[one.name] = ",".join(map(str, value)) if is_joined else value
    return values


def words_of(text: str) -> tuple[str, ...]:
    """`a, b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers_of(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in words_of(text))
    except ValueError as error:
        raise InvalidParameter(f"`{name}` must be whole numbers with commas between, not {text!r}.") from error


def _built(kind: Any, path: tuple[str, ...], values: Mapping[tuple[str, ...], Any]) -> Any:
    hints = get_type_hints(kind)
    given = {}
    for one in fields(kind):
        here = (*path, one.name)
        if is_dataclass(hints[one.name]):
            given[one.name] = _built(hints[one.name], here, values)
        elif here in values:
            given[one.name] = values[here]
    return kind(**given)
