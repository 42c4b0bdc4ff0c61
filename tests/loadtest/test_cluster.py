"""The simulated cluster: what each policy is good and bad at, in a small one with seeds."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from manylora_loadtest.cluster.__main__ import SETTINGS, app
from manylora_loadtest.cluster.policies import POLICIES, View
from manylora_loadtest.cluster.replicas import DEVICE, HOST, STORE, Replica, Shape
from manylora_loadtest.cluster.simulation import Loss, Outcome, simulate
from manylora_loadtest.cluster.workload import Crowd, Workload, drawn, read_llm_trace
from manylora_loadtest.errors import ScenarioError

SHAPE = Shape(num_replicas=20)
RUN_S = 2.0
CALM, BUSY, STEEP = SETTINGS


def work(setting: tuple[float, float], num_requests: int = 6000) -> Workload:
    load, zipf = setting
    rate = load * SHAPE.num_replicas * SHAPE.seats / RUN_S
    return drawn(num_requests, 20_000, rate, zipf, RUN_S, crowd=Crowd(), seed=1)


@cache
def outcome(policy: str, setting: tuple[float, float]) -> Outcome:
    return simulate(work(setting), POLICIES[policy], SHAPE)


def test_candidates_and_score_find_adapters_warm_and_keep_waits_short() -> None:
    for setting in SETTINGS:
        best, blind = outcome("candidates and score", setting), outcome("least loaded", setting)
        assert best.share(DEVICE) >= 1.5 * blind.share(DEVICE)
        assert best.share(STORE) <= 0.75 * blind.share(STORE)
        assert best.p99_s() <= min(outcome(name, setting).p99_s() for name in ("least loaded", "random", "hashing"))
    assert outcome("candidates and score", CALM).p99_s() == pytest.approx(SHAPE.store_load_s, abs=0.05)


def test_warm_first_is_as_good_while_there_are_free_seats_and_no_better_than_chance_when_there_are_none() -> None:
    assert outcome("warm first", CALM).share(DEVICE) >= 0.9 * outcome("candidates and score", CALM).share(DEVICE)
    for setting in (BUSY, STEEP):
        assert outcome("warm first", setting).share(DEVICE) <= 1.1 * outcome("least loaded", setting).share(DEVICE)


def test_hashing_alone_drowns_the_replica_of_a_hot_adapter() -> None:
    assert outcome("hashing", CALM).imbalance > 5
    assert outcome("hashing", CALM).p99_s() > 20 * outcome("bounded hashing", CALM).p99_s()


def test_more_choices_even_out_the_load() -> None:
    imbalances = [outcome(name, CALM).imbalance for name in ("least loaded", "two choices", "random")]
    assert imbalances == sorted(imbalances)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_whatever_replicas_die(policy: str) -> None:
    load = work(CALM, 3000)
    lost = simulate(load, POLICIES[policy], SHAPE, loss=Loss(num_replicas=4))
    assert (lost.extra_s >= -1e-9).all()
    assert lost.share(DEVICE) + lost.share(HOST) + lost.share(STORE) == pytest.approx(1)
    again = simulate(load, POLICIES[policy], SHAPE, loss=Loss(num_replicas=4))
    np.testing.assert_array_equal(lost.extra_s, again.extra_s)


def test_a_lost_replica_moves_its_own_adapters_and_no_others() -> None:
    view = View(SHAPE, np.random.default_rng(0), RUN_S)
    before = [int(view.first(adapter, 1)[0]) for adapter in range(500)]
    view.loads[7] = math.inf
    after = [int(view.first(adapter, 1)[0]) for adapter in range(500)]
    moved = [old for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {7}
    assert len(set(before)) == SHAPE.num_replicas


def test_more_traffic_asks_for_more_replicas() -> None:
    view = View(SHAPE, np.random.default_rng(0), RUN_S)
    for number in range(1000):
        view.now = number / 40
        view.note(1)
    view.note(2)
    assert view.wanted_replicas(2) == 4
    assert 8 <= view.wanted_replicas(1) <= 11  # 40 requests a second of 2 s are 80 seats
    view.now += 100
    assert view.wanted_replicas(1) == 4


def test_a_replica_keeps_what_was_used_last() -> None:
    replica = Replica(Shape(device_slots=2, host_places=3))
    assert [replica.take(adapter)[0] for adapter in (1, 2, 1, 3)] == [STORE, STORE, DEVICE, STORE]
    assert replica.take(2) == (HOST, [(2, DEVICE), (1, HOST)])
    assert replica.take(4) == (STORE, [(4, DEVICE), (1, STORE), (3, HOST)])


def test_a_public_trace_gives_times_and_lengths(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.9799600,4808,10\n"
        "2023-11-16 18:17:03.9799600,100,200\n",
        encoding="utf-8",
    )
    load = read_llm_trace(trace, 50, 1.0, speed=2.0)
    assert load.at.tolist() == pytest.approx([0.0, 0.5])
    assert load.run_s.tolist() == pytest.approx([4.02, 1.1616])
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", encoding="utf-8")
    with pytest.raises(ScenarioError, match="line 2"):
        read_llm_trace(trace, 50, 1.0)


def test_the_command_prints_a_table_and_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "policies.png"
    arguments = ["--requests", "400", "--adapters", "500", "--replicas", "5", "--lose", "1", "--picture", str(picture)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| ") and "policy" not in line]
    assert len([row for row in rows if "---" not in row]) == len(POLICIES) * len(SETTINGS)
    assert picture.read_bytes().startswith(b"\x89PNG")
