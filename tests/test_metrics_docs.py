"""docs/metrics.md and docs/api.md say what the code does."""

import re
from pathlib import Path

from manylora.api.schemas import ChatRequest, CompletionRequest
from manylora.engine.interface import EngineStats
from manylora.errors import ManyloraError
from manylora.metrics import BUCKETS, Metrics

DOCS = Path(__file__).parent.parent / "docs"


def test_every_metric_is_documented_and_nothing_else() -> None:
    metrics = Metrics()
    metrics.watch_engine(EngineStats, lambda: True)
    exported = {f"{m.name}_total" if m.type == "counter" else m.name for m in metrics.registry.collect()}
    text = (DOCS / "metrics.md").read_text()
    tables = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"(?:manylora|process)_\w+", tables)) == exported
    assert ", ".join(f"{bucket:g}" for bucket in BUCKETS) in text


def test_every_field_of_the_bodies_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    for name in {*CompletionRequest.model_fields, *ChatRequest.model_fields}:
        assert f"`{name}" in text, name


def descendants(kind: type[ManyloraError]) -> set[type[ManyloraError]]:
    found: set[type[ManyloraError]] = set()
    for child in kind.__subclasses__():
        found |= {child} | descendants(child)
    return found


def test_every_error_that_a_caller_can_meet_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    for error in descendants(ManyloraError) | {ManyloraError}:
        if error.__module__ == "manylora.errors" and not any(b.__name__ == "StartupError" for b in error.__mro__):
            row = next(line for line in text.splitlines() if line.startswith("|") and f"`{error.code}`" in line)
            assert f"| {error.status} | `{error.type}`" in row, error
