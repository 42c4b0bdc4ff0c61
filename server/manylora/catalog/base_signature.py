"""Which base model a version was made for, told by a hash of names and shapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from manylora.lora.format.reader import ModuleSpec

__all__ = ["BaseSignature", "signature_of"]

_TOLD_BY = ("linear", "conv1d", "embedding")


@dataclass(frozen=True, slots=True)
class BaseSignature:
    """A base as versions are registered for it (`value`), and as other versions of this server called the same one."""

    value: str
    former: tuple[str, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        return (self.value, *self.former)

    def fits(self, base: str) -> bool:
        """Whether a version that was registered for `base` is for this one."""
        return base in self.values


def signature_of(modules: Mapping[str, ModuleSpec]) -> BaseSignature:
    """Of the base's modules: adapters fit a base with the same names and shapes, and no other.

    Linears and embeddings tell bases apart. What else adapters may touch grows with versions of the server, which must
    know their adapters again; one of them had the norms in it as well.
    """
    own = [module for module in modules.values() if not module.is_parameter]
    told = [module for module in own if module.kind in _TOLD_BY]
    with_norms = [module for module in own if module.kind in (*_TOLD_BY, "norm")]
    return BaseSignature(_hash(told), (_hash(with_norms),) if len(with_norms) > len(told) else ())


def _hash(modules: Iterable[ModuleSpec]) -> str:
    lines = sorted(f"{m.path} {m.kind} {m.in_features} {m.out_features}" for m in modules)
    return sha256("\n".join(lines).encode()).hexdigest()
