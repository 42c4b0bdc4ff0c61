"""Keeps the engine's pins equal to the directory's: the active version of every pinned adapter."""

import logging

from manylora.catalog.directory import Directory, Entry
from manylora.engine.interface import AdapterRef, EngineClient
from manylora.errors import ManyloraError

_log = logging.getLogger(__name__)


class Pins:
    """Used on the event loop's thread only."""

    def __init__(self, engine: EngineClient, directory: Directory) -> None:
        self._engine = engine
        self._directory = directory
        self._held: dict[tuple[str, str], AdapterRef] = {}

    def sync(self, tenant: str, name: str) -> None:
        """Pin what this adapter's entry asks for now, then let go of what was pinned before.

        Raises what `EngineClient.pin` raises; the old pin is given up then too.
        """
        wanted = _wanted(self._directory.own(tenant, name))
        held = self._held.pop((tenant, name), None)
        try:
            if wanted is not None:
                if wanted != held:
                    self._engine.pin(wanted)
                self._held[tenant, name] = wanted
        finally:
            if held is not None and held != wanted:
                self._engine.unpin(held)

    def sync_all(self) -> None:
        """`sync` for everything, after the directory was replaced. What cannot be pinned is logged."""
        wanted = {(e.tenant, e.name) for e in self._directory.entries() if _wanted(e) is not None}
        for tenant, name in wanted | set(self._held):
            try:
                self.sync(tenant, name)
            except ManyloraError as error:
                _log.warning("%s/%s cannot be pinned: %s", tenant, name, error.message)


def _wanted(entry: Entry | None) -> AdapterRef | None:
    return entry.active.ref if entry is not None and entry.pinned and entry.active is not None else None
