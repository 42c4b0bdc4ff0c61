"""What recurrent layers keep of a sequence in place of its past: a state, a convolution's last inputs.

Transformers' own modules compute these layers, one sequence after the other, over its own cache objects. A step never
changes what it began with: it works on copies, layer by layer, so that it can be run again.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from manylora.kernels.batch import Batch, ForwardContext, Piece
from manylora.kernels.interface import LoraPlan

__all__ = ["NotingStates", "SequenceStates", "StateStore", "cut", "run_by_pieces", "state_layers"]


def state_layers(config: Any) -> list[Any]:
    """Transformers' cache of each layer of a model of this config, where at least one of them is a state; else none."""
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except Exception:  # noqa: BLE001 - a config that says nothing of a cache
        return []
    return layers if any(isinstance(each, LinearAttentionCacheLayerMixin) for each in layers) else []


class SequenceStates(Cache):  # type: ignore[misc]
    """The states of one sequence, as its recurrent layers find and leave them.

    `layers` are another's until `open` puts a copy in their place: what it has there by then, which the same step may
    have run before. Keys and values pass through: attention beside a state looks them up in the paged cache.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers=list(layers))
        self._before = layers
        self._opened: set[int] = set()

    def open(self, layer: int) -> None:
        """Make a layer's state this object's own, before it is changed for the first time."""
        if layer not in self._opened:
            self._opened.add(layer)
            self.layers[layer] = _copied(self._before[layer])

    def settle(self) -> None:
        """All layers have run: nothing is looked up in what came before any more."""
        self._before = self.layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def size_bytes(self) -> int:
        """Of all its states."""
        return sum(state.nbytes for layer in self.layers for state in _states_of(layer))


def _copied(layer: Any) -> Any:
    made = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            own = {key: each.clone() if isinstance(each, torch.Tensor) else each for key, each in value.items()}
            setattr(made, name, own)
    return made


def _states_of(layer: Any) -> Iterator[torch.Tensor]:
    for value in vars(layer).values():
        if isinstance(value, dict):
            yield from (each for each in value.values() if isinstance(each, torch.Tensor))


class NotingStates(SequenceStates):
    """Notes which module of a model asks for the state of which layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(state_layers(model.config))
        self._paths = {id(module): path for path, module in model.named_modules()}
        self.keepers: dict[str, int] = {}

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        self._note(layer_idx)
        found: torch.Tensor | None = super().get_conv_state(layer_idx, *args, **kwargs)
        return found

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        self._note(layer_idx)
        found: torch.Tensor | None = super().get_recurrent_state(layer_idx, *args, **kwargs)
        return found

    def _note(self, layer: int) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._paths:
                self.keepers[self._paths[id(owner)]] = layer
                return
            frame = frame.f_back  # type: ignore[assignment]


class StateStore:
    """The states of the sequences that run: each after the positions at which its steps ended; and copies, by room."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._empty = layers
        self._held: dict[int, dict[int, SequenceStates]] = {}
        self._copies: dict[int, SequenceStates] = {}

    def begin(
        self,
        slot: int,
        start: int,
        sizes: Sequence[int],
        *,
        committed: int,
        begins_with: int = -1,
        snapshots: Mapping[int, int] = MappingProxyType({}),
    ) -> list[SequenceStates]:
        """What the sequence of a slot has at position `start`, for each of its next pieces, which change it.

        It is what the copy in room `begins_with` has, unless that is -1. Of what the sequence had before `committed`
        nobody will ask again. At the positions of `snapshots` what it has goes to rooms, and is changed no further.
        """
        held: dict[int, SequenceStates] = {}
        if begins_with >= 0:
            held[start] = self._copies[begins_with]
        else:
            held = {at: states for at, states in self._held.get(slot, {}).items() if committed <= at <= start}
        states = SequenceStates(held[start].layers if start else self._empty)
        found = []
        at = start
        for size in sizes:
            if at in snapshots and at > start:
                states = SequenceStates(states.layers)
            found.append(states)
            at += size
            if at in snapshots:
                self._copies[snapshots[at]] = states
        self._held[slot] = held | {at: states}
        return found

    def clear(self) -> None:
        """Forget the sequences."""
        self._held.clear()


def cut(
    batch: Batch,
    sizes: Sequence[Sequence[int]],
    states: Sequence[Sequence[SequenceStates]],
    slots: np.ndarray,
    plan: Callable[[np.ndarray], LoraPlan | None],
) -> tuple[Piece, ...]:
    """The batch in pieces: each sequence's rows in runs of `sizes`, over `states`. `slots` [T]: each row's adapter."""
    device = batch.token_ids.device
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    pieces = []
    for number, (runs, kept) in enumerate(zip(sizes, states, strict=True)):
        at, end = batch.starts[number], batch.starts[number + 1]
        for size, own in zip(runs, kept, strict=True):
            rows = slice(at, at + size)
            length = batch.lens[number] - (end - rows.stop)
            alone = Batch(
                token_ids=batch.token_ids[rows],
                positions=batch.positions[rows],
                kv_slots=batch.kv_slots[rows],
                block_tables=batch.block_tables[number : number + 1],
                query_starts=torch.tensor([0, size], dtype=torch.int32, device=device),
                context_lens=torch.tensor([length], dtype=torch.int32, device=device),
                num_decode=int(size == 1),
                starts=(0, size),
                lens=(length,),
                logit_rows=nothing,
                lora=plan(slots[rows]),
            )
            pieces.append(Piece(rows, alone, own))
            at = rows.stop
    return tuple(pieces)


def run_by_pieces(module: nn.Module, layer: int, context: ForwardContext) -> None:
    """Let a module that keeps a state run each piece of a batch by itself, over the state of its sequence."""
    own = module.forward
    names = list(inspect.signature(own).parameters)
    cache = next(name for name in ("cache", "cache_params", "past_key_values") if name in names)

    def forward(*args: Any, **kwargs: Any) -> Any:
        whole = context.current()
        given = dict(zip(names, args, strict=False)) | kwargs
        count = whole.token_ids.shape[0]
        found = []
        try:
            for piece in whole.pieces:
                piece.states.open(layer)
                context.batch = piece.batch
                part = {name: _rows_of(value, piece.rows, count) for name, value in given.items()}
                found.append(own(**{**part, cache: piece.states}))
        finally:
            context.batch = whole
        return _joined(found)

    module.forward = forward


def _rows_of(value: Any, rows: slice, count: int) -> Any:
    """A piece's rows of what a layer is given: [1, T, …] tensors, and tuples of these."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (1, count):
        return value[:, rows]
    if isinstance(value, tuple):
        return tuple(_rows_of(each, rows, count) for each in value)
    return value


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*parts, strict=True))
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return parts[0]
