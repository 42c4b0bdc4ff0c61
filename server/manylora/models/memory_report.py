"""What a base will take of the memory, told from its config and its files' headers, without its weights."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manylora.lora.format.spec import ModuleSpec
from manylora.models import backends, checkpoint
from manylora.models.encoder_loading import encoder_backend, is_encoder
from manylora.models.image_loading import image_backend, is_image_model
from manylora.models.kv_cache import bytes_per_block
from manylora.models.loading import resolve_model
from manylora.models.modules import stated_shapes
from manylora.models.offered import modules_of
from manylora.models.speech import window_bytes
from manylora.models.speech_loading import is_speech, speech_backend

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from manylora.settings import Settings

__all__ = ["MemoryReport", "memory_report"]


_OF_ADAPTERS: Final = ("adapter_memory", "host_tier_memory")
_OF_TEXT: Final = ("prompt_logits_memory", "grammar_memory")


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes. `linears` and `head` as the settings keep them, `others` (embedding, norms, experts) in the model's type.

    `kv_cache`: what the settings give to keys and values, of what is free now; 0 of encoders, which keep none.
    `kv_per_token` is None where the config does not say what a token's are, `per_window`, of models of speech alone,
    what a window of sound takes there. `limits`: what adapters, prompts' logits and grammars may take, by setting.
    """

    parameters: int
    linears: int
    head: int
    others: int
    kv_per_token: float | None
    kv_cache: int
    limits: dict[str, int]
    free: int
    per_window: int | None = None

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
    folder = resolve_model(settings.model)
    if is_encoder(folder):
        return _of_encoder(settings, folder, encoder_backend(settings))
    if is_image_model(folder):
        return _of_encoder(settings, folder, image_backend(settings))
    if is_speech(folder):
        return _of_speech(settings, folder)
    backend = backends.choose(settings)
    config = checkpoint.read_config(folder, to_serve=True)
    shapes = stated_shapes(config)
    per_block = bytes_per_block(shapes, settings.block_size, backend.cache_dtype(_dtype(settings, backend, config)))
    told = _weighed(settings, folder, backend, config, _OF_ADAPTERS + _OF_TEXT)
    kv_cache = _in_bytes(settings.kv_cache_memory, told.free)
    return replace(told, kv_per_token=per_block / settings.block_size if shapes else None, kv_cache=kv_cache)


def _of_encoder(settings: "Settings", folder: Path, backend: backends.Backend) -> MemoryReport:
    return _weighed(settings, folder, backend, checkpoint.read_encoder_config(folder), _OF_ADAPTERS)


def _of_speech(settings: "Settings", folder: Path) -> MemoryReport:
    backend = speech_backend(settings)
    config = checkpoint.read_speech_config(folder)
    told = _weighed(settings, folder, backend, config, _OF_ADAPTERS)
    length = settings.max_model_len or int(config.max_target_positions)
    each = window_bytes(config, _dtype(settings, backend, config), length, settings.block_size)
    num_windows = min(settings.max_num_seqs, max(1, _in_bytes(settings.kv_cache_memory, told.free) // each))
    return replace(told, kv_cache=num_windows * each, per_window=each)


def _weighed(
    settings: "Settings",
    folder: Path,
    backend: backends.Backend,
    config: "PretrainedConfig",
    limits: Iterable[str],
) -> MemoryReport:
    """What the weights take, and what is free; no cache yet."""
    dtype = _dtype(settings, backend, config)
    parameters = checkpoint.num_parameters(folder)
    modules = modules_of(settings.model)
    linears = [spec for spec in modules.values() if spec.kind in ("linear", "conv1d")]
    heads = [spec for spec in linears if spec.out_features == _vocabulary(modules.values())]
    rounded = [spec for spec in linears if spec not in heads]
    # A head that shares the embedding's weight has a copy of its own, in the order that its kernel reads.
    own = sum(spec.in_features * spec.out_features for spec in linears if not spec.is_tied)
    free = backends.free_bytes(backend.device)
    return MemoryReport(
        parameters=parameters,
        linears=_kept(rounded, backend, dtype),
        head=_kept(heads, backend, dtype, is_head=True),
        others=max(0, parameters - own) * dtype.itemsize,
        kv_per_token=None,
        kv_cache=0,
        limits={name: _in_bytes(getattr(settings, name), free) for name in limits},
        free=free,
    )


def _dtype(settings: "Settings", backend: backends.Backend, config: "PretrainedConfig") -> "torch.dtype":
    return backends.select_dtype(settings.dtype, backend.device, getattr(config, "dtype", None))


def _in_bytes(size: int | float, free: int) -> int:
    return size if isinstance(size, int) else int(free * size)


def _vocabulary(modules: Iterable[ModuleSpec]) -> int:
    """Rows of the token embedding: outputs of what makes the logits."""
    return next((spec.in_features for spec in modules if spec.kind == "embedding"), 0)


def _kept(
    linears: Iterable[ModuleSpec], backend: backends.Backend, dtype: "torch.dtype", *, is_head: bool = False
) -> int:
    kept = backend.head_format if is_head else backend.format
    return sum(kept.nbytes(spec.out_features, spec.in_features, dtype) for spec in linears)
