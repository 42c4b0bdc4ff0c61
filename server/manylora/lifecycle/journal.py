"""Finished parts of a long command on disk, so that an interrupted one goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest
from manylora.lifecycle.output import write_json
from manylora.lifecycle.parameters import InvalidParameter


class Journal:
    """Results by key. `path` None keeps them in memory only.

    Raises InvalidRequest when one is there and neither `resume` nor `overwrite` says what to do with it, when
    there is none to resume, or when it belongs to another `fingerprint`.
    """

    def __init__(self, path: Path | None, fingerprint: str, *, resume: bool, overwrite: bool, what: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self.results: dict[str, Any] = {}
        if path is None:
            return
        if path.exists() and not resume and not overwrite:
            raise InvalidParameter(
                f"An interrupted {what} for this `out` exists: give `resume`, or `overwrite` to drop it."
            )
        if resume:
            self.results = self._read(path, what)

    def add(self, key: str, result: Any) -> None:
        """Keep a part's result, on disk before this returns. Raises ManyloraError when it cannot be written."""
        self.results[key] = result
        if self._path is not None:
            write_json(self._path, {"fingerprint": self._fingerprint, "results": self.results})

    def discard(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path, what: str) -> dict[str, Any]:
        if not path.exists():
            raise InvalidParameter("There is nothing to resume for this `out`. Run without `resume`.")
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fingerprint, results = state["fingerprint"], dict(state["results"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidParameter(f"{path} cannot be read: {error}. Start again with `overwrite`.") from error
        if fingerprint != self._fingerprint:
            raise InvalidRequest(f"The interrupted {what} used other data or settings. Resume it with those.")
        return results
