"""A load test against a real server: three ways of counting, one result."""

import asyncio

import pytest

from manylora_loadtest.runner import run_scenario
from manylora_loadtest.scenario import Scenario
from manylora_loadtest.summary import summarise

from .conftest import Server

pytestmark = pytest.mark.slow


def test_sums_counters_and_usage_of_a_run_are_equal(server: Server) -> None:
    scenario = Scenario.model_validate(
        {
            "name": "totals",
            "warmup_requests": 4,
            "arrival": {"process": "closed", "concurrency": 8, "requests": 60},
            "adapters": {"discover": True, "base_share": 0.2, "popularity": {"kind": "zipf", "s": 1.0}},
            "requests": {
                "prompt_tokens": {"kind": "uniform", "low": 4, "high": 40},
                "output_tokens": {"kind": "uniform", "low": 1, "high": 24},
            },
            "thresholds": {"error_rate": 0, "counter_mismatches": 0, "usage_mismatches": 0},
        }
    )
    summary = summarise(asyncio.run(run_scenario(scenario, server.url)))
    assert summary.totals.ok == 64
    assert (summary.counters, summary.counter_mismatches) == (summary.usage, 0)
    assert summary.is_passed
