"""What the inference routes need of the catalog: names become identities, a list of names."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from manylora.identity import AdapterRef, Mix

__all__ = ["AdapterDirectory", "Canary", "Following", "PublishedAdapter"]

_RANGE: Final = 2.0**64


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers a share of the requests for the bare name; `until` is in Unix microseconds."""

    id: str
    version: int
    share: float
    until: int | None

    def takes(self, who: str) -> bool:
        """Whether the version answers whoever is called so: always the same, on every server.

        Who is taken at one share is taken at any larger one of the same canary; of another, others are.
        """
        drawn = int.from_bytes(sha256(f"{self.id}\0{who}".encode("utf-8", "surrogatepass")).digest()[:8])
        return drawn / _RANGE < self.share


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """The active version of one adapter, as `GET /v1/models` shows it. `created` is in Unix seconds."""

    ref: AdapterRef
    created: int


class AdapterDirectory(Protocol):
    """Looks adapters up for a tenant: the tenant's own first, those of `public` next, nobody else's ever."""

    def resolve(self, tenant: str, name: str, version: int | None = None) -> AdapterRef:
        """The active version, or version `version`.

        Answered from memory, so every request may ask. Raises one AdapterNotFound for adapters that are missing, not
        ready or another tenant's.
        """
        ...

    def defaults_of(self, ref: AdapterRef) -> str:
        """What the version says of the requests that name it, a JSON object as text; empty where it says nothing.

        Answered from memory, as `resolve` is.
        """
        ...

    def rank_of(self, ref: AdapterRef) -> int:
        """The version's highest rank; 0 for one that was removed meanwhile."""
        ...

    def mix_of(self, ref: AdapterRef) -> Mix:
        """What runs for a version: itself, or the versions that a saved mix has.

        Answered from memory, as `resolve` is.
        """
        ...

    def drawn(self, ref: AdapterRef, who: str) -> tuple[AdapterRef, str]:
        """The version that answers whoever is called `who` a request for the bare name of `ref`, the active one.

        And the id of the canary that decided so; empty, and `ref` itself, where none runs. Answered from memory.
        """
        ...

    def visible_to(self, tenant: str, start: str = "") -> Iterator[PublishedAdapter]:
        """The active versions that the tenant may name, in order of name, from `start` on."""
        ...


class Following(Protocol):
    """How this server keeps up with others on the same database. Used on the event loop."""

    @property
    def revision(self) -> int:
        """The number of the last change to the catalog that is known here."""
        ...

    async def look_again(self) -> bool:
        """Take over what was committed anywhere before this call; False where the database did not answer in time."""
        ...

    async def reach(self, revision: int) -> None:
        """Return once this server knows of the revision. Raises Unavailable where it cannot find out in time."""
        ...
