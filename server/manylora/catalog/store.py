"""Adapter files, addressed by their content: a local folder by default, an object store by URL.

    <root>/<blob[:2]>/<blob>/adapter_config.json           a blob: the two files of an adapter
                             adapter_model.safetensors
           orphans/<blob>/…                                the same, set aside: the database did not know them
           labels/<blob>.<version id>.json                 what the registry knows of a version (`catalog.labels`)
           registry                                        whose store this is (`catalog.belonging`)
           files/<id>                                      a tenant's file of data (`jobs.files`)
           jobs/<id>/…                                     what a fine-tuning job wrote on its way (`jobs.remains`)

A blob is never changed, only mended where its bytes are not those of its address any more. In a local folder it
appears whole, by one rename after everything was synced. In an object store its two objects are written one after the
other; nothing names the blob before both are there.

Database and store are backed up and restored apart from each other, so neither is believed about the other: files that
the database does not know are moved to `orphans/`, from where they come back once it does.
"""

import secrets
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import fsspec
from fsspec.utils import stringify_path

from manylora.catalog.cache import DownloadCache
from manylora.catalog.files import Orphan
from manylora.catalog.local_store import LocalStore
from manylora.catalog.remote_store import RemoteStore
from manylora.errors import StartupError, Unavailable, quoted
from manylora.faults import cause_of
from manylora.packages import install_command

__all__ = ["LocalStore", "RemoteStore", "Store", "check_store_exists", "open_store"]


class Store(Protocol):
    """Blobs by address. Methods block: call them from a worker thread.

    All raise StoreUnavailable or StorageFull where the files cannot be read or written now.
    """

    @property
    def is_shared(self) -> bool:
        """Whether other servers may use it at the same time."""
        ...

    def put(self, folder: Path, blob: str) -> bool:
        """Keep the two files of `folder`, durably; whether nothing was there. What is there is compared and mended."""
        ...

    def has(self, blob: str) -> bool: ...

    def fault(self, blob: str, *, is_orphan: bool = False) -> str | None:
        """What is wrong with the blob's files, read to their ends and compared with the address; None where nothing."""
        ...

    def local_folder(self, blob: str) -> Path:
        """A local folder with the blob's two files, which have its hash. Raises AdapterLoadFailed where not."""
        ...

    def remove(self, blob: str) -> None:
        """Delete the blob for good, wherever it is."""
        ...

    def blobs(self) -> dict[str, float]:
        """Every blob outside `orphans/`, whole or not, and when it was written, in Unix seconds."""
        ...

    def orphans(self) -> list[Orphan]: ...

    def set_aside(self, blob: str) -> None:
        """Move the blob to `orphans/`, where it is whole before it is gone here."""
        ...

    def bring_back(self, blob: str) -> bool:
        """Move the blob from `orphans/` to its place, if it is there and its place is empty; whether it was moved."""
        ...

    def drop(self, blob: str) -> None:
        """Delete the blob from `orphans/` for good."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file below the root, None where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file below the root, durably and in one step."""
        ...

    def erase(self, name: str) -> None: ...

    def names(self, folder: str) -> set[str]:
        """The names of the small files in a folder below the root."""
        ...

    def keep_file(self, name: str, source: Path) -> None:
        """Replace a file of any size below the root by a copy of `source`, durably and in one step."""
        ...

    def fetch_file(self, name: str, target: Path) -> bool:
        """Copy a file below the root to `target`; False where there is none."""
        ...

    def open_file(self, name: str, copy: Path) -> BufferedReader | None:
        """A file below the root, open from its beginning, None where there is none; replaced or erased, it stays.

        What is not on this machine is copied to `copy` first, of which nothing is left once the file is closed.
        """
        ...

    def tidy(self) -> None:
        """Remove what an interrupted write left. Call it only while nobody else writes."""
        ...

    def close(self) -> None: ...


def open_store(url: str, cache: Path, *, is_exclusive: bool = True, is_shared: bool = False) -> Store:
    """The store behind a URL; `cache` is a local folder for copies of remote blobs. Raises StartupError.

    Without `is_exclusive` a local folder may be in use by a server: for reading, and for mending single blobs. With
    `is_shared` several servers on one database may use it.
    """
    if _is_folder(url):
        return LocalStore(_folder_of(url), is_locked=is_exclusive, is_shared=is_shared)
    if url.startswith("local://"):
        raise StartupError(f"store_url {quoted(url)}: a folder is written as file:///PATH.")
    check_reachable(url)
    try:
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except Exception as error:  # fsspec's file systems promise no class
        raise StartupError(f"store_url {quoted(url)} is not usable: {cause_of(error)}") from error
    store = RemoteStore(filesystem, stringify_path(root), DownloadCache(cache))
    if is_exclusive:
        _prove(store, url)
    return store


def check_reachable(url: str) -> None:
    """Raises StartupError where the package that reaches such a store is missing. Cheap: it asks no store."""
    protocol = url.partition("://")[0]
    if protocol == url or _is_folder(url):
        return
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        lacking = error.__cause__ if isinstance(error.__cause__, ImportError) else error  # fsspec's own names no module
        advice = f" Install it with: {install_command(lacking.name)}" if lacking.name else ""
        raise StartupError(f"store_url {quoted(url)}: {str(error).rstrip('.')}.{advice}") from error
    except ValueError as error:
        raise StartupError(f"store_url {quoted(url)} is not usable: {cause_of(error)}") from error


def check_store_exists(url: str) -> None:
    """Refuse to work on a local store that does not exist, where nothing would be found. Raises StartupError."""
    if _is_folder(url) and not _folder_of(url).is_dir():
        raise StartupError(f"There is no store {quoted(url)}: name the server's own data folder or store.")


def _is_folder(url: str) -> bool:
    return url.startswith("file://") or "://" not in url


def _folder_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _prove(store: Store, url: str) -> None:
    """Write and remove a file, so that a store that cannot be written fails at start. Raises StartupError."""
    name, sent = f"probes/{secrets.token_hex(8)}", secrets.token_bytes(16)
    try:
        store.write(name, sent)
        try:
            found = store.read(name)
        finally:
            store.erase(name)
    except Unavailable as error:
        raise StartupError(f"store_url {quoted(url)} cannot be used: {error.message}") from error
    if found != sent:
        raise StartupError(
            f"store_url {quoted(url)} cannot be used: what was written there came back as something else."
        )
