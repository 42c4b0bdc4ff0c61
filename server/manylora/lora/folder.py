"""What may lie in an adapter's folder."""

from fnmatch import fnmatchcase
from pathlib import Path

from manylora.errors import TooLarge
from manylora.lora.problems import CONFIG_FILE, TENSOR_FILE, Problems, shown

# Never read, so they may stay: what people and tools put beside an adapter to describe it.
DESCRIPTIVE = (
    "*.md", "*.txt", "*.rst", "*.png", "*.svg", "*.jpg", "license*", "licence*", "notice*", "copying*",
    "report.json", "*_report.json", ".gitattributes", ".gitignore", ".ds_store",
)  # fmt: skip
# A tokenizer of its own would have to be honoured, and is not.
_TOKENIZER_TEXT = frozenset({"merges.txt", "vocab.txt"})
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".gguf")


def _is_descriptive(name: str) -> bool:
    return name not in _TOKENIZER_TEXT and any(fnmatchcase(name, pattern) for pattern in DESCRIPTIVE)


def check_listing(folder: Path, problems: Problems) -> None:
    """`missing_file`, `unexpected_file`, and `not_safetensors` for weights in another format."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    weights_elsewhere = False
    for entry in entries:
        name = entry.name.lower()
        if entry.name in (CONFIG_FILE, TENSOR_FILE):
            continue
        if name.endswith(_PICKLES):
            weights_elsewhere = True
            problems.add(
                "not_safetensors",
                shown(entry.name),
                "Only safetensors are read, since pickles run code. Remove it, or convert it with PEFT's "
                "save_pretrained(safe_serialization=True).",
            )
        elif not (_is_descriptive(name) and entry.is_file()):
            problems.add(
                "unexpected_file",
                shown(entry.name),
                f"An adapter is {CONFIG_FILE} and {TENSOR_FILE}, with texts that describe it. Remove this.",
            )
    for wanted in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / wanted).is_file() and not (wanted == TENSOR_FILE and weights_elsewhere):
            problems.add("missing_file", wanted, "The folder has no such file. Save the adapter with save_pretrained.")


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
