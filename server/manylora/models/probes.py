"""What the start-up check runs: a few tokens early and far out, without and with an adapter on every module."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from manylora.lora.format.reader import ModuleSpec
from manylora.lora.memory.layout import Layout
from manylora.lora.memory.packing import FORMATS, PackedAdapter
from manylora.models.modules import embedding_scale

__all__ = ["PROBE_LENGTH", "PROBE_STRENGTH", "PretendedPast", "Probe", "ProbeAdapter"]

PROBE_LENGTH: Final = 12
# Stronger adapters make deep networks so unsteady that rounding in 16 bits grows to what an error would.
PROBE_STRENGTH: Final = 0.3
_RANK = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens [n] from position `start` on, with nothing before them in the cache, and the untouched model's logits.

    `base` and `adapted` float32 [n, vocab]: without an adapter and with the probe's.
    """

    start: int
    token_ids: torch.Tensor
    base: torch.Tensor
    adapted: torch.Tensor


class PretendedPast(DynamicCache):  # type: ignore[misc]
    """A cache that claims to hold `length` positions and holds none.

    A model that is given it numbers its tokens and builds its masks as far out as that, at the price of a few tokens.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._pretended = length

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        return self._pretended

    def get_query_offset(self, *_args: Any, **_kwargs: Any) -> int:
        return self._pretended

    def get_mask_sizes(self, query_length: Any, *_args: Any, **_kwargs: Any) -> tuple[int, int]:
        return self._pretended + int(query_length), 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    # A recurrent layer finds no state and begins anew.

    def get_conv_state(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    def get_recurrent_state(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    def update_conv_state(self, conv_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return recurrent_states

    def is_recording_past(self, *_args: Any, **_kwargs: Any) -> bool:
        return False


class ProbeAdapter:
    """A random adapter on every module. `a` [r, in], `b` [r, out] of each, by path, in the model's number format.

    For inputs of root mean square 1 its deltas have root mean square `strength`, whatever the base's weights are like:
    at 1 queries and keys are so large that attention is far from even, and a wrong position or scale shows.
    """

    def __init__(self, modules: Mapping[str, ModuleSpec], dtype: torch.dtype, strength: float) -> None:
        self._modules = modules
        self._dtype = dtype
        self._strength = strength

    def matrices(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the module, drawn anew from its seed at each call, so that none are kept."""
        spec = self._modules[path]
        random = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        spread = 1.0 if spec.kind == "embedding" else spec.in_features**-0.5
        a = torch.randn(_RANK, spec.in_features, generator=random) * spread
        b = torch.randn(_RANK, spec.out_features, generator=random) * (self._strength * _RANK**-0.5)
        return a.to(self._dtype), b.to(self._dtype)

    @contextmanager
    def on_second_row(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the adapter act on the second of two sequences that the untouched model is given."""
        handles = [
            model.get_submodule(path).register_forward_hook(self._hook(path, model.get_submodule(path)))
            for path in self._modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str, module: nn.Module) -> Callable[..., torch.Tensor]:
        spec = self._modules[path]
        scale = embedding_scale(module) if spec.kind == "embedding" else 1.0

        def add(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            x = args[0]
            a, b = (each.to(out.device).float() for each in self.matrices(path))
            low = a[:, x.flatten()].T if spec.kind == "embedding" else x.reshape(-1, spec.in_features).float() @ a.T
            delta = (low @ b) * scale
            delta[: delta.shape[0] // 2] = 0
            return (out.float() + delta.view(out.shape)).to(out.dtype)

        return add

    def packed(self, sites: Mapping[str, int]) -> PackedAdapter:
        """The adapter in the layout in which slots hold adapters."""
        shapes = {sites[path]: (spec.in_features, spec.out_features) for path, spec in self._modules.items()}
        layout = Layout.of(dict.fromkeys(shapes, _RANK), shapes, FORMATS[self._dtype])
        data = torch.zeros(layout.numel, dtype=self._dtype)
        for path, spec in self._modules.items():
            extent = layout.low_rank[sites[path]]
            a, b = self.matrices(path)
            room_a = data[extent.a : extent.a + extent.padded * extent.in_features]
            room_b = data[extent.b : extent.b + extent.padded * extent.out_features]
            if spec.kind == "embedding":
                room_a.view(extent.in_features, extent.padded)[:, :_RANK] = a.T
            else:
                room_a.view(extent.padded, extent.in_features)[:_RANK] = a
            room_b.view(extent.padded, extent.out_features)[:_RANK] = b
        return PackedAdapter(layout, dict.fromkeys(shapes, _RANK), data)
