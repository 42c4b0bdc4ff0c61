"""What the tiers remember of an adapter, and whom they tell."""

from dataclasses import dataclass, field
from pathlib import Path

from manylora.errors import ManyloraError
from manylora.identity import AdapterRef, Tier
from manylora.lora.memory.slots import Place


@dataclass(slots=True)
class Entry:
    """One adapter that is on the device, on its way there, waited for, or pinned."""

    ref: AdapterRef
    folder: Path | None = None
    place: Place | None = None
    is_resident: bool = False
    is_loading: bool = False
    is_pinned: bool = False
    is_forgotten: bool = False
    is_claimed: bool = False  # brought in for a request that has yet to take it
    is_hurried: bool = False  # the next place is for it
    users: int = 0
    error: ManyloraError | None = None
    size_bytes: int = 0  # on the device; 0 until it was read once
    is_retry: bool = False  # the load under way follows one that found no place
    askers: set[str] = field(default_factory=set)  # tenants that wait for it
    refused_at: int = -1  # when it last found no place, by the tiers' count of such moments

    @property
    def is_idle(self) -> bool:
        """Its place could be taken."""
        return self.is_resident and not self.users and not self.is_pinned


class TierEvents:
    """What the tiers tell the metrics. The base class says nothing."""

    def on_load(self, ref: AdapterRef, tier: Tier, seconds: float) -> None:
        """It went up from `tier`: from disk to host memory, or from there to the device."""

    def on_failure(self, ref: AdapterRef) -> None:
        """It was asked for and could not be brought to the device."""

    def on_eviction(self, ref: AdapterRef, tier: Tier) -> None:
        """It left `tier` to make room."""

    def on_enter(self, ref: AdapterRef) -> None:
        """A device slot is its own from now on."""

    def on_leave(self, ref: AdapterRef) -> None:
        """Its device slot is free again."""
