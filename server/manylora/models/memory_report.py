"""What a base will take of the memory, told from its config and its files' headers, without its weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.lora.format.spec import ModuleSpec
from manylora.models import backends, checkpoint
from manylora.models.kv_cache import bytes_per_block
from manylora.models.loading import resolve_model
from manylora.models.modules import stated_shapes
from manylora.models.offered import modules_of

if TYPE_CHECKING:
    import torch

    from manylora.settings import Settings

__all__ = ["MemoryReport", "memory_report"]


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes. `linears` and `head` as the settings keep them, `others` (embedding, norms, experts) in the model's type.

    `kv_per_token` is None where the config does not say what a token's keys and values are, `kv_cache` what the
    settings give them of what is free now. `limits`: what adapters, prompts' logits and grammars may take, by setting.
    """

    parameters: int
    linears: int
    head: int
    others: int
    kv_per_token: float | None
    kv_cache: int
    limits: dict[str, int]
    free: int

    @property
    def base(self) -> int:
        """All weights of the base."""
        return self.linears + self.head + self.others

    @property
    def total(self) -> int:
        """The base, the cache, and what the limits allow, if all of it is used."""
        return self.base + self.kv_cache + sum(self.limits.values())


def memory_report(settings: "Settings") -> MemoryReport:
    """Of the base that the settings name. Raises StartupError, where the base itself could not be served."""
    backend = backends.choose(settings)
    folder = resolve_model(settings.model)
    config = checkpoint.read_config(folder, to_serve=True)
    dtype = backends.select_dtype(settings.dtype, backend.device, getattr(config, "dtype", None))
    parameters = checkpoint.num_parameters(folder)
    modules = modules_of(settings.model)
    linears = [spec for spec in modules.values() if spec.kind in ("linear", "conv1d")]
    heads = [spec for spec in linears if spec.out_features == _vocabulary(modules.values())]
    rounded = [spec for spec in linears if spec not in heads]
    # A head that shares the embedding's weight has a copy of its own, in the order that its kernel reads.
    own = sum(spec.in_features * spec.out_features for spec in linears if not spec.is_tied)
    free = backends.free_bytes(backend.device)

    def in_bytes(size: int | float) -> int:
        return size if isinstance(size, int) else int(free * size)

    shapes = stated_shapes(config)
    per_block = bytes_per_block(shapes, settings.block_size, backend.cache_dtype(dtype))
    names = ("adapter_memory", "host_tier_memory", "prompt_logits_memory", "grammar_memory")
    return MemoryReport(
        parameters=parameters,
        linears=_kept(rounded, backend, dtype),
        head=_kept(heads, backend, dtype, is_head=True),
        others=max(0, parameters - own) * dtype.itemsize,
        kv_per_token=per_block / settings.block_size if shapes else None,
        kv_cache=in_bytes(settings.kv_cache_memory),
        limits={name: in_bytes(getattr(settings, name)) for name in names},
        free=free,
    )


def _vocabulary(modules: Iterable[ModuleSpec]) -> int:
    """Rows of the token embedding: outputs of what makes the logits."""
    return next((spec.in_features for spec in modules if spec.kind == "embedding"), 0)


def _kept(
    linears: Iterable[ModuleSpec], backend: backends.Backend, dtype: "torch.dtype", *, is_head: bool = False
) -> int:
    kept = backend.head_format if is_head else backend.format
    return sum(kept.nbytes(spec.out_features, spec.in_features, dtype) for spec in linears)
