"""A server process with `--no-metrics`."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow


def test_a_server_without_metrics_says_so_and_answers(own_server: Callable[..., Any]) -> None:
    with own_server(metrics=False) as server:
        body = {"model": "small", "prompt": "The", "max_tokens": 4}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 404
        assert server.announcement["has_metrics"] is False
