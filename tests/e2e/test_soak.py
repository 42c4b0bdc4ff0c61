"""Ten minutes of everything at once, and servers that are killed at work: `make soak`; CI runs it beside the rest."""

from pathlib import Path

import pytest

from benchmarks.soak import lines_of, soak
from tests.e2e import kills
from tests.e2e.kill_records import sums_of
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.soak]
MINUTE_S = 60.0
NUM_KILLS = 5
# A cache that is full soon; the context is for prompts of 250 words, of which this tokenizer makes many more tokens.
FLAGS = ("--kv-cache-memory", "4MiB", "--dtype", "float32", "--num-threads", "1")


def test_nothing_grows_in_ten_minutes_of_everything(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "tiny-llama", max_position_embeddings=2048)
    summary, status = soak(tmp_path / "soak", model, duration_s=10 * MINUTE_S, rate=2.0, flags=FLAGS)
    assert summary.is_passed, "\n".join(lines_of(summary))
    outcomes = summary.totals.outcomes
    assert set(outcomes) == {"ok", "left", "refused"}
    assert outcomes["ok"] > 500
    assert outcomes["refused"] > 50
    assert outcomes["left"] >= 3, "answers are quick here, and most were out before their clients left"
    assert summary.num_changes > 200
    assert status == 0


def test_what_a_killed_server_has_acknowledged_holds(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "tiny-llama")
    done = kills.run(tmp_path, model, NUM_KILLS, say=lambda _: None)
    sums = sums_of(done)
    assert sums["kills"] == NUM_KILLS
    assert min(sums["changes"], sums["answers"], sums["refusals"], sums["versions_checked"]) > 0
    assert sums["answers_under_way"] > 0, "no kill hit an answer; the test shows nothing"
