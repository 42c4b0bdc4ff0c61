"""`manylora keys …` and `manylora tenants …` change the server's database; a running server notices in a second."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from manylora.cli.answers import NOT_FOUND, USAGE, as_time, complaints, console, fail, print_json, table
from manylora.errors import InvalidRequest, NotFound
from manylora.tenants.interface import Role

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
tenants = typer.Typer(no_args_is_help=True, help="Set and list tenants' shares and quotas.")

DataDir = Annotated[Path | None, typer.Option(help="The server's data folder; default: MANYLORA_DATA_DIR.")]
DatabaseUrl = Annotated[str | None, typer.Option(help="The server's database, where it is not in the data folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for scripts.")]
_MICROSECONDS = 1_000_000


def register(program: typer.Typer) -> None:
    """Add `keys` and `tenants` to the program."""
    program.add_typer(keys, name="keys")
    program.add_typer(tenants, name="tenants")


@contextmanager
def _database(data_dir: Path | None, database_url: str | None, *, must_exist: bool = True) -> Iterator[Any]:
    """The server's. Without `must_exist` it is made, for what may come before the first start."""
    from manylora.database.database import check_exists, open_database
    from manylora.settings import load_settings

    settings = load_settings(data_dir=data_dir, database_url=database_url)
    if must_exist:
        check_exists(settings.resolved_database_url)
    database = open_database(settings.resolved_database_url, settings.database_timeout_s)
    try:
        yield database
    except InvalidRequest as error:
        fail(error.message, USAGE)
    except NotFound as error:
        fail(error.message, NOT_FOUND)
    finally:
        database.close()


@keys.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    role: Annotated[Role, typer.Option(help="As user: inference. manager: also adapters. admin: all.")] = Role.USER,
    name: Annotated[str, typer.Option(help="What it is for; shown in lists.")] = "",
    expires_days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="It ends by itself after so many.")
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from manylora.tenants.keys import KeyStore

    expires = None if expires_days is None else time.time_ns() // 1000 + expires_days * 86_400 * _MICROSECONDS
    with _database(data_dir, database_url, must_exist=False) as database:
        store = KeyStore(database)
        is_first = not store.page(None, 1, None)[0]
        key, text = store.create(tenant, role, name=name, expires=expires)
    _note_keys(data_dir, database_url)
    if as_json:
        facts = {"id": key.id, "tenant": key.tenant, "role": key.role, "prefix": key.prefix}
        print_json({**facts, "name": key.name, "expires": _seconds(key.expires), "key": text})
        return
    if is_first:
        complaints.print(
            "This is the first key. The server was open to all who reach it, and asks everybody for a key from now on.",
            markup=False,
        )
        if role is not Role.ADMIN:
            complaints.print("It is not an admin's: make one for yourself, too, with --role admin.", markup=False)
    complaints.print(f"{key.role} key of {key.tenant}; it is not shown again:", markup=False)
    print(text)


def _note_keys(data_dir: Path | None, database_url: str | None) -> None:
    """Note beside the database that there are keys. Where it is elsewhere, the server does, once it sees them."""
    from manylora.errors import ManyloraError
    from manylora.settings import load_settings
    from manylora.tenants.seal import Seal

    settings = load_settings(data_dir=data_dir, database_url=database_url)
    if settings.database_url is not None:
        return
    try:
        Seal(settings.data_dir).set()
    except ManyloraError as error:  # the key was made, and its text must not be lost
        complaints.print("warning:", error.message, style="yellow", markup=False)


@keys.command()
def reopen(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    store_url: Annotated[
        str | None, typer.Option(help="The server's store, where it is not in the data folder.")
    ] = None,
) -> None:
    """Let a server that had keys and has none any more be open to everybody again."""
    from manylora.catalog.store import open_store
    from manylora.settings import load_settings
    from manylora.tenants.seal import Seal

    settings = load_settings(data_dir=data_dir, store_url=store_url)
    with closing(open_store(settings.resolved_store_url, settings.data_dir / "cache", is_exclusive=False)) as store:
        seal = Seal(settings.data_dir, store)
        if not seal.is_set():
            fail(f"No server with data folder {settings.data_dir} had keys: name the server's own data folder.", USAGE)
        if not yes:
            typer.confirm("Everybody who can connect will be an admin. Go on?", abort=True)
        seal.lift()
    console.print("Without keys, the server is open again", markup=False)


@keys.command("list")
def list_keys(data_dir: DataDir = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """All keys, without their secrets."""
    from manylora.tenants.keys import KeyStore

    with _database(data_dir, database_url) as database:
        found = KeyStore(database).list()
    times = [
        {name: _seconds(getattr(k, name)) for name in ("created", "last_used", "expires", "revoked")} for k in found
    ]
    if as_json:
        facts = [{"id": k.id, "tenant": k.tenant, "role": k.role, "name": k.name, "prefix": k.prefix} for k in found]
        print_json([{**fact, **when} for fact, when in zip(facts, times, strict=True)])
        return
    rows = [
        [k.id, k.tenant, k.role, k.name, f"ml_{k.prefix}_…", as_time(t["created"]), as_time(t["last_used"]),
         *(as_time(t[when]) if t[when] else "" for when in ("expires", "revoked"))]
        for k, t in zip(found, times, strict=True)
    ]  # fmt: skip
    console.print(table(["id", "tenant", "role", "name", "key", "created", "last used", "expires", "revoked"], rows))


def _seconds(microseconds: int | None) -> int | None:
    return None if microseconds is None else microseconds // _MICROSECONDS


@keys.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="ID|PREFIX", help="As `keys list` shows them.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a key worthless from now on."""
    from manylora.tenants.keys import KeyStore

    with _database(data_dir, database_url) as database:
        key = KeyStore(database).revoke(name)
    if as_json:
        print_json({"id": key.id, "tenant": key.tenant, "revoked": _seconds(key.revoked)})
    else:
        console.print(f"{key.id} of {key.tenant} is revoked", markup=False)


@tenants.command("list")
def list_tenants(data_dir: DataDir = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Tenants with a share or quotas of their own."""
    from manylora.tenants.limits import LIMIT_NAMES, TenantStore

    with _database(data_dir, database_url) as database:
        found = TenantStore(database).list()
    if as_json:
        print_json({name: asdict(limits) for name, limits in found.items()})
        return
    rows = [
        [name, f"{limits.weight:g}", *("-" if v is None else str(v) for v in (getattr(limits, n) for n in LIMIT_NAMES))]
        for name, limits in found.items()
    ]
    console.print(table(["tenant", "weight", *(n.replace("_", " ") for n in LIMIT_NAMES)], rows))


def _limit(text: str, metavar: str = "N|none") -> Any:
    return typer.Option(metavar=metavar, help=text)


@tenants.command("set")
def set_limits(
    tenant: Annotated[str, typer.Argument(help="Whose limits.")],
    weight: Annotated[float | None, typer.Option(help="The share in the scheduler; 1 by default.")] = None,
    requests_per_minute: Annotated[str | None, _limit("Requests that begin in a minute.")] = None,
    tokens_per_minute: Annotated[str | None, _limit("Tokens of prompts and answers in a minute.")] = None,
    max_concurrent: Annotated[str | None, _limit("Requests at once.")] = None,
    max_adapters: Annotated[str | None, _limit("Adapters that are kept.")] = None,
    max_adapter_bytes: Annotated[str | None, _limit("Bytes of their files, such as 2GiB.", "SIZE|none")] = None,
    max_pinned: Annotated[str | None, _limit("Adapters that are pinned.")] = None,
    max_file_bytes: Annotated[str | None, _limit("Bytes of data to learn from.", "SIZE|none")] = None,
    max_jobs_queued: Annotated[str | None, _limit("Fine-tuning jobs that wait.")] = None,
    max_jobs_running: Annotated[str | None, _limit("Fine-tuning jobs that run at once.")] = None,
    training_tokens_per_day: Annotated[str | None, _limit("Tokens that jobs learn from in 24 hours.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Set what is given and leave the rest; `none` lifts a limit."""
    from manylora.tenants.limits import TenantStore

    given: dict[str, float | int | None] = {} if weight is None else {"weight": weight}
    for name, text in {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "max_adapters": max_adapters,
        "max_adapter_bytes": max_adapter_bytes,
        "max_pinned": max_pinned,
        "max_file_bytes": max_file_bytes,
        "max_jobs_queued": max_jobs_queued,
        "max_jobs_running": max_jobs_running,
        "training_tokens_per_day": training_tokens_per_day,
    }.items():
        if text is not None:
            given[name] = _parsed(name, text)
    if not given:
        fail("Say what to set, for example --weight 2 --requests-per-minute 60.", USAGE)
    with _database(data_dir, database_url, must_exist=False) as database:
        limits = TenantStore(database).change(tenant, **given)
    if as_json:
        print_json(asdict(limits))
        return
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in asdict(limits).items() if value is not None
    )
    console.print(f"{tenant}: {shown}", markup=False)


def _parsed(name: str, text: str) -> int | None:
    from manylora.settings import parse_size

    if text.lower() == "none":
        return None
    try:
        value = parse_size(text) if name.endswith("_bytes") and text != "0" else int(text)
    except ValueError:
        fail(f"--{name.replace('_', '-')} must be a number or 'none', not '{text}'.", USAGE)
    if isinstance(value, float):
        fail(f"--{name.replace('_', '-')} is a size in bytes, such as 2GiB, not a share.", USAGE)
    return value
