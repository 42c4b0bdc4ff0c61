"""An adapter's modules as plain low rank, for tests of adapters that are nothing else."""

from dataclasses import dataclass

from manylora.lora.format.spec import AdaptedModule, Adapter, LowRank
from manylora.lora.format.tensors import TensorView


@dataclass(frozen=True)
class Plain:
    """A module's one term, of the files' own tensors."""

    path: str
    kind: str
    rank: int
    scale: float
    a: TensorView
    b: TensorView


def plain_modules(adapter: Adapter) -> list[Plain]:
    return [_plain(module) for module in adapter.modules]


def _plain(module: AdaptedModule) -> Plain:
    (term,) = module.terms
    assert isinstance(term, LowRank)
    assert isinstance(term.a, TensorView)
    assert isinstance(term.b, TensorView)
    return Plain(module.path, module.kind, term.rank, term.scale, term.a, term.b)
