"""A Whisper becomes one that runs our ragged batch: windows of sound are encoded, transcripts decoded token by token.

Its linears, norms and token embedding are replaced by ours, so that each row has its own adapter in the encoder as in
the decoder. What the decoder looks at of a window is computed once, when its transcript begins, and kept in a slot of
the sequence's. The wrapped model is held against the untouched one before it serves anybody.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from manylora.errors import ModelUnusable
from manylora.kernels.batch import AttentionOptions, Batch
from manylora.kernels.interface import LoraPlan, plan_of
from manylora.lora.format.encoders import SpeechModules
from manylora.models import attention
from manylora.models.backends import Backend
from manylora.models.encoder import both_ways, probe_memory, ragged_batch
from manylora.models.kv_cache import KVCache, KVShape, bytes_per_block
from manylora.models.probes import PROBE_LENGTH, PROBE_STRENGTH, ProbeAdapter
from manylora.models.refusals import refusing
from manylora.models.survey import SAME, survey_linears
from manylora.models.wrapping import WrappedModel, wrap_surveyed

__all__ = ["HeardStates", "SpeechModel", "window_bytes", "wrap_speech"]

_numbers = itertools.count()
_HEAD: Final = "proj_out"
_CHUNK: Final = 7  # tokens of a probe in the first step


def _decoder_shapes(config: Any) -> list[KVShape]:
    """The keys and values of each layer of a Whisper's decoder, as its config has them."""
    heads = int(config.decoder_attention_heads)
    size = int(config.d_model) // heads
    return [KVShape(heads, size, size)] * int(config.decoder_layers)


def window_bytes(config: Any, dtype: torch.dtype, context_length: int, block_size: int) -> int:
    """What is kept of a window and its transcript while it is written: what is looked at, and blocks for its tokens."""
    num_blocks = -(-context_length // block_size)
    return _heard_bytes(config, dtype) + num_blocks * bytes_per_block(_decoder_shapes(config), block_size, dtype)


def _heard_bytes(config: Any, dtype: torch.dtype) -> int:
    """What a decoder looks at of one window: keys and values of its positions for each layer."""
    return sum(shape.size for shape in _decoder_shapes(config)) * int(config.max_source_positions) * dtype.itemsize


class HeardStates:
    """What decoders look at of the windows: `keys` and `values` [slots + 1, layers, heads, positions, head_dim].

    The last slot is nobody's and silent, so that a step can be tried without any sound.
    """

    def __init__(
        self, num_slots: int, layers: int, heads: int, positions: int, head_dim: int, like: torch.Tensor
    ) -> None:
        shape = (num_slots + 1, layers, heads, positions, head_dim)
        self.num_slots = num_slots
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        for each in (self.keys, self.values):
            each[-1].zero_()


@dataclass(slots=True)
class _Heard:
    """Where the layers find what the current step's rows look at: a slot for each run of rows."""

    states: HeardStates | None = None
    runs: list[tuple[slice, int]] = field(default_factory=list)


class CrossAttention(nn.Module):
    """Attention of a decoder's rows to what was heard. Stands where Whisper's own stood, with its linears."""

    def __init__(self, base: nn.Module, layer: int, heard: _Heard) -> None:
        super().__init__()
        self.q_proj: Any = base.q_proj
        self.k_proj: Any = base.k_proj
        self.v_proj: Any = base.v_proj
        self.out_proj: Any = base.out_proj
        self._heads, self._size, self._scale = int(base.num_heads), int(base.head_dim), float(base.scaling)  # type: ignore[arg-type]
        self._layer = layer
        self._heard = heard

    def hear(self, states: torch.Tensor, slots: list[int]) -> None:
        """Keep the keys and values of the encoder's states [1, windows * positions, hidden] in these slots."""
        kept = self._heard.states
        assert kept is not None, "a wrapped model has its states attached"
        keys, values = self.k_proj(states), self.v_proj(states)
        for rows, room in ((keys, kept.keys), (values, kept.values)):
            windows = rows.view(len(slots), -1, self._heads, self._size).transpose(1, 2)
            for window, slot in zip(windows, slots, strict=True):
                room[slot, self._layer].copy_(window)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[1, T, hidden] -> the same. Each row is computed by itself, so that it does not depend on its neighbours."""
        kept = self._heard.states
        assert kept is not None, "a wrapped model has its states attached"
        query = (self.q_proj(hidden_states) * self._scale).view(-1, self._heads, 1, self._size)
        out = torch.empty_like(query)
        for rows, slot in self._heard.runs:
            mine = query[rows]
            shape = (len(mine), -1, -1, -1)
            keys, values = kept.keys[slot, self._layer], kept.values[slot, self._layer]
            out[rows] = functional.scaled_dot_product_attention(
                mine, keys[None].expand(shape), values[None].expand(shape), scale=1.0
            )
        return self.out_proj(out.view(*hidden_states.shape[:-1], -1)), None


class SpeechModel:
    """A wrapped Whisper. `modules`: what an adapter may touch, by path."""

    def __init__(self, wrapped: WrappedModel, heard: _Heard, probe: "_Probe") -> None:
        self.wrapped = wrapped
        self.modules = SpeechModules(wrapped.modules)
        self._heard = heard
        self._probe: _Probe | None = probe
        self._encoder: Any = wrapped.model.get_submodule("model.encoder")
        self._decoder: Any = wrapped.model.get_submodule("model.decoder")
        self._crosses: list[CrossAttention] = [layer.encoder_attn for layer in self._decoder.layers]

    @property
    def vocab_size(self) -> int:
        return self.wrapped.vocab_size

    @property
    def num_positions(self) -> int:
        """What a window becomes."""
        return int(self.wrapped.model.config.max_source_positions)

    def attach(self, cache: KVCache, num_slots: int) -> None:
        """Attend over this cache from now on, and keep so many windows. Raises ModelUnusable, see `_check`."""
        wrapped, first = self.wrapped, self._crosses[0]
        self._heard.states = HeardStates(
            num_slots,
            len(self._crosses),
            first._heads,
            self.num_positions,
            first._size,
            self._decoder.layer_norm.weight,
        )
        name = f"manylora-speech-{next(_numbers)}"
        around = both_ways(wrapped.context)
        count = len(self._crosses)
        options = [AttentionOptions(1.0, 0, 0.0)] * count  # queries are scaled before
        back = attention.paged_attention_function(
            cache, wrapped.context, options, {i: i for i in range(count)}, wrapped.backend.attention
        )

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return (back if module.is_causal else around)(module, *args, **kwargs)

        attention.register(name, attend)
        wrapped.model.set_attn_implementation(name)
        with refusing(wrapped.model, "it was checked"), torch.inference_mode():
            self._check(cache)

    def hear(self, sounds: list[torch.Tensor], slots: list[int], lora: LoraPlan | None) -> None:
        """Encode windows [mels, frames] and keep what decoders look at in these slots. `lora`: of all positions."""
        context, positions = self.wrapped.context, self.num_positions
        none = torch.zeros(len(sounds) * positions, dtype=torch.int64, device=sounds[0].device)
        context.batch = ragged_batch(none, (positions,) * len(sounds), none[:0], lora)
        try:
            rows = torch.cat([self._front(sound[None]) for sound in sounds], dim=1)
            for layer in self._encoder.layers:
                rows = layer(rows, None)
            rows = self._encoder.layer_norm(rows)
            for cross in self._crosses:
                cross.hear(rows, slots)
        finally:
            context.batch = None

    def _front(self, sound: torch.Tensor) -> torch.Tensor:
        """A window's positions before the first layer, [1, positions, hidden]; of each window by itself."""
        found = functional.gelu(self._encoder.conv1(sound))
        found = functional.gelu(self._encoder.conv2(found))
        rows: torch.Tensor = found.permute(0, 2, 1) + self._encoder.embed_positions.weight
        return rows

    def logits(self, batch: Batch, slots: list[int]) -> torch.Tensor:
        """[L, vocab] of the batch's logit rows; sequence i looks at what was heard in `slots[i]`."""
        context = self.wrapped.context
        runs = itertools.pairwise(batch.starts)
        self._heard.runs = [(slice(*run), slot) for run, slot in zip(runs, slots, strict=True)]
        context.batch = batch
        try:
            states = self._decoder(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                encoder_hidden_states=batch.positions,  # anything: what was heard is kept
                use_cache=False,
            ).last_hidden_state
            found: torch.Tensor = self.wrapped.model.get_submodule(_HEAD)(states[0, batch.logit_rows])
            return found
        finally:
            context.batch = None
            self._heard.runs = []

    def _check(self, cache: KVCache) -> None:
        """The probe's two sequences in one batch, in two steps. Raises ModelUnusable where logits differ."""
        probe, self._probe = self._probe, None
        if probe is None:
            return
        wrapped, states = self.wrapped, self._heard.states
        assert states is not None
        memory = probe_memory(wrapped, wrapped.survey.modules)
        slots = [0, states.num_slots] if states.num_slots == 1 else [0, 1]
        adapters = np.array([-1, 0], dtype=np.int32)
        self.hear(
            [probe.sound] * 2, slots, plan_of(wrapped.backend.lora, memory, np.repeat(adapters, self.num_positions))
        )
        count = len(probe.token_ids)
        found = []
        for first, end in itertools.pairwise((0, min(_CHUNK, count), count)):
            if first < end:
                batch = probe.batch(
                    cache, first, end, plan_of(wrapped.backend.lora, memory, np.repeat(adapters, end - first))
                )
                found.append(self.logits(batch, slots).view(2, end - first, -1))
        if states.num_slots == 1:
            for each in (states.keys, states.values):
                each[-1].zero_()
        _require_same(wrapped.model, torch.cat(found, dim=1), probe.logits)


@dataclass(frozen=True, slots=True)
class _Probe:
    """Sound [mels, frames] and tokens [n], and the untouched model's logits [2, n, vocab]: as it is and adapted."""

    sound: torch.Tensor
    token_ids: torch.Tensor
    logits: torch.Tensor

    def batch(self, cache: KVCache, first: int, end: int, lora: LoraPlan | None) -> Batch:
        """Tokens `first` to `end` of two sequences, each in blocks of its own."""
        device, size, length = self.token_ids.device, cache.block_size, end - first
        num_blocks = -(-len(self.token_ids) // size)
        tables = torch.arange(2 * num_blocks, dtype=torch.int32, device=device).view(2, num_blocks)
        positions = torch.arange(first, end, device=device)
        kv_slots = torch.cat([table[positions // size].long() * size + positions % size for table in tables])
        starts = (0, length, 2 * length)
        return Batch(
            token_ids=self.token_ids[first:end].repeat(2),
            positions=positions.repeat(2),
            kv_slots=kv_slots,
            block_tables=tables,
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor([end, end], dtype=torch.int32, device=device),
            num_decode=2 if length == 1 else 0,
            starts=starts,
            lens=(end, end),
            logit_rows=torch.arange(2 * length, device=device),
            lora=lora,
            logit_lora=lora,
        )


def wrap_speech(model: PreTrainedModel, backend: Backend) -> SpeechModel:
    """Replace linears, norms, embedding and attention by ours, in place. Raises ModelUnusable.

    The check waits until there is a cache (`SpeechModel.attach`).
    """
    with refusing(model, "it was looked at"), torch.no_grad():
        probe, found = _look_at(model)
    with refusing(model, "its parts were replaced"), torch.inference_mode():
        wrapped = wrap_surveyed(model, backend, found)
        config, heard = model.config, _Heard()
        found.kv_shapes = _decoder_shapes(config)
        for number, layer in enumerate(model.get_submodule("model.decoder.layers").children()):
            layer.encoder_attn = CrossAttention(layer.encoder_attn, number, heard)
        return SpeechModel(wrapped, heard, probe)


def _look_at(model: PreTrainedModel) -> tuple[_Probe, Any]:
    """What the untouched model gives, adapted and as it is, and which of its linears share an input."""
    config, random = model.config, torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    count = min(PROBE_LENGTH, config.max_target_positions)
    sound = torch.randn(config.num_mel_bins, 2 * config.max_source_positions, generator=random).to(device, model.dtype)
    token_ids = torch.randint(0, config.vocab_size, (count,), generator=random).to(device)

    def run(num_rows: int) -> torch.Tensor:
        given = {"input_features": sound.expand(num_rows, -1, -1), "decoder_input_ids": token_ids.expand(num_rows, -1)}
        logits: torch.Tensor = model(**given, use_cache=False).logits
        return logits

    found = survey_linears(model, lambda: run(1), num_tokens=count, num_logit_rows=config.max_source_positions)
    found.on_logit_rows = {_HEAD}
    found.num_logits = int(config.vocab_size)
    adapter = ProbeAdapter(found.modules, model.dtype, PROBE_STRENGTH)
    with adapter.on_second_row(model):
        logits = run(2)
    return _Probe(sound, token_ids, logits), found


def _require_same(model: PreTrainedModel, found: torch.Tensor, wanted: torch.Tensor) -> None:
    most = SAME.get(model.dtype, SAME[torch.bfloat16])
    for row, whose in enumerate(("", " with an adapter on every module")):
        difference = (found[row].float() - wanted[row].float()).square().mean().sqrt()
        apart = float(difference / wanted[row].float().std().clamp(min=1e-6))
        if not apart <= most:
            raise ModelUnusable(
                f"{type(model).__name__} computes something that this server does not reproduce{whose} (logits differ "
                f"by {apart:.3g} of their spread, {most:.3g} is allowed)."
            )
