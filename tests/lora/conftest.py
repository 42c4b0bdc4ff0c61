"""Tiers of the test's own."""

from collections.abc import Iterator

import pytest

from tests.lora.tier_setup import Setup


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.tiers.check_integrity()
    made.tiers.close()
