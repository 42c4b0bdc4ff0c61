"""Trace files: JSON lines, one request each, in any order.

    {"t": 0.41, "adapter": "support-de", "prompt_tokens": 180, "output_tokens": 60}

`t`: seconds from the trace's start. `adapter`: null or left out means the base. Optional: `tenant` (drawn by weight
if left out) and `chat` (false).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.results import RequestResult

__all__ = ["TraceEntry", "read_trace", "trace_lines"]


class TraceEntry(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    t: float = Field(ge=0, allow_inf_nan=False)
    adapter: str | None = None
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    tenant: str | None = None
    chat: bool = False


def read_trace(path: Path, speed: float = 1.0) -> list[TraceEntry]:
    """The entries in order of arrival, times divided by `speed`. Raises ScenarioError naming the line."""
    entries = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ScenarioError(f"the trace cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(TraceEntry.model_validate_json(line))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ScenarioError(f"{path}, line {number}: {problems}") from error
    if not entries:
        raise ScenarioError(f"{path} has no requests")
    entries.sort(key=lambda entry: entry.t)
    return [entry.model_copy(update={"t": entry.t / speed}) for entry in entries]


def trace_lines(results: Iterable[RequestResult]) -> Iterator[bytes]:
    """A run's requests as a trace: the lengths are the server's counts where it answered."""
    for result in sorted(results, key=lambda r: r.due_s):
        yield orjson.dumps(
            {
                "t": round(result.due_s, 6),
                "adapter": result.adapter,
                "prompt_tokens": result.prompt_tokens or result.asked_prompt_tokens,
                "output_tokens": result.output_tokens or result.asked_output_tokens,
                "tenant": result.tenant,
                "chat": result.is_chat,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
