"""Finding adapters by the hash of their files, wherever copies of them lie."""

from pathlib import Path

from manylora.catalog.files import blob_of_folder, folder_fault
from manylora.identity import ADAPTER_FILES, CONFIG_FILE

__all__ = ["Copies"]


class Copies:
    """Adapters' folders below a root, by the hash of their files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._by_hash: dict[str, Path] | None = None

    def find(self, blob: str) -> Path | None:
        """A folder whose two files have the blob's hash."""
        for likely in (self._root / blob[:2] / blob, self._root / "store" / blob[:2] / blob):
            if likely.is_dir() and folder_fault(likely, blob) is None:
                return likely
        if self._by_hash is None:
            folders = sorted(config.parent for config in self._root.rglob(CONFIG_FILE))
            whole = [f for f in folders if all((f / name).is_file() for name in ADAPTER_FILES)]
            self._by_hash = {blob_of_folder(folder): folder for folder in whole}
        return self._by_hash.get(blob)
