"""Rows in several files: what `datasets` saved to disk, and what a data set's repository holds.

    DIR with state.json             Dataset.save_to_disk: Arrow files in the order that it says
    DIR with dataset_dict.json      DatasetDict.save_to_disk: DIR/train and others like the one above
    DIR/train-00000-of-00002.parquet, …, in DIR/data as well; or DIR/train.jsonl
    DIR/cat/1.png, DIR/dog/2.jpg, …             images, in a folder for each label

Of a folder with several splits one is named as DIR/train, whether or not there is a folder of that name. This module
imports no torch.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from manylora.errors import InvalidRequest
from manylora.lifecycle.extras import need

__all__ = ["KINDS", "arrow_rows", "images_of", "parts_of"]

KINDS: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_STATE: Final = "state.json"
_SPLITS: Final = "dataset_dict.json"
_INSIDE: Final = "data"
_SHOWN: Final = 10  # splits


def parts_of(path: Path) -> list[Path]:
    """The files that hold the rows, in order: the path itself where it is a file, or nothing that is there.

    Raises InvalidRequest for a folder without rows, with those of several splits, or with some of a split's files.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists() and path.parent.is_dir():
        files = _splits(path.parent).get(path.name)
        return _whole(path, files) if files else [path]
    return [path]


def images_of(path: Path) -> list[Path]:
    """The images of a folder that has one for each label and no rows of its own, in the order of their names."""
    if not path.is_dir() or any((path / name).is_file() for name in (_STATE, _SPLITS)) or _splits(path):
        return []
    return [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in _IMAGES and file.is_file()]


def _folder(path: Path) -> list[Path]:
    if (path / _STATE).is_file():
        return _saved(path)
    if (path / _SPLITS).is_file():
        raise _which(path, [part.parent.name for part in path.glob(f"*/{_STATE}")])
    splits = _splits(path)
    if len(splits) != 1:
        raise _which(path, list(splits))
    [(name, files)] = splits.items()
    return _whole(path / name, files)


def _whole(split: Path, files: list[Path]) -> list[Path]:
    """A split's files, in order. Raises InvalidRequest where some are not there, or have the same rows perhaps."""
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.stem))]
    found = [(int(shard[2]), int(shard[3])) for shard in shards]
    if len(files) == 1 and not found:
        return files
    if len(found) == len(files) and found == [(number, len(found)) for number in range(len(found))]:
        return files
    shown = ", ".join(file.name for file in files[:_SHOWN])
    raise InvalidRequest(
        f"{split} is not one whole set of files ({shown}): each of those that their names count must be there "
        "once, or there must be a single file. Fetch what is missing, or name one file."
    )


def _which(path: Path, splits: list[str]) -> InvalidRequest:
    if not splits:
        return InvalidRequest(
            f"{path} is a folder without rows: it needs what `datasets` saves to disk, {', '.join(KINDS)} files, or a "
            "folder of images for each label."
        )
    shown = ", ".join(sorted(splits)[:_SHOWN])
    return InvalidRequest(f"{path} holds several splits ({shown}): give one, as {path / min(splits)}.")


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split, of the folder itself or, where it has none, of `data` in it."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / _INSIDE):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.suffix.lower() in KINDS and file.is_file():
                shard = _SHARD.fullmatch(file.stem)
                found.setdefault(shard[1] if shard else file.stem, []).append(file)
        if found:
            break
    return found


def _saved(path: Path) -> list[Path]:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{path / _STATE} is not what `datasets` writes.") from error
    if not names or any(Path(name).name != name for name in names):
        raise InvalidRequest(f"{path / _STATE} names no Arrow files of its folder.")
    return [path / name for name in names]


def arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow stream, which is what `datasets` keeps, a batch at a time. Raises InvalidRequest."""
    need("pyarrow")
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                batch.validate(full=True)
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path.name} is not a readable Arrow file: {error!s:.200}") from error
