"""Objectives and thresholds: what a good request is, and when a run has passed.

A threshold's name says what is compared; `docs/loadtest.md` lists them. A figure that could not be measured
(no request succeeded, no counters to compare) fails its threshold.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

__all__ = ["LATENCIES", "SERVER_FIGURES", "STATISTICS", "Slo", "ThresholdResult", "Thresholds"]

LATENCIES: Final = ("ttft", "tpot", "e2e")
SERVER_FIGURES: Final = (
    "memory_growth_mb", "open_files_growth", "threads_growth", "kv_blocks_growth", "slots_growth", "kv_blocks_left",
    "slots_left",
)  # fmt: skip
STATISTICS: Final = ("mean", "p50", "p90", "p95", "p99", "max")
_LATENCY: Final = re.compile(rf"({'|'.join(LATENCIES)})_({'|'.join(STATISTICS)})_ms")
_AT_MOST: Final = frozenset(
    {
        "error_rate", "share_ratio", "tenant_ttft_ratio", "change_failures", "client_lag_p99_ms", "counter_mismatches",
        "usage_mismatches", *SERVER_FIGURES,
    }
)  # fmt: skip
_AT_LEAST: Final = frozenset(
    {
        "goodput_rps", "slo_attainment", "jain_index", "output_tokens_per_s", "requests_per_s", "rate_within_slo",
    }
)  # fmt: skip


class Slo(BaseModel):
    """The service level objective of one request: every limit given must hold. An error never meets it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2e_ms: float | None = Field(default=None, gt=0)
    attainment: float = Field(default=0.95, gt=0, le=1, description="share that must meet it for a rate to count")

    @property
    def limits_ms(self) -> dict[str, float]:
        """The limits given, by latency's name."""
        limits = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2e": self.e2e_ms}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class ThresholdResult:
    """One comparison; `actual` is None where there was nothing to measure."""

    name: str
    limit: float
    is_upper: bool
    actual: float | None
    is_passed: bool


class Thresholds(RootModel[dict[str, float]]):
    """Limits by name, checked against a run's figures."""

    model_config = ConfigDict(frozen=True)
    root: dict[str, float] = Field(default_factory=dict)

    @field_validator("root")
    @classmethod
    def _names_exist(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, limit in limits.items():
            if name not in _AT_MOST | _AT_LEAST and not _LATENCY.fullmatch(name):
                known = ", ".join(sorted(_AT_MOST | _AT_LEAST))
                raise ValueError(f"no threshold is called {name!r}: there are {known} and (ttft|tpot|e2e)_p95_ms etc.")
            if not math.isfinite(limit):
                raise ValueError(f"the threshold {name} must be a number")
        return limits

    def check(self, figures: Mapping[str, float | None]) -> list[ThresholdResult]:
        """Compares `figures`, which has a value (or None) for every name this class allows."""
        results = []
        for name, limit in self.root.items():
            is_upper = name not in _AT_LEAST
            actual = figures.get(name)
            is_passed = actual is not None and (actual <= limit if is_upper else actual >= limit)
            results.append(ThresholdResult(name, limit, is_upper, actual, is_passed))
        return results
