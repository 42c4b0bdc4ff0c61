"""Streams that keep the arrival time of every token, to see what happens between two of them."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from manylora_loadtest.words import random_text

__all__ = ["Streams", "Upload", "complete", "run_streams"]

_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Upload:
    """One upload while the streams run, and the first completion of what was uploaded. Seconds."""

    folder: Path
    name: str
    after_s: float
    upload_s: float = 0.0
    first_completion_s: float = 0.0


@dataclass
class Streams:
    """Arrival times of each stream's tokens, seconds from the start."""

    times: list[list[float]] = field(default_factory=list)

    def tpot_ms(self) -> list[float]:
        """Time per output token after the first, of each stream."""
        return [(t[-1] - t[0]) / (len(t) - 1) * 1e3 for t in self.times]

    def gaps_ms(self) -> list[list[float]]:
        """Times between neighbouring tokens, of each stream."""
        return [[float(gap) * 1e3 for gap in np.diff(t)] for t in self.times]

    def figures(self) -> dict[str, float]:
        gaps = self.gaps_ms()
        pooled = [gap for stream in gaps for gap in stream]
        return {
            "tpot_p99_ms": _quantile(self.tpot_ms(), 0.99),
            "gap_p50_ms": _quantile(pooled, 0.5),
            "gap_p99_ms": _quantile(pooled, 0.99),
            "gap_max_ms": round(max(pooled), 2),
            "worst_streams_gap_p99_ms": max(_quantile(stream, 0.99) for stream in gaps),
        }


def _quantile(values: list[float], q: float) -> float:
    return round(float(np.quantile(values, q)), 2)


async def run_streams(
    url: str, models: list[str], *, prompt_tokens: int, output_tokens: int, seed: int, upload: Upload | None = None
) -> Streams:
    """One stream for each of `models`, all at once; the upload goes on beside them."""
    rng = np.random.default_rng(seed)
    streams = Streams()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.perf_counter()
        prompts = [random_text(prompt_tokens, rng) for _ in models]
        work = [
            _stream(session, url, model, prompt, output_tokens, began)
            for model, prompt in zip(models, prompts, strict=True)
        ]
        uploading = asyncio.ensure_future(_upload(session, url, upload)) if upload is not None else None
        streams.times = list(await asyncio.gather(*work))
        if uploading is not None:
            await uploading
    return streams


async def _stream(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, output_tokens: int, began: float
) -> list[float]:
    body = {
        "model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "logprobs": 0,
    }  # fmt: skip
    times: list[float] = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices") or []
                # A token can be half a character and have no text yet; its log-probability always comes.
                num_tokens = sum(len((c.get("logprobs") or {}).get("tokens") or ()) for c in choices)
                times += [time.perf_counter() - began] * num_tokens
    assert len(times) == output_tokens, f"{len(times)} of {output_tokens} tokens came"
    return times


async def _upload(session: aiohttp.ClientSession, url: str, upload: Upload) -> None:
    await asyncio.sleep(upload.after_s)
    form = aiohttp.FormData()
    form.add_field("name", upload.name)
    for name in _FILES:
        form.add_field("files", (upload.folder / name).read_bytes(), filename=name)
    began = time.perf_counter()
    async with session.post(f"{url}/v1/adapters", data=form) as response:
        assert response.status in (200, 201), await response.text()
    upload.upload_s = round(time.perf_counter() - began, 3)
    await complete(session, url, upload.name)
    upload.first_completion_s = round(time.perf_counter() - began, 3)


async def complete(session: aiohttp.ClientSession, url: str, model: str) -> dict[str, Any]:
    """One short completion; its extension block."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        answer: dict[str, Any] = (await response.json())["manylora"]
        return answer
