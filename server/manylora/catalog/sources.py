"""Where an import may come from: `file://`, `hf://owner/repo[@revision]`, `s3://bucket/prefix`, by an allow-list.

An entry of the allow-list is the beginning of a source (`file:///srv/adapters`, `hf://acme`, `s3://models/lora`)
that covers itself and what lies below it, or, if it holds a `*`, a pattern for the whole source. Paths of files
are compared after links are resolved, so a link cannot lead out of an allowed folder.
"""

import fnmatch
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import fsspec
import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from manylora.errors import InvalidAdapter, InvalidRequest, Problem, SourceNotAllowed, TooLarge, Unavailable, quoted
from manylora.faults import cause_of, file_error, is_local
from manylora.identity import ADAPTER_FILES, BROUGHT_FILES, OPTIONAL_FILES
from manylora.lora.format.folder import names_in

_HF: Final = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_S3: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]*(?:/[^?*\[\]]*)?", re.ASCII)


def fetch(source: str, target: Path, *, allow: Sequence[str], max_bytes: int) -> list[str]:
    """Copy the source's adapter files, and its defaults, into the folder `target`; the names of what lies beside them.

    A hub's repository is not listed, since people keep it for more than the adapter. Raises InvalidRequest (not a
    source, or not there), SourceNotAllowed, InvalidAdapter (`missing_file`), TooLarge, or
    Unavailable (the other side does not answer).
    """
    if source.startswith("file://"):
        return _fetch_files(source, target, allow, max_bytes)
    if _HF.fullmatch(source) and ".." not in source:
        check_allowed(source, allow)
        _fetch_hf(source, target, max_bytes)
        return []
    if _S3.fullmatch(source) and ".." not in source.split("/"):
        check_allowed(source.rstrip("/"), allow)
        return _fetch_s3(source.rstrip("/"), target, max_bytes)
    raise InvalidRequest(
        "'source' must be file:///PATH, hf://OWNER/REPO[@REVISION] or s3://BUCKET/PREFIX.", param="source"
    )


def check_allowed(source: str, allow: Sequence[str]) -> None:
    """Raises SourceNotAllowed unless an entry of the allow-list covers the source."""
    for entry in allow:
        if "*" in entry:
            if fnmatch.fnmatchcase(source, entry):
                return
        elif source == entry or source.startswith((entry.rstrip("/") + "/", entry.rstrip("/") + "@")):
            return
    listed = "The list has other places." if allow else "The list is empty, so nothing can be imported."
    raise SourceNotAllowed(
        f"'{quoted(source)}' is not on the server's list of allowed sources (the setting import_allow). {listed} The "
        "operator can add it there, or upload the files."
    )


def _missing(names: Sequence[str]) -> InvalidAdapter:
    return InvalidAdapter([Problem("missing_file", name, f"The source holds no {name}.") for name in names])


def _check_size(total: int, max_bytes: int) -> None:
    if total > max_bytes:
        raise TooLarge(f"The adapter is larger than the limit of {max_bytes} bytes (the setting max_adapter_size).")


def _resolved_entries(allow: Sequence[str]) -> list[str]:
    """The `file://` entries with links resolved in their plain part."""
    entries = []
    for entry in allow:
        if entry.startswith("file://"):
            head, star, tail = entry.removeprefix("file://").partition("*")
            folder, _, rest = head.rpartition("/") if star else (head, "", "")
            entries.append(f"file://{os.path.realpath(folder or '/')}" + (f"/{rest}{star}{tail}" if star else ""))
    return [entry.replace("file:////", "file:///") for entry in entries]


def _fetch_files(source: str, target: Path, allow: Sequence[str], max_bytes: int) -> list[str]:
    path = source.removeprefix("file://")
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest("'source' must be an absolute path: file:///PATH.", param="source")
    entries = _resolved_entries(allow)
    folder = Path(path).resolve()
    check_allowed(f"file://{folder}", entries)
    if not folder.is_dir():
        raise InvalidRequest("'source' is not a folder on the server.", param="source")
    found = {name: (folder / name).resolve() for name in BROUGHT_FILES if (folder / name).is_file()}
    if not found.keys() >= set(ADAPTER_FILES):
        raise _missing([name for name in ADAPTER_FILES if name not in found])
    for file in found.values():
        check_allowed(f"file://{file}", entries)
    copy_bounded(found, target, max_bytes)
    return names_in(folder)


def copy_bounded(files: dict[str, Path], target: Path, max_bytes: int) -> None:
    """Copy files under new names into `target`. Raises TooLarge or Unavailable."""
    try:
        _check_size(sum(file.stat().st_size for file in files.values()), max_bytes)
        for name, file in files.items():
            shutil.copyfile(file, target / name)
    except OSError as error:
        raise file_error(error, "The adapter's files cannot be copied") from error


def _fetch_hf(source: str, target: Path, max_bytes: int) -> None:
    match = _HF.fullmatch(source)
    assert match is not None
    repo, revision = match[1], match[2]
    scratch = target / ".hf"
    try:
        sizes = {name: _hf_size(repo, name, revision) for name in ADAPTER_FILES}
        for name in OPTIONAL_FILES:
            with suppress(EntryNotFoundError):
                sizes[name] = _hf_size(repo, name, revision)
        _check_size(sum(sizes.values()), max_bytes)
        for name in sizes:
            HfApi().hf_hub_download(repo, name, revision=revision, local_dir=scratch)
            (scratch / name).rename(target / name)
    except EntryNotFoundError as error:
        raise InvalidAdapter([Problem("missing_file", source, f"The repository lacks a file: {error}")]) from error
    except HFValidationError as error:
        raise InvalidRequest(f"'source' is not a repository: {quoted(str(error))}", param="source") from error
    except HfHubHTTPError as error:
        raise InvalidRequest(f"'source' cannot be fetched: {quoted(str(error))}", param="source") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
        if is_local(error):
            raise
        raise Unavailable(f"The Hugging Face hub does not answer: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _hf_size(repo: str, name: str, revision: str | None) -> int:
    """In bytes, 0 where the hub does not say. Raises EntryNotFoundError, and what else the hub's client does."""
    return get_hf_file_metadata(hf_hub_url(repo, name, revision=revision)).size or 0


def _fetch_s3(source: str, target: Path, max_bytes: int) -> list[str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(source, use_listings_cache=False)
        missing = [name for name in ADAPTER_FILES if not filesystem.exists(f"{root}/{name}")]
        if missing:
            raise _missing(missing)
        names = [*ADAPTER_FILES, *(name for name in OPTIONAL_FILES if filesystem.exists(f"{root}/{name}"))]
        _check_size(sum(int(filesystem.size(f"{root}/{name}")) for name in names), max_bytes)
        for name in names:
            filesystem.get_file(f"{root}/{name}", os.fspath(target / name))
        entries = filesystem.ls(root, detail=True)
        return [entry["name"].rpartition("/")[2] + "/" * (entry["type"] == "directory") for entry in entries]
    except ImportError as error:
        message = "This server cannot read s3://. Its operator installs what is missing with: pip install s3fs"
        raise InvalidRequest(message, param="source") from error
    except OSError as error:
        if is_local(error):
            raise
        raise Unavailable(f"'source' cannot be fetched: {cause_of(error)}") from error
