"""The ragged batch: what one forward pass needs to know, built once per step and read by every layer."""

from dataclasses import dataclass, field
from typing import Any

import torch

from manylora.kernels.interface import LoraPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of S sequences, one sequence after the other, without padding.

    `token_ids`, `positions`, `kv_slots` int64 [T]; `kv_slots` is block * block_size + offset, where each
    token's key and value go. `block_tables` int32 [S, most blocks], zero behind a sequence's own.
    `query_starts` int32 [S + 1]: each sequence's run of tokens. `context_lens` int32 [S]: keys to look at,
    this step's included. The first `num_decode` sequences have exactly one token. `logit_rows` int64 [L]: the
    tokens whose logits are wanted. `lora` groups the T rows by adapter, `logit_lora` the L rows; None when
    none has one. `embeddings` [T, hidden]: what stands in place of the tokens' own, where they are virtual.
    `own_tokens` int64 [T]: ids of tokens that the base has not, of rows whose adapter has them, and -1 of all others;
    None where there are none. In `token_ids` another one stands there, that the base has.
    `pieces`: the same tokens as layers run them that keep a state of each sequence; none where no layer does.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    num_decode: int
    starts: tuple[int, ...]
    lens: tuple[int, ...]
    logit_rows: torch.Tensor
    lora: LoraPlan | None = None
    logit_lora: LoraPlan | None = None
    embeddings: torch.Tensor | None = None
    own_tokens: torch.Tensor | None = None
    pieces: "tuple[Piece, ...]" = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive `rows` of a batch that are one sequence's: `batch` is a step of them alone.

    `states`: what layers keep of the sequence up to there (`models.states.SequenceStates`); they change it.
    """

    rows: slice
    batch: Batch
    states: Any


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What may differ per layer: softmax scale, window in positions (0: none), logit soft cap (0: none).

    `chunk`: a position sees none before its own chunk of so many (0: no chunks). `sinks`, `slopes` float32 [heads]: a
    score of each head's that takes its share of the softmax and has no value, and what is added to a score for each
    position that its key is farther on (ALiBi). They are equal where these are.
    """

    scale: float
    window: int
    softcap: float
    chunk: int = 0
    sinks: torch.Tensor | None = field(default=None, compare=False)
    slopes: torch.Tensor | None = field(default=None, compare=False)

    @property
    def is_plain(self) -> bool:
        """Whether scores are products alone: without cap, sinks and slopes."""
        return not self.softcap and self.sinks is None and self.slopes is None


@dataclass(slots=True)
class ForwardContext:
    """Where the layers find the current batch. One per wrapped model."""

    batch: Batch | None = None

    def current(self) -> Batch:
        assert self.batch is not None, "a wrapped model runs inside a step only"
        return self.batch
