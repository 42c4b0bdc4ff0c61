"""Saved mixes: versions without files, which say which versions of other adapters run and with what weights."""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from typing import Final

from pydantic import BaseModel, ConfigDict, TypeAdapter

from manylora.identity import Mix

__all__ = ["SavedPart", "digest_of", "parts_of", "text_of"]


class SavedPart(BaseModel):
    """One of a mix's adapters: the version, for good, and its weight."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    tenant: str
    name: str
    version: int
    digest: str
    weight: float


_PARTS: Final = TypeAdapter(tuple[SavedPart, ...])


def text_of(mix: Mix) -> str:
    """As the registry keeps it: the same for the same versions with the same weights."""
    parts = tuple(
        SavedPart(id=r.id, tenant=r.tenant, name=r.name, version=r.version, digest=r.digest, weight=weight)
        for r, weight in mix.parts
    )
    return _PARTS.dump_json(parts).decode()


@lru_cache(4096)
def parts_of(text: str) -> tuple[SavedPart, ...]:
    """Of a text that `text_of` made; none of an empty one."""
    return _PARTS.validate_json(text) if text else ()


def digest_of(parts: Iterable[SavedPart]) -> str:
    """Of contents and weights, whatever they are called."""
    return sha256(repr(sorted((part.digest, part.weight) for part in parts)).encode()).hexdigest()
