"""Uploads and promotions through the server's API while the load runs."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp

from loadtest.client import Client
from loadtest.errors import ScenarioError
from loadtest.results import ChangeResult
from loadtest.scenario import LiveChange
from loadtest.stream import authorization

__all__ = ["read_folders", "run_change"]

_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")


async def run_change(
    change: LiveChange,
    folders: Sequence[Mapping[str, bytes]],
    client: Client,
    key: str | None,
    clock: Callable[[], float],
    results: list[ChangeResult],
    stop: asyncio.Event,
) -> None:
    """Does `change` on its schedule until it is done or `stop` is set; what has begun then is still finished.

    `folders`: from `read_folders`. A failure is a result, never an exception.
    """
    start_s = clock() + change.start_s
    for turn in itertools.count() if change.times is None else range(change.times):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), max(0.0, start_s + turn * change.every_s - clock()))
        if stop.is_set():
            return
        result = ChangeResult(change.kind, change.adapter, clock())
        try:
            if change.kind == "upload":
                await _upload(change, client, key, folders[turn % len(folders)], result)
            else:
                await _promote(change, client, key, turn, result)
        except (aiohttp.ClientError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
            result.error = f"{error!r}"
        result.end_s = clock()
        results.append(result)


def read_folders(change: LiveChange) -> list[dict[str, bytes]]:
    """The files of each of the change's folders. Raises ScenarioError."""
    try:
        return [{name: (folder / name).read_bytes() for name in _FILES} for folder in change.folders]
    except OSError as error:
        raise ScenarioError(f"an upload's folder needs {' and '.join(_FILES)}: {error}") from error


async def _upload(
    change: LiveChange, client: Client, key: str | None, files: Mapping[str, bytes], result: ChangeResult
) -> None:
    form = aiohttp.FormData()
    form.add_field("name", change.adapter)
    form.add_field("activate", "true" if change.activate else "false")
    for name, content in files.items():
        form.add_field("files", content, filename=name, content_type="application/octet-stream")
    url = client.url + "/v1/adapters"
    async with client.session.post(url, data=form, headers=authorization(key)) as response:
        await _take(response, result)


async def _promote(change: LiveChange, client: Client, key: str | None, turn: int, result: ChangeResult) -> None:
    url = f"{client.url}/v1/adapters/{change.adapter}"
    headers = authorization(key)
    async with client.session.get(url, headers=headers) as response:
        body = await _take(response, result)
    if not result.is_ok:
        return
    versions = sorted(version["version"] for version in body["versions"])
    wanted = versions[turn % len(versions)]
    async with client.session.patch(url, json={"active_version": wanted}, headers=headers) as response:
        await _take(response, result)
    result.version = wanted


async def _take(response: aiohttp.ClientResponse, result: ChangeResult) -> Any:
    """The answer's JSON; its status and error go to `result`."""
    result.status = response.status
    if not 200 <= response.status < 300:
        result.error = (await response.text())[:300]
        return None
    body = await response.json(content_type=None)
    result.version = body.get("version")
    return body
