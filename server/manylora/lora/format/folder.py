"""What is read of an adapter's folder: two files. What lies beside them is left aside, and said to be.

The one rule for folders, archives, forms and imports: whoever brings an adapter hands over the names of what it did not
bring, and the reader says so. Nothing but the two files is ever opened, so a pickle is as harmless as a picture.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from manylora.errors import TooLarge
from manylora.identity import ADAPTER_FILES, CONFIG_FILE, DEFAULTS_FILE, TENSOR_FILE, TOKENIZER_FILES
from manylora.lora.format.problems import Problems, listed, shown

_READ = frozenset({*ADAPTER_FILES, DEFAULTS_FILE, *TOKENIZER_FILES})
NEEDED = frozenset({CONFIG_FILE, TENSOR_FILE})
# Not worth a word: what people and tools put beside an adapter to describe it.
DESCRIPTIVE = (
    "*.md", "*.txt", "*.rst", "*.png", "*.svg", "*.jpg", "license*", "licence*", "notice*", "copying*",
    "report.json", "*_report.json", ".gitattributes", ".gitignore", ".ds_store",
)  # fmt: skip
# A tokenizer of its own is worth a word: it is not used.
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece)[\w.]*", re.IGNORECASE
)
_TOKENIZER_TEXT = frozenset({"merges.txt", "vocab.txt"})
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".gguf")


def left_aside(names: Iterable[str]) -> list[str]:
    """Of names relative to the adapter's folder, those worth a word: sorted, and of a subfolder its own alone."""
    found = set()
    for name in names:
        first, slash, _ = name.partition("/")
        if slash:
            found.add(f"{first}/")
        elif name not in _READ and not _is_descriptive(name.lower()):
            found.add(name)
    return sorted(found)


def _is_descriptive(name: str) -> bool:
    return name not in _TOKENIZER_TEXT and any(fnmatchcase(name, pattern) for pattern in DESCRIPTIVE)


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, subfolders with a slash; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return [f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir()]


def warning_of(names: Iterable[str]) -> str | None:
    """One sentence about what was left aside; None where nothing was."""
    aside = list(names)
    if not aside:
        return None
    base = " The base's own tokenizer is used." if any(_TOKENIZER.fullmatch(name) for name in aside) else ""
    return f"Left aside, since an adapter is {CONFIG_FILE} and {TENSOR_FILE} alone: {listed(aside)}.{base}"


def check_listing(folder: Path, aside: Iterable[str], problems: Problems) -> None:
    """`missing_file`, and `not_safetensors` where there are weights in another format instead."""
    if not (folder / CONFIG_FILE).is_file():
        problems.add("missing_file", CONFIG_FILE, "The folder has no such file. Save the adapter with save_pretrained.")
    if (folder / TENSOR_FILE).is_file():
        return
    other = [
        name for name in aside if name.lower().startswith("adapter_model") and name.lower().endswith(_OTHER_WEIGHTS)
    ]
    for name in other:
        problems.add(
            "not_safetensors",
            shown(name),
            "Only safetensors are read, since pickles run code. Convert it with PEFT's "
            "save_pretrained(safe_serialization=True).",
        )
    if not other:
        problems.add("missing_file", TENSOR_FILE, "The folder has no such file. Save the adapter with save_pretrained.")


def size_of(folder: Path) -> int:
    """Bytes of the two files that are read; one that is missing counts nothing."""
    paths = (folder / CONFIG_FILE, folder / TENSOR_FILE)
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_size(folder: Path, max_size: int) -> int:
    """The size in bytes. Raises TooLarge."""
    size = size_of(folder)
    if size > max_size:
        raise TooLarge(f"The adapter has {size} bytes; at most {max_size} are taken. Lower its rank or its dtype.")
    return size
