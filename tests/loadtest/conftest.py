"""A running fake server, and runs against it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeAlias

import pytest

from manylora_loadtest.runner import Run, run_scenario
from manylora_loadtest.scenario import Scenario
from tests.loadtest.fake_server import FakeServer, running

Serve: TypeAlias = Callable[[FakeServer], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(FakeServer(…))` is its URL; it runs until the test ends."""
    with ExitStack() as stack:
        yield lambda fake: stack.enter_context(running(fake))


def scenario(**fields: Any) -> Scenario:
    """A short scenario: 20 requests at 200/s of 5 words in and 4 tokens out, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {
        "name": "test",
        "arrival": {"process": "poisson", "rate": 200, "requests": 20},
        "requests": {"prompt_tokens": 5, "output_tokens": 4},
    }
    return Scenario.model_validate({**defaults, **fields})


def run(loaded: Scenario, url: str, **options: Any) -> Run:
    return asyncio.run(run_scenario(loaded, url, **options))
