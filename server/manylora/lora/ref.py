"""Who an adapter is: the one identity that slots, cache hashes, metrics and the catalog share."""

from dataclasses import dataclass
from typing import Final, Literal

PUBLIC_TENANT: Final = "public"  # whose adapters everybody may use
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of one adapter.

    `id` is unique for ever: a name uploaded again makes a new version with a new id, so nothing that is
    keyed by the id (slots, prefix-cache hashes, counts) can answer for another version.
    """

    id: str
    tenant: str
    name: str
    version: int
    digest: str

    @property
    def label(self) -> str:
        """`name@version`, as people write it."""
        return f"{self.name}@{self.version}"
