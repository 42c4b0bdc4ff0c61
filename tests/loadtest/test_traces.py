from collections import Counter
from pathlib import Path

import orjson
import pytest

from manylora_loadtest.errors import ScenarioError
from manylora_loadtest.plan import make_plan
from manylora_loadtest.scenario import Scenario, TraceSource
from manylora_loadtest.trace import read_trace, trace_lines
from tests.loadtest.conftest import Serve, run, scenario
from tests.loadtest.fake_server import FakeServer

ENTRIES: list[dict[str, object]] = [
    {"t": 0.2, "adapter": "a001", "prompt_tokens": 7, "output_tokens": 2},
    {"t": 0.0, "adapter": None, "prompt_tokens": 3, "output_tokens": 5},
    {"t": 0.1, "adapter": "a001", "prompt_tokens": 4, "output_tokens": 1, "chat": True},
]


def _write(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_bytes(b"\n".join(orjson.dumps(entry) for entry in entries))
    return path


def _replaying(path: Path, **fields: object) -> Scenario:
    return Scenario.model_validate({"name": "trace", "base": "tiny", "trace": {"path": path, **fields}})


def test_replay_sends_what_the_trace_says(serve: Serve, tmp_path: Path) -> None:
    fake = FakeServer()
    finished = run(_replaying(_write(tmp_path / "t.jsonl", ENTRIES)), serve(fake))
    assert [body["model"] for body in fake.bodies] == ["tiny", "a001", "a001"]
    assert [(r.prompt_tokens, r.output_tokens) for r in sorted(finished.results, key=lambda r: r.due_s)] == [
        (3, 5), (4, 1), (7, 2),
    ]  # fmt: skip
    assert ["messages" in body for body in fake.bodies] == [False, True, False]


def test_replay_keeps_the_times_and_speed_divides_them(tmp_path: Path) -> None:
    loaded = _replaying(_write(tmp_path / "t.jsonl", ENTRIES), speed=2.0)
    plan = make_plan(loaded, "tiny", {"default": ()})
    assert [request.at_s for request in plan.stages[0].requests] == pytest.approx([0.0, 0.05, 0.1])


def test_run_becomes_a_trace_that_replays_the_same_load(serve: Serve, tmp_path: Path) -> None:
    first, second = FakeServer(), FakeServer()
    lengths = {"kind": "uniform", "low": 2, "high": 9}
    mix = {"prompt_tokens": lengths, "output_tokens": lengths}
    finished = run(scenario(adapters={"discover": True}, requests=mix), serve(first))
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(trace_lines(finished.results)))
    run(_replaying(path), serve(second))
    assert Counter(second.models) == Counter(first.models)
    assert (second.prompt_tokens, second.completion_tokens) == (first.prompt_tokens, first.completion_tokens)
    assert len(read_trace(path)) == 20


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "line 2"),
        (b'{"t": -1, "prompt_tokens": 1, "output_tokens": 1}', "line 2: t"),
        (b'{"t": 1, "prompt_tokens": 1}', "output_tokens"),
        (b'{"t": 1, "prompt_tokens": 1, "output_tokens": 1, "lora": "x"}', "lora"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"t": 0, "prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(ScenarioError, match=what):
        read_trace(path)


def test_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no requests"):
        read_trace(_write(tmp_path / "t.jsonl", []))


def test_tenant_the_scenario_lacks_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.jsonl", [{**ENTRIES[0], "tenant": "stranger"}])
    loaded = scenario(arrival=None, trace=TraceSource(path=path))
    with pytest.raises(ScenarioError, match="stranger"):
        make_plan(loaded, "tiny", {"default": ()})
