"""What is inside an adapter: the route behind the dashboard's view of norms and spectra.

The API knows nothing of tensors; who puts the server together hands in the function that looks.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from manylora.api.adapters import version_of
from manylora.api.auth import Caller
from manylora.api.ownership import not_found
from manylora.catalog.mixes import check_has_files
from manylora.catalog.records import VersionRecord
from manylora.catalog.service import Catalog
from manylora.errors import AdapterLoadFailed, InvalidRequest, cause_for_caller

__all__ = ["Inspect", "build_router"]

_KEPT: Final = 32  # reports, of some 60 KB each


class Inspect(Protocol):
    """Reads an adapter's folder and says what is in it, as JSON values. Blocks, and is called on worker threads."""

    def __call__(self, folder: Path) -> Mapping[str, Any]: ...


def build_router(catalog: Catalog, inspect: Inspect) -> APIRouter:
    """`GET /v1/adapters/{name}/versions/{n}/inspection`."""
    router = APIRouter(tags=["adapters"])
    reports = _Reports(catalog, inspect)

    @router.get("/v1/adapters/{name}/versions/{n}/inspection")
    async def inspect_version(
        name: str,
        n: str,
        caller: Caller,
        tenant: Annotated[str | None, Query(description="Another tenant's adapter: for admin keys.")] = None,
    ) -> Response:
        """Norms, spectra and effective ranks of a version's modules, and what is odd about them."""
        _, version = await version_of(catalog, caller, name, n, tenant)
        ref = version.ref
        head = {"object": "adapter.inspection", "name": ref.name, "version": ref.version, "digest": ref.digest}
        return JSONResponse({**head, **await reports.of(version)})

    return router


class _Reports:
    """The newest reports by version, made one at a time: a page that is opened often must not slow the model."""

    def __init__(self, catalog: Catalog, inspect: Inspect) -> None:
        self._catalog = catalog
        self._inspect = inspect
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = asyncio.Lock()

    async def of(self, version: VersionRecord) -> dict[str, Any]:
        check_has_files(version)
        key = version.ref.id  # not the digest: a quick answer would tell that another tenant has the same adapter
        async with self._lock:
            report = self._kept.get(key)
            if report is None:
                report = await asyncio.to_thread(self._look, version)
                self._kept[key] = report
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        return report

    def _look(self, version: VersionRecord) -> dict[str, Any]:
        try:
            found = self._inspect(self._catalog.local_folder(version.ref))
        except (OSError, InvalidRequest) as error:
            if self._catalog.directory.blob_of(version.ref.id) is None:  # deleted just now
                raise not_found(version.ref.label) from error
            cause = cause_for_caller(error)
            raise AdapterLoadFailed(f"The files of {version.ref.label} cannot be read: {cause}") from error
        return {key: value for key, value in found.items() if key != "adapter"}  # that is the store's folder
