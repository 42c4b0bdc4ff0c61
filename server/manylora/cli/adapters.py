"""`manylora adapters …`: a server's adapters from the command line, and `validate`, which needs no server.

The server is `MANYLORA_URL`, the key `MANYLORA_KEY`; see `cli.answers` for the exit codes.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from manylora.cli import canaries as cli_canaries
from manylora.cli import mixes as cli_mixes
from manylora.cli import store as cli_store
from manylora.cli.answers import (
    REFUSED,
    USAGE,
    Remote,
    as_time,
    console,
    fail,
    in_bytes,
    next_steps,
    print_json,
    server,
    show_problems,
    table,
    write_text,
)
from manylora.cli.shown import or_dash, show_adapter, show_version, show_warnings, status_of
from manylora.client.adapters import publication_of
from manylora.errors import InvalidAdapter
from manylora.identity import ADAPTER_FILES, BROUGHT_FILES
from manylora.lora.format.folder import left_aside, names_in, warning_of

app = typer.Typer(
    no_args_is_help=True,
    help="Upload, list, promote, pin, delete and check adapters.",
    epilog="Asks the server at MANYLORA_URL (http://127.0.0.1:8000 unless set) with the key in MANYLORA_KEY.",
)

AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts instead of a table.")]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Another tenant's, with an admin key.")]
Label = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="An adapter, or one version of it.")]
Note = Annotated[str | None, typer.Option(help="Why, for the history.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.")]
_LABEL = re.compile(r"([^@/?#]+)(?:@([0-9]+))?")


def register(program: typer.Typer) -> None:
    """Add `adapters` to the program."""
    cli_canaries.register(app)
    cli_mixes.register(app)
    cli_store.register(app)
    program.add_typer(app, name="adapters")


@app.command()
def push(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A PEFT folder, or a .zip, .tar, .tar.gz, .tgz.")],
    name: Annotated[str | None, typer.Option(help="The adapter's name; default: the folder's or file's.")] = None,
    description: Annotated[str | None, typer.Option(help="A line about it.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it on the device.")] = False,
    activate: Annotated[
        bool | None,
        typer.Option(
            "--activate/--no-activate",
            help="Whether it answers to the bare name at once; unsaid, only the first version of a name does.",
        ),
    ] = None,
    note: Note = None,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as a new version of NAME. The same content again is the version that is there.

    A further version answers as NAME@VERSION, and to the bare NAME once it is promoted.
    """
    chosen = name or path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar").removesuffix(".zip")
    fields = {"name": chosen} | _noted(note)
    fields |= {"activate": "true" if activate else "false"} if activate is not None else {}
    fields |= {"description": description} if description is not None else {}
    fields |= {"pinned": "true"} if pin else {}
    # Of a folder only these files are sent, so the server cannot know of others.
    aside = warning_of(left_aside(name for name in names_in(path) if name not in BROUGHT_FILES))
    with server(as_json=as_json) as remote, _parts(path) as parts:
        version = remote.call("POST", "/v1/adapters", data=fields, files=parts, params=_tenant(tenant))
    if aside is not None:
        version["report"]["warnings"].insert(0, aside)
    if as_json:
        print_json(version)
    else:
        active = "active" if version["active"] else "not active"
        console.print(f"{version['name']}@{version['version']} is {version['status']} and {active}", markup=False)
        for line in next_steps(publication_of(version), tenant=tenant):
            console.print(line, markup=False, soft_wrap=True)
        show_warnings(version["report"]["warnings"])


class _Watched:
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], advance: Any) -> None:
        self._file = file
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


@contextmanager
def _parts(path: Path) -> Iterator[list[tuple[str, tuple[str, Any]]]]:
    """The multipart files, with a progress bar on standard error if a person is watching."""
    from rich.console import Console
    from rich.progress import Progress

    paths = [path / name for name in BROUGHT_FILES if (path / name).is_file()] if path.is_dir() else [path]
    if not paths or not all(p.is_file() for p in paths):
        fail(f"{path} is neither a folder with {' and '.join(ADAPTER_FILES)} nor an archive.", USAGE)
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("uploading", total=sum(p.stat().st_size for p in paths))
    with ExitStack() as stack:
        stack.enter_context(bar)
        kind = "files" if path.is_dir() else "archive"
        opened = [(p.name, stack.enter_context(p.open("rb"))) for p in paths]
        yield [(kind, (name, _Watched(file, lambda n: bar.advance(task, n)))) for name, file in opened]


def _tenant(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"tenant": tenant}


@app.command("list")
def list_adapters(
    tenant: OfTenant = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """The adapters that the key may use, newest first."""
    found: list[dict[str, Any]] = []
    with server(as_json=as_json) as remote:
        after: dict[str, str] = {}
        while True:
            params = {"limit": str(min(limit - len(found), 1000)), **after, **_tenant(tenant)}
            page = remote.call("GET", "/v1/adapters", params=params)
            found += page["data"]
            if not page["has_more"] or len(found) >= limit:
                break
            after = {"after": page["last_id"]}
    if as_json:
        print_json(found)
        return
    columns = ["name", "tenant", "active", "status", "versions", "rank", "size", "tier", "pinned", "created"]
    rows = [
        [
            a["name"],
            a["tenant"],
            or_dash(a["active_version"]),
            status_of(a),
            str(a["num_versions"]),
            or_dash(a["rank"]),
            in_bytes(a["size_bytes"]),
            or_dash(a["tier"]),
            "yes" if a["pinned"] else "",
            as_time(a["created"]),
        ]
        for a in found
    ]
    console.print(table(columns, rows))


def _split(label: str, *, needs_version: bool = False) -> tuple[str, str | None]:
    """`name@3` as its parts; only what can stand in a path gets through."""
    match = _LABEL.fullmatch(label)
    if match is None or (needs_version and match[2] is None):
        fail(f"'{label}' is not {'NAME@VERSION' if needs_version else 'NAME or NAME@VERSION'}.", USAGE)
    return match[1], match[2]


@app.command()
def show(
    label: Label,
    card: Annotated[bool, typer.Option("--card", help="The README.md that came with it.")] = False,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """An adapter with its versions, or one version with its report."""
    name, number = _split(label)
    path = f"/v1/adapters/{name}"
    with server(as_json=as_json) as remote:
        if card:
            found = _card(remote, path, number, _tenant(tenant))
        elif number:
            found = remote.call("GET", f"{path}/versions/{number}", params=_tenant(tenant))
        else:
            found = _with_all_versions(remote, path, _tenant(tenant))
    if as_json:
        print_json(found)
    elif card:
        write_text(found["text"])
    elif number:
        show_version(found)
    else:
        show_adapter(found)


def _card(remote: Remote, path: str, number: str | None, params: dict[str, str]) -> dict[str, Any]:
    """Of a version, or of the active one where none is named; the newest where none is active."""
    if number is None:
        adapter = remote.call("GET", path, params={"limit": "1", **params})
        number = adapter["active_version"] or adapter["newest_version"]
    found: dict[str, Any] = remote.call("GET", f"{path}/versions/{number}/card", params=params)
    return found


def _with_all_versions(remote: Remote, path: str, params: dict[str, str]) -> dict[str, Any]:
    """The adapter with the versions of every page, oldest first."""
    found: dict[str, Any] = remote.call("GET", path, params=params)
    versions = {version["version"]: version for version in found["versions"]}
    before = found.pop("next_before", None)
    while before is not None:
        page = remote.call("GET", path, params={**params, "before": str(before)})
        versions |= {version["version"]: version for version in page["versions"]}
        before = page["next_before"]
    return {**found, "versions": [versions[number] for number in sorted(versions)]}


@app.command()
def promote(label: Label, note: Note = None, tenant: OfTenant = None, as_json: AsJson = False) -> None:
    """Make NAME@VERSION the active version; `rollback` undoes it. Running requests keep theirs."""
    name, number = _split(label, needs_version=True)
    body = {"active_version": int(number or 0), **_noted(note)}
    _change(name, tenant, body, f"{name}@{number} is active", as_json=as_json)


@app.command()
def rollback(name: Name, note: Note = None, tenant: OfTenant = None, as_json: AsJson = False) -> None:
    """Make the version active again that was before the present one; once more goes back one further."""
    path = f"/v1/adapters/{_split(name)[0]}/rollback"
    with server(as_json=as_json) as remote:
        found = remote.call("POST", path, json=_noted(note), params=_tenant(tenant))
    if as_json:
        print_json(found)
    else:
        console.print(f"{name}@{found['active_version']} is active", markup=False)


@app.command()
def history(
    name: Name,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 50,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """Who changed NAME and when, and which version was active before and after."""
    path, found = f"/v1/adapters/{_split(name)[0]}/history", list[dict[str, Any]]()
    with server(as_json=as_json) as remote:
        before: dict[str, str] = {}
        while True:
            params = {"limit": str(min(limit - len(found), 1000)), **before, **_tenant(tenant)}
            page = remote.call("GET", path, params=params)
            found += page["data"]
            if page["next_before"] is None or len(found) >= limit:
                break
            before = {"before": str(page["next_before"])}
    if as_json:
        print_json(found)
        return
    rows = [[as_time(c["at"]), _done(c), _switch(c), _by(c["by"]), c["note"]] for c in found]
    console.print(table(["when", "what", "active", "by", "note"], rows))


def _done(change: dict[str, Any]) -> str:
    """`upload @2`, `change @1: pinned`, `delete`."""
    version = "" if change["version"] is None else f" @{change['version']}"
    return f"{change['action']}{version}" + (f": {', '.join(change['fields'])}" if change["fields"] else "")


def _switch(change: dict[str, Any]) -> str:
    before, after = change["from_version"], change["to_version"]
    return "" if before == after else f"{or_dash(before)} → {or_dash(after)}"


def _by(by: dict[str, Any]) -> str:
    """Whose key it was, as far as the server tells."""
    return " ".join(filter(None, (by["tenant"], by["role"], by["key_id"])))


def _noted(note: str | None) -> dict[str, str]:
    return {} if note is None else {"note": note}


@app.command()
def pin(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Let it be evicted again.")] = False,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """Keep the active version on the device, whatever else is asked for."""
    said = f"{name} is {'no longer pinned' if off else 'pinned'}"
    _change(_split(name)[0], tenant, {"pinned": not off}, said, as_json=as_json)


@app.command("set")
def set_defaults(
    name: Name,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="JSON, or text as it stands; FIELD= takes a default away."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A manylora.json that takes the place of all defaults.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take all away before FIELD=VALUE is set.")] = False,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """Set what requests to NAME get where they do not say, such as choices, temperature, max_tokens, system_prompt."""
    label, path = _split(name)[0], f"/v1/adapters/{_split(name)[0]}"
    changes = dict(map(_field, fields or ()))
    if not changes and file is None and not clear:
        fail("Nothing to set: give FIELD=VALUE, --file or --clear.", USAGE)
    with server(as_json=as_json) as remote:
        if file is not None:
            before = _object_in(file)
        else:
            found = {} if clear else remote.call("GET", path, params={"limit": "1", **_tenant(tenant)})
            before = found.get("defaults") or {}
        defaults = {field: value for field, value in {**before, **changes}.items() if value is not None}
        found = remote.call("PATCH", path, json={"defaults": defaults}, params=_tenant(tenant))
    if as_json:
        print_json(found)
    else:
        told = ", ".join(found["defaults"]) or "none"
        console.print(f"{label}@{found['active_version']} has the defaults: {told}", markup=False)


def _field(text: str) -> tuple[str, Any]:
    """`temperature=0` as a name and a value; None for what is taken away."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        fail(f"'{text}' is not FIELD=VALUE.", USAGE)
    if not value:
        return name, None
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _object_in(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        fail(f"{file} cannot be read as JSON: {error}", USAGE)
    if not isinstance(found, dict):
        fail(f"{file} holds no JSON object.", USAGE)
    from manylora.catalog.defaults import with_template

    try:
        return with_template(found, file.parent)
    except InvalidAdapter as error:
        fail(f"{file}: {error.problems[0].message}", USAGE)


def _change(name: str, tenant: str | None, body: dict[str, Any], said: str, *, as_json: bool) -> None:
    with server(as_json=as_json) as remote:
        found = remote.call("PATCH", f"/v1/adapters/{name}", json=body, params=_tenant(tenant))
    if as_json:
        print_json(found)
    else:
        console.print(said, markup=False)
        if found["status"] == "other_base":
            console.print("Its active version was made for another base, and is not used with the one that runs.")


@app.command()
def delete(
    label: Label,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter, or one version of it. Running requests finish."""
    name, number = _split(label)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Delete {label}{'' if number else ' with all its versions'}?", abort=True)
    path = f"/v1/adapters/{name}" + (f"/versions/{number}" if number else "")
    with server(as_json=as_json) as remote:
        remote.call("DELETE", path, params=_tenant(tenant))
    if as_json:
        print_json({"deleted": label})
    else:
        console.print(f"{label} is deleted", markup=False)


@app.command()
def validate(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A PEFT folder or an archive of one.")],
    model: Annotated[str | None, typer.Option(help="The base model; default: the embedded one.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="The server's --max-rank.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter against a base model without a server: the same report, but for the measured effect."""
    from manylora.cli.offline import validate_offline
    from manylora.errors import InvalidAdapter, TooLarge

    if not path.exists():
        fail(f"{path} does not exist.", USAGE)
    try:
        found = validate_offline(path, model, max_rank=max_rank)
    except (InvalidAdapter, TooLarge) as error:
        if as_json:
            print_json({"error": error.body()})
            raise typer.Exit(REFUSED) from error
        if isinstance(error, InvalidAdapter):
            show_problems(error.body()["problems"])
        fail(error.message, REFUSED)
    if as_json:
        print_json(found)
        return
    matched = len(found["report"]["matched"])
    console.print(f"sound: rank {found['rank']}, {matched} modules, {in_bytes(found['size_bytes'])}", markup=False)
    show_warnings(found["report"]["warnings"])
