"""The run as JSON lines, and back: `setup` first, `summary` last, stages, requests, changes and samples between."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from manylora_loadtest.discovery import Counters
from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.load_meter import ClientLoad
from manylora_loadtest.results import ChangeResult, RequestResult
from manylora_loadtest.runner import Run, StageSpan
from manylora_loadtest.scenario import Scenario
from manylora_loadtest.server_watch import ServerSample
from manylora_loadtest.summary import Summary

__all__ = ["read_run", "write_run"]


def write_run(path: Path, run: Run, summary: Summary) -> None:
    """Write the run as JSON lines, without API keys."""
    with path.open("wb") as file:
        file.writelines(_line(record) for record in _records(run, summary))


def read_run(path: Path) -> Run:
    """The run that `write_run` wrote. Raises ScenarioError."""
    try:
        records = [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_kind.setdefault(record.pop("record"), []).append(record)
        (setup,), (end,) = by_kind["setup"], by_kind["summary"]
        return Run(
            scenario=Scenario.model_validate(setup["scenario"]),
            url=setup["url"],
            machine=setup["machine"],
            base=setup["base"],
            started=datetime.fromisoformat(setup["started"]),
            results=[RequestResult(**_own_fields(r)) for r in by_kind.get("request", [])],
            changes=[ChangeResult(**r) for r in by_kind.get("change", [])],
            stages=[StageSpan(**r) for r in by_kind.get("stage", [])],
            client=ClientLoad(**end["client"]),
            counters=Counters(**end["counters"]) if end["counters"] else None,
            usage=Counters(**end["usage"]) if end.get("usage") else None,
            server=[ServerSample(**r) for r in by_kind.get("server", [])],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScenarioError(f"{path} is not the record of a run: {error}") from error


def _records(run: Run, summary: Summary) -> Iterator[dict[str, Any]]:
    scenario = run.scenario.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    yield {
        "record": "setup", "url": run.url, "base": run.base, "started": run.started.isoformat(),
        "machine": run.machine, "scenario": scenario,
    }  # fmt: skip
    for stage in run.stages:
        yield {"record": "stage", **asdict(stage)}
    for result in run.results:
        derived = {"ttft_s": result.ttft_s, "tpot_s": result.tpot_s, "e2e_s": result.e2e_s}
        yield {"record": "request", **asdict(result), **derived}
    for change in run.changes:
        yield {"record": "change", **asdict(change)}
    for sample in run.server:
        yield {"record": "server", **asdict(sample)}
    yield {"record": "summary", "is_passed": summary.is_passed, **asdict(summary)}


def _own_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: record[field.name] for field in fields(RequestResult)}


def _line(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
