"""The states of an adapter on its way to the device: drawn as they are, and no step that is not drawn."""

import re

import pytest

from manylora.lora.memory.device import NEXT, Entry, State
from tests.lora.tier_setup import Setup, numbered, ref


def test_every_step_is_described_and_every_described_step_may_be_taken() -> None:
    described = re.findall(r"^    ([A-Z]+) → ([A-Z]+): \w", State.__doc__ or "", re.MULTILINE)
    assert sorted(described) == sorted((old.name, new.name) for old, news in NEXT.items() for new in news)


def test_every_state_is_drawn_and_can_be_left() -> None:
    drawing = (State.__doc__ or "").split("AWAY → WAITING")[0]
    assert all(state.name in drawing and NEXT[state] for state in State)


@pytest.mark.parametrize("old", State)
@pytest.mark.parametrize("new", State)
def test_a_step_that_is_not_drawn_is_our_own_mistake(old: State, new: State) -> None:
    entry = Entry(ref(0), old)
    if new in NEXT[old]:
        entry.to(new)
        assert entry.state is new
    else:
        with pytest.raises(AssertionError, match=f"adapter-0@1 goes from {old.name} to {new.name}"):
            entry.to(new)
        assert entry.state is old


def test_what_changes_a_tier_is_called_with_its_lock_held(setup: Setup) -> None:
    setup.use(0)
    entry = setup.tiers._entries["id-0"]
    packed = setup.disk.pack(numbered(0))
    for call in (
        lambda: setup.tiers._device.evict(entry),
        lambda: setup.tiers._device.refile(entry),
        lambda: setup.tiers._device.publish(entry, packed, is_claimed=False),
        lambda: setup.tiers._device.give_back(entry),
        lambda: setup.tiers._host.drop(entry.ref),
        lambda: setup.tiers._host.get(entry.ref),
        lambda: setup.tiers._load(entry, "tenant"),
    ):
        with pytest.raises(AssertionError):
            call()
    with setup.tiers._lock, pytest.raises(AssertionError):
        setup.tiers._device.fill(entry, packed)  # it takes its time, and everybody would wait
    setup.tiers.check_integrity()
