"""What the inference routes need of the catalog: names become identities, a list of names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from manylora.identity import AdapterRef

__all__ = ["AdapterDirectory", "PublishedAdapter"]


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

    def visible_to(self, tenant: str, start: str = "") -> Iterator[PublishedAdapter]:
        """The active versions that the tenant may name, in order of name, from `start` on."""
        ...
