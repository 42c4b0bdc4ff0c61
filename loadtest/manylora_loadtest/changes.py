"""Uploads, promotions and deletions through the server's API while the load runs."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import aiohttp

from manylora_loadtest.client import Client
from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.results import ChangeResult
from manylora_loadtest.scenario import LiveChange
from manylora_loadtest.stream import authorization

__all__ = ["read_folders", "run_change"]

_TENSORS: Final = "adapter_model.safetensors"
_FILES: Final = ("adapter_config.json", _TENSORS)


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
    steps = _steps(change, folders)
    for turn in itertools.count() if change.times is None else range(change.times):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), max(0.0, start_s + turn * change.every_s - clock()))
        if stop.is_set():
            return
        step = steps[turn % len(steps)]
        result = ChangeResult(step.kind, change.adapter, clock(), wanted=step.wanted)
        try:
            await step.do(client, key, turn, result)
        except (aiohttp.ClientError, OSError, TimeoutError, KeyError, TypeError, ValueError, IndexError) as error:
            result.error = f"{error!r}"
        result.end_s = clock()
        results.append(result)


@dataclass(frozen=True, slots=True)
class _Step:
    """What is done at one turn, and the status that it must be answered with (0: any 2xx)."""

    kind: str
    do: Callable[[Client, str | None, int, ChangeResult], Awaitable[None]]
    wanted: int = 0


def _steps(change: LiveChange, folders: Sequence[Mapping[str, bytes]]) -> list[_Step]:
    """One for each turn, over and over again."""
    uploads = [_Step("upload", partial(_upload, change, files)) for files in folders]
    if change.kind == "upload":
        return uploads
    if change.kind == "promote":
        return [_Step("promote", partial(_promote, change, None))]
    damaged = {**folders[0], _TENSORS: folders[0][_TENSORS][:-1]}
    return [
        *uploads,
        _Step("use", partial(_use, change)),
        _Step("promote", partial(_promote, change, 0)),
        _Step("use", partial(_use, change)),
        _Step("damaged upload", partial(_upload, change, damaged), wanted=422),
        _Step("delete", partial(_delete, change)),
    ]


def read_folders(change: LiveChange) -> list[dict[str, bytes]]:
    """The files of each of the change's folders. Raises ScenarioError."""
    try:
        return [{name: (folder / name).read_bytes() for name in _FILES} for folder in change.folders]
    except OSError as error:
        raise ScenarioError(f"an upload's folder needs {' and '.join(_FILES)}: {error}") from error


async def _upload(
    change: LiveChange,
    files: Mapping[str, bytes],
    client: Client,
    key: str | None,
    _turn: int,
    result: ChangeResult,
) -> None:
    form = aiohttp.FormData()
    form.add_field("name", change.adapter)
    form.add_field("activate", "true" if change.activate else "false")
    for name, content in files.items():
        form.add_field("files", content, filename=name, content_type="application/octet-stream")
    url = client.url + "/v1/adapters"
    async with client.session.post(url, data=form, headers=authorization(key)) as response:
        await _take(response, result)


async def _promote(
    change: LiveChange, wanted: int | None, client: Client, key: str | None, turn: int, result: ChangeResult
) -> None:
    """Make a version active: number `wanted` of those that there are, or each in its turn."""
    url = f"{client.url}/v1/adapters/{change.adapter}"
    headers = authorization(key)
    async with client.session.get(url, headers=headers) as response:
        body = await _take(response, result)
    if not result.is_ok:
        return
    versions = sorted(version["version"] for version in body["versions"])
    version = versions[turn % len(versions) if wanted is None else wanted]
    async with client.session.patch(url, json={"active_version": version}, headers=headers) as response:
        await _take(response, result)
    result.version = version


async def _use(change: LiveChange, client: Client, key: str | None, _turn: int, result: ChangeResult) -> None:
    body = {"model": change.adapter, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    url = client.url + "/v1/completions"
    async with client.session.post(url, json=body, headers=authorization(key)) as response:
        answer = await _take(response, result)
    if result.is_ok:
        result.version = ((answer.get("manylora") or {}).get("adapter") or {}).get("version")


async def _delete(change: LiveChange, client: Client, key: str | None, _turn: int, result: ChangeResult) -> None:
    url = f"{client.url}/v1/adapters/{change.adapter}"
    async with client.session.delete(url, headers=authorization(key)) as response:
        await _take(response, result)


async def _take(response: aiohttp.ClientResponse, result: ChangeResult) -> Any:
    """The JSON of an answer, whose status and error go to `result`."""
    result.status = response.status
    text = await response.text()
    if not result.is_ok:
        result.error = text[:300] or f"HTTP {response.status}"
    if not 200 <= response.status < 300 or not text:
        return None
    body = json.loads(text)
    result.version = body.get("version")
    return body
