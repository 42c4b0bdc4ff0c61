"""`manylora serve`: every setting is a flag, made from the setting itself, so that nothing is written twice."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from manylora import __version__
from manylora.settings import ENV_PREFIX, Settings, load_settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from manylora.models.memory_report import MemoryReport
    from manylora.serving.process import Announcement

__all__ = ["flag_of", "given", "register", "shown_default", "with_flags"]

_ARGUMENT = "model"


def register(app: typer.Typer) -> None:
    """Add `serve` to `app`."""
    option = typer.Option("--dry-run", help="Say what the base will take of the memory, and end without loading it.")
    kind = Annotated[bool, option]
    more = inspect.Parameter("dry_run", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    app.command("serve", help=_HELP)(with_flags(_serve, more))


_HELP = """Serve MODEL and many adapters over an OpenAI-compatible API.

MODEL is a Hugging Face directory or id, or a GGUF file; without it the embedded default model is used.
Settings come from manylora.toml, MANYLORA_* in the environment and these flags, the later ones first.
"""


def flag_of(name: str) -> str:
    """`max_num_seqs` is `--max-num-seqs` on the command line."""
    return f"--{name.replace('_', '-')}"


def _serve(*, dry_run: bool, **flags: Any) -> None:
    settings = load_settings(**given(flags))
    if dry_run:
        _report_memory(settings)
        return
    typer.echo(f"manylora {__version__} is starting …", err=True)
    from manylora.serving.imports import uncollected

    with uncollected():
        from manylora.serving.process import serve
    serve(settings, _announce)


def _report_memory(settings: Settings) -> None:
    from manylora.serving.imports import uncollected

    with uncollected():
        from manylora.models.memory_report import memory_report
    found = memory_report(settings)
    rows = {
        f"{found.parameters:,} parameters": found.base,
        "  linears": found.linears,
        "  what makes the logits": found.head,
        "  embedding, norms and others": found.others,
        **_cache_row(found),
        **{f"at most, by {flag_of(name)}": size for name, size in found.limits.items()},
        "together": found.total,
        "free now": found.free,
    }
    typer.echo(f"{settings.model or 'the default model'}, --profile {settings.profile}:")
    for title, size in rows.items():
        typer.echo(f"{title:44} {size / 2**20:>10,.1f} MiB")


def _cache_row(found: "MemoryReport") -> dict[str, int]:
    if found.per_window is not None:
        return {f"windows of sound ({found.per_window / 2**20:.1f} MiB each)": found.kv_cache}
    if not found.kv_cache:
        return {}
    per_token = "not said by the config" if found.kv_per_token is None else f"{found.kv_per_token / 2**10:.1f} KiB"
    return {f"KV cache ({per_token} a token)": found.kv_cache}


def _announce(what: "Announcement") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    adapters = "1 adapter" if what.num_adapters == 1 else f"{what.num_adapters} adapters"
    console.print(f"[bold]manylora[/] serves [bold]{what.model}[/] and {adapters}")
    if what.num_other_base:
        are = "adapter was" if what.num_other_base == 1 else "adapters were"
        console.print(f"  {what.num_other_base} more {are} made for another base and cannot be used with this one.")
    pages = {"API": "/v1", "Dashboard": "/dashboard", "Docs": "/docs"} | (
        {"Metrics": "/metrics"} if what.has_metrics else {}
    )
    for title, path in pages.items():
        console.print(f"  {title:10} {what.url}{path}")
    if what.is_open:
        console.print(
            "  No key exists, so everybody who can connect is an admin. `manylora keys create` makes the first."
        )
    if what.moved_from:
        console.print(
            f"  [yellow]Listening on this machine only, not on {what.moved_from}:[/] "
            "make a key first, or start with --allow-open."
        )


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that somebody gave."""
    return {name: value for name, value in flags.items() if value not in (None, [])}


def with_flags(function: Callable[..., None], *more: inspect.Parameter) -> Callable[..., None]:
    """Give the function the signature that typer reads: one optional parameter for each setting, and `more`."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, field))
        for name, field in Settings.model_fields.items()
    ]
    parameters += more

    def command(**flags: Any) -> None:
        function(**flags)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _annotation(name: str, field: "FieldInfo") -> Any:
    """Text stays text: the settings know how to read it, and say what is wrong with it in one way for all sources."""
    if name == _ARGUMENT:
        return Annotated[str | None, typer.Argument(metavar="MODEL", help=_help(name, field), show_default=False)]
    flag = flag_of(name)
    if field.annotation is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=_help(name, field), show_default=False)
        return Annotated[bool | None, option]
    many = get_origin(field.annotation) is tuple
    option = typer.Option(flag, help=_help(name, field), metavar=_metavar(field), show_default=False)
    return Annotated[list[str] | None, option] if many else Annotated[str | None, option]


def _help(name: str, field: "FieldInfo") -> str:
    text = (field.description or "").replace("`", "").replace("\n", " ")
    default = shown_default(field)
    return f"{text} [{ENV_PREFIX}{name.upper()}]" + (f" (default: {default})" if default else "")


def shown_default(field: "FieldInfo") -> str:
    """The default as one writes it, in the unit that fits; empty where the description tells."""
    value = field.default
    if field.default_factory is not None or value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if _is_size(field):
        return _shown_size(value)
    return str(value)


def _is_size(field: "FieldInfo") -> bool:
    return set(get_args(field.annotation)) == {int, float}


def _shown_size(value: int | float) -> str:
    if isinstance(value, float):
        return f"{value:.0%}"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _metavar(field: "FieldInfo") -> str:
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    if _is_size(field):
        return "SIZE"
    if get_origin(kinds[0]) is Literal:
        return "|".join(get_args(kinds[0]))
    return {int: "N", float: "SECONDS", Path: "DIR"}.get(kinds[0], "TEXT")
