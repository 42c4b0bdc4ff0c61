"""A Hugging Face encoder becomes one that runs our ragged batch: whole inputs side by side, each seen both ways.

As with decoders, nothing is read off a class: a few passes of the untouched model say what its linears share, how it
numbers positions and what it must give, and the wrapped model is held against that before it serves anybody.
"""

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.kernels.batch import Batch, ForwardContext
from manylora.kernels.interface import LoraPlan, plan_of
from manylora.lora.format.reader import ModuleSpec
from manylora.lora.memory.device_memory import DeviceMemory
from manylora.lora.memory.slots import Place
from manylora.models import attention
from manylora.models.backends import Backend
from manylora.models.probes import PROBE_LENGTH, PROBE_STRENGTH, ProbeAdapter
from manylora.models.refusals import refusing
from manylora.models.survey import SAME, Survey, survey_linears
from manylora.models.wrapping import WrappedModel, wrap_surveyed

__all__ = ["EncoderModel", "apart", "both_ways", "first_position", "probe_memory", "ragged_batch", "wrap_encoder"]

_numbers = itertools.count()
_FARTHEST: Final = 4096  # tokens of the longest probe: enough to go beyond every window there is


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """A wrapped encoder.

    `pooler`, where the model has one, makes of first tokens' states [L, 1, hidden] vectors [L, hidden]; it runs on a
    step's logit rows. `position_offset` is the number of a sequence's first position; `num_types`, how many token types
    the model tells apart, 0 where it is not told any.
    """

    wrapped: WrappedModel
    pooler: nn.Module | None
    position_offset: int
    num_types: int

    @property
    def modules(self) -> dict[str, ModuleSpec]:
        """What an adapter may touch, by path."""
        return self.wrapped.modules

    @property
    def vocab_size(self) -> int:
        """Ids below this have a row of the embedding."""
        return int(self.wrapped.model.get_input_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.wrapped.model.get_input_embeddings().weight.shape[1])

    def states(self, batch: Batch, types: torch.Tensor | None = None) -> torch.Tensor:
        """Every token's hidden state, [T, hidden]. The batch stays the current one for what runs on its rows.

        `types` [T]: of each token its type, 0 for all where there are none.
        """
        self.wrapped.context.batch = batch
        given: dict[str, Any] = {"position_ids": (batch.positions + self.position_offset)[None]}
        if self.num_types:
            known = torch.zeros_like(batch.token_ids) if types is None else types.clamp(max=self.num_types - 1)
            given["token_type_ids"] = known[None]
        states: torch.Tensor = self.wrapped.model(input_ids=batch.token_ids[None], **given).last_hidden_state[0]
        return states

    def pooled(self, first: torch.Tensor) -> torch.Tensor:
        """What the pooler makes of the states [L, hidden] of the current batch's logit rows: [L, hidden]."""
        assert self.pooler is not None, "asked of a model that has one"
        found: torch.Tensor = self.pooler(first[:, None])
        return found


def wrap_encoder(model: PreTrainedModel, backend: Backend, *, context_length: int) -> EncoderModel:
    """Replace linears, embedding and attention by ours, in place. Raises ModelUnusable.

    `context_length`: how far inputs will reach.
    """
    with refusing(model, "it was looked at"):
        own = _Own(model, context_length)
        found = own.survey()
    with refusing(model, "its parts were replaced"), torch.inference_mode():
        wrapped = wrap_surveyed(model, backend, found)
        pooler = getattr(model, "pooler", None)
        if pooler is not None:
            model.pooler = None  # it runs on the rows of first tokens, of which a ragged batch has many
        name = f"manylora-encoder-{next(_numbers)}"
        attention.register(name, both_ways(wrapped.context))
        model.set_attn_implementation(name)
        num_types = int(getattr(model.config, "type_vocab_size", 1)) if own.takes_types else 0
        encoder = EncoderModel(wrapped, pooler, own.position_offset, num_types)
    with refusing(model, "it was checked"):
        own.check(encoder)
    return encoder


def first_position(model: PreTrainedModel) -> int:
    """The number of an untouched model's first position: 0, or one behind its padding's id. Raises ModelUnusable."""
    with refusing(model, "it was looked at"):
        return _Own(model, PROBE_LENGTH).position_offset


# attention


def both_ways(context: ForwardContext) -> attention.AttentionFunction:
    """The function that transformers calls: q [1, H, T, D], k and v [1, KVH, T, D] -> [1, T, H, D].

    Each sequence attends to itself alone. Neighbours of one length are computed together.
    """

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        options = attention.read_options(module, query.shape[-1], kwargs)
        if options.softcap:
            raise ModelUnusable(f"The model's attention ({type(module).__name__}) caps its logits: not supported.")
        _, heads, count, dim = query.shape
        out = query.new_empty(count, heads, dim)
        for start, number, length in _runs(context.current().lens):
            rows = slice(start, start + number * length)
            q, k, v = (
                t[0, :, rows].reshape(t.shape[1], number, length, t.shape[3]).transpose(0, 1)
                for t in (query, key, value)
            )
            found = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                _band(length, options.window, query.device),
                scale=options.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            out[rows].view(number, length, heads, dim).copy_(found.transpose(1, 2))
        return out[None], None

    return attend


def _runs(lens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Neighbours of one length: where they start, how many they are, and the length."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for length, group in itertools.groupby(lens):
        number = len(list(group))
        found.append((start, number, length))
        start += number * length
    return found


def _band(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which positions each sees, bool [length, length]: those nearer than `window`; None for all."""
    if not window or length <= window:
        return None
    at = torch.arange(length, device=device)
    return (at[:, None] - at).abs() < window


# the batch


def ragged_batch(
    token_ids: torch.Tensor,
    lens: tuple[int, ...],
    logit_rows: torch.Tensor,
    lora: LoraPlan | None = None,
    logit_lora: LoraPlan | None = None,
) -> Batch:
    """Whole inputs of `lens` tokens, one after the other, without a cache."""
    starts = (0, *itertools.accumulate(lens))
    none = token_ids.new_empty(0)
    positions = np.concatenate([np.arange(length) for length in lens])
    return Batch(
        token_ids=token_ids,
        positions=torch.from_numpy(positions).to(token_ids.device),
        kv_slots=none,
        block_tables=none,
        query_starts=none,
        context_lens=none,
        num_decode=0,
        starts=starts,
        lens=lens,
        logit_rows=logit_rows,
        lora=lora,
        logit_lora=logit_lora,
    )


# what the untouched model does


class _Own:
    """The untouched model's own answers, for the survey and for the check at the end."""

    def __init__(self, model: PreTrainedModel, context_length: int) -> None:
        self._model = model
        self._name = type(model).__name__
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in parameters:
            raise ModelUnusable(f"{self._name} takes no position_ids, so its inputs cannot share a batch.")
        self.takes_types = "token_type_ids" in parameters
        self._tolerance = SAME.get(model.dtype, SAME[torch.bfloat16])
        self._device = model.get_input_embeddings().weight.device
        self._ids = self._random_ids(min(_beyond_windows(model.config), context_length, _FARTHEST))
        if getattr(model.config, "is_decoder", False):
            raise ModelUnusable(f"{self._name} is a decoder.")
        with torch.no_grad():
            self.position_offset = self._offset(self._ids[None, : min(PROBE_LENGTH, context_length)])
        self._modules: Mapping[str, ModuleSpec] = {}
        self._states: list[tuple[int, bool, torch.Tensor, torch.Tensor | None]] = []

    def _random_ids(self, count: int) -> torch.Tensor:
        """Tokens [count] of which none is padding, where some models do not count."""
        vocab = int(self._model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(0))
        padding = getattr(self._model.config, "pad_token_id", None)
        ids[ids == padding] = (int(padding) + 1) % vocab if padding is not None else 0
        return ids.to(self._device)

    def survey(self) -> Survey:
        """Which linears there are, who shares an input, and what they give, with a strong adapter and without."""
        with torch.no_grad():
            found = survey_linears(
                self._model,
                lambda: self._run(self._ids[None], self.position_offset),
                num_tokens=len(self._ids),
                num_logit_rows=1,
            )
            self._modules = found.modules
            adapter = ProbeAdapter(found.modules, self._model.dtype, PROBE_STRENGTH)
            for count in sorted({min(PROBE_LENGTH, len(self._ids)), len(self._ids)}):
                with adapter.on_second_row(self._model):
                    states, pooled = self._run(self._ids[:count].expand(2, -1), self.position_offset)
                for row in range(2):
                    self._states.append((count, bool(row), states[row], None if pooled is None else pooled[row]))
        return found

    def _run(self, token_ids: torch.Tensor, first: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states [n, T, hidden] and what its pooler makes of them; with positions from `first` on, or its own."""
        given: dict[str, Any] = {}
        if first is not None:
            positions = first + torch.arange(token_ids.shape[1], device=self._device)
            given["position_ids"] = positions.expand(token_ids.shape[0], -1)
        if self.takes_types:
            given["token_type_ids"] = torch.zeros_like(token_ids)
        output = self._model(input_ids=token_ids, **given)
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(states, torch.Tensor) or states.dim() != 3:
            raise ModelUnusable(f"{self._name} does not give a token's hidden states: it is no encoder of texts.")
        return states, getattr(output, "pooler_output", None)

    def _offset(self, token_ids: torch.Tensor) -> int:
        own = self._run(token_ids, None)[0]
        padding = getattr(self._model.config, "pad_token_id", None)
        for first in (0, 1 + int(padding or 0)):
            if apart(self._run(token_ids, first)[0], own) <= self._tolerance:
                return first
        raise ModelUnusable(f"{self._name} numbers its positions in a way of its own.")

    # the check

    def check(self, encoder: EncoderModel) -> None:
        """All of these inputs in one batch, by the wrapped model. Raises ModelUnusable where a state differs."""
        wrapped = encoder.wrapped
        memory = probe_memory(wrapped, self._modules)
        lens = tuple(count for count, *_ in self._states)
        slots = np.array([0 if is_adapted else -1 for _, is_adapted, *_ in self._states], dtype=np.int32)
        starts = torch.tensor([0, *itertools.accumulate(lens)][:-1], device=self._device)
        batch = ragged_batch(
            torch.cat([self._ids[:count] for count in lens]),
            lens,
            starts,
            _plan(wrapped, memory, np.repeat(slots, lens)),
            _plan(wrapped, memory, slots),
        )
        most = wrapped.backend.format.tolerance(wrapped.model.dtype).model
        with torch.inference_mode():
            states = encoder.states(batch)
            pooled = None if encoder.pooler is None else encoder.pooled(states[starts])
        wrapped.context.batch = None
        for number, (_, is_adapted, wanted, wanted_pooled) in enumerate(self._states):
            rows = slice(batch.starts[number], batch.starts[number + 1])
            self._require(states[rows], wanted, most, is_adapted)
            if pooled is not None and wanted_pooled is not None:
                self._require(pooled[number], wanted_pooled, most, is_adapted)

    def _require(self, found: torch.Tensor, wanted: torch.Tensor, most: float, is_adapted: bool) -> None:
        difference = apart(found, wanted)
        if not difference <= most:
            whose = " with an adapter on every module" if is_adapted else ""
            raise ModelUnusable(
                f"{self._name} computes something that this server does not reproduce{whose} (hidden states differ by "
                f"{difference:.3g} of their spread, {most:.3g} is allowed)."
            )


def _beyond_windows(config: Any) -> int:
    """So many tokens that every window that the config names shows."""
    named = [getattr(config, name, None) for name in ("local_attention", "sliding_window")]
    return max(PROBE_LENGTH, *(2 * value for value in named if isinstance(value, int)), PROBE_LENGTH)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square of the difference, as a share of the spread."""
    difference = (found.float() - wanted.float()).square().mean().sqrt()
    return float(difference / wanted.float().std().clamp(min=1e-6))


def probe_memory(wrapped: WrappedModel, modules: Mapping[str, ModuleSpec]) -> DeviceMemory:
    """A device memory whose slot 0 has the probe's adapter."""
    packed = ProbeAdapter(modules, wrapped.model.dtype, PROBE_STRENGTH).packed(wrapped.sites)
    memory = DeviceMemory(len(wrapped.sites), 1, wrapped.backend.device, wrapped.backend.allocate)
    place = Place(0, 0, 0, is_new_slab=True)
    memory.allocate(place, packed.layout, 1)
    memory.fill(place, packed)
    memory.publish(place, packed)
    return memory


def _plan(wrapped: WrappedModel, memory: DeviceMemory, slots: np.ndarray) -> LoraPlan | None:
    return plan_of(wrapped.backend.lora, memory, slots)
