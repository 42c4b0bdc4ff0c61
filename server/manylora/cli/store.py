"""`manylora adapters verify`, `rescan` and `orphans`: on the server's own database and store, not over HTTP."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.answers import FAILED, USAGE, as_time, console, fail, in_bytes, print_json, table

if TYPE_CHECKING:
    from manylora.catalog.rescan import Found, Unnamed
    from manylora.catalog.store import Store
    from manylora.database.database import Database
    from manylora.settings import Settings

__all__ = ["register"]

DataDir = Annotated[Path | None, typer.Option(help="The server's data folder; default: MANYLORA_DATA_DIR.")]
DatabaseUrl = Annotated[str | None, typer.Option(help="The server's database, where it is not in the data folder.")]
StoreUrl = Annotated[str | None, typer.Option(help="The server's store, where it is not in the data folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts instead of text.")]
_DAY_S = 86_400


def register(app: typer.Typer) -> None:
    """Add the commands to `manylora adapters`."""
    for command in (verify, rescan, orphans):
        app.command()(command)


@contextmanager
def _opened(
    settings: "Settings", *, is_exclusive: bool, must_exist: bool = True
) -> Iterator[tuple["Database", "Store"]]:
    """The server's database and store. Exclusively: no server may be using this data folder or a local store.

    One of the two must be there, or the name has a slip in it: the database, or without `must_exist` the store, for
    which an empty one is made.
    """
    from manylora.catalog.files import FolderLock
    from manylora.catalog.store import check_store_exists, open_store
    from manylora.database.database import check_exists, open_database

    with ExitStack() as stack:
        if must_exist:
            check_exists(settings.resolved_database_url)
        else:
            check_store_exists(settings.resolved_store_url)
        if is_exclusive:
            stack.callback(FolderLock(settings.data_dir).release)
        database = open_database(settings.resolved_database_url, settings.database_timeout_s)
        stack.callback(database.close)
        store = open_store(settings.resolved_store_url, settings.data_dir / "cache", is_exclusive=is_exclusive)
        stack.callback(store.close)
        yield database, store


def _settings(data_dir: Path | None, database_url: str | None, store_url: str | None, **more: Any) -> "Settings":
    from manylora.settings import load_settings

    return load_settings(data_dir=data_dir, database_url=database_url, store_url=store_url, **more)


def verify(
    repair_from: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Mend from here: a backup of the store, or any folder with the adapters."),
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    store_url: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Read every stored adapter and compare it with the hash that it was stored under. A server may be running.

    Exit code 1 if one is damaged or gone and was not mended.
    """
    from manylora.catalog.verify import verify as check_all

    if repair_from is not None and not repair_from.is_dir():
        fail(f"--repair-from {repair_from} is not a folder.", USAGE)
    settings = _settings(data_dir, database_url, store_url)
    with _opened(settings, is_exclusive=False) as (database, store):
        checked = list(check_all(database, store, repair_from))
    bad = [each for each in checked if each.fault is not None]
    num_left = sum(not each.is_mended for each in bad)
    if as_json:
        rows = [{"blob": c.blob, "versions": c.labels, "fault": c.fault, "mended": c.is_mended} for c in bad]
        print_json({"checked": len(checked), "sound": len(checked) - len(bad), "left": num_left, "faults": rows})
    else:
        for each in bad:
            state = "mended" if each.is_mended else "DAMAGED"
            console.print(f"{state}: {', '.join(each.labels)}: {each.fault} ({each.blob})", markup=False)
        console.print(f"{len(checked)} checked, {len(bad) - num_left} mended, {num_left} damaged", markup=False)
    if num_left:
        raise typer.Exit(FAILED)


def rescan(
    tenant: Annotated[
        str | None, typer.Option(help="Whose the files without a label are to be; needs the base model's config.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model for --tenant; default: the embedded one.")] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Although the store is another registry's and this one has adapters.")
    ] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    store_url: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Register the store's files that the database does not know, those in orphans/ too. Stop the server first.

    Names, numbers and reports come from the labels beside the files. The newest version of an adapter without an
    active one becomes active.
    """
    from manylora.catalog.rescan import rescan as register_all

    settings = _settings(data_dir, database_url, store_url, model=model)
    unnamed = None if tenant is None else _unnamed(tenant, settings)
    with _opened(settings, is_exclusive=True, must_exist=False) as (database, store):
        found = register_all(database, store, unnamed, take_over=take_over)
    if as_json:
        print_json(
            {
                "registered": [{"tenant": r.tenant, "name": r.name, "version": r.version} for r in found.registered],
                "known": found.num_known,
                "taken": [{"tenant": r.tenant, "name": r.name, "version": r.version} for r in found.taken],
                "unnamed": found.nameless,
                "damaged": found.damaged,
                "refused": found.refused,
                "claimed": found.is_claimed,
            }
        )
    else:
        _show(found)
    if found.damaged or found.refused or not found.is_claimed:
        raise typer.Exit(FAILED)


def _unnamed(tenant: str, settings: "Settings") -> "Unnamed":
    from manylora.catalog.base_signature import signature_of
    from manylora.catalog.rescan import Unnamed
    from manylora.cli.offline import validated
    from manylora.models.offered import modules_of
    from manylora.tenants.keys import check_tenant

    check_tenant(tenant)
    modules = modules_of(settings.model)
    return Unnamed(tenant, signature_of(modules), lambda folder, blob: validated(folder, blob, modules, settings))


def _show(found: "Found") -> None:
    for label in found.registered:
        console.print(f"registered: {label.tenant}/{label.name}@{label.version}", markup=False)
    for label in found.taken:
        console.print(
            f"left out: {label.tenant}/{label.name}@{label.version} is another version by now ({label.blob})",
            markup=False,
        )
    for blob, reason in {**found.damaged, **found.refused}.items():
        console.print(f"left out: {blob}: {reason}", markup=False)
    for blob in found.nameless:
        console.print(f"without a label: {blob}; --tenant TENANT registers it under a name of its own", markup=False)
    console.print(f"{len(found.registered)} registered, {found.num_known} were known", markup=False)
    if not found.is_claimed:
        console.print(
            "Nothing was changed: no file of this store has a label that says which adapter it is. Say with --tenant "
            "whose they are to be (`public` is everybody), or copy labels/ from a backup of the store and rescan again."
        )


def orphans(
    drop: Annotated[bool, typer.Option("--drop", help="Delete them for good. Stop the server first.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    store_url: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Adapter files that were set aside because the database did not know them. `rescan` brings them back.

    With --drop, those that the database knows by now are brought back as well, and the others deleted.
    """
    from manylora.catalog.labels import all_labels
    from manylora.catalog.orphans import drop_orphans

    settings = _settings(data_dir, database_url, store_url)
    with _opened(settings, is_exclusive=drop) as (database, store):
        found = store.orphans()
        names: dict[str, list[str]] = {}
        for label in all_labels(store):
            names.setdefault(label.blob, []).append(f"{label.tenant}/{label.name}@{label.version}")
        if drop and found and not yes:
            typer.confirm(f"Delete the files of {len(found)} adapters for good?", abort=True)
        dropped = drop_orphans(database, store) if drop else set[str]()
    until = {o.blob: int(o.since + settings.orphan_days * _DAY_S) for o in found}
    if as_json:
        rows = [
            {"blob": o.blob, "versions": names.get(o.blob, []), "size_bytes": o.size_bytes, "since": int(o.since),
             "until": until[o.blob], "dropped": o.blob in dropped}
            for o in found
        ]  # fmt: skip
        print_json(rows)
        return
    back = "brought back: known"
    shown = [
        [", ".join(names.get(o.blob, ["(no label)"])), in_bytes(o.size_bytes), as_time(int(o.since)),
         "dropped" if o.blob in dropped else back if drop else as_time(until[o.blob]), o.blob]
        for o in found
    ]  # fmt: skip
    console.print(table(["adapter", "size", "set aside", "kept until", "blob"], shown))
