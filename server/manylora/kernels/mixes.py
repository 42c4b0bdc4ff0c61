"""Rows that have several adapters, in plain torch operations; see `reference.add_mixes`.

For each part of a mix one operation after the other: the fallback where there is no kernel for them, and the embedding
everywhere, of which a model has one.
"""

import torch

from manylora.kernels.interface import SiteGroup, mixed_segments, weighted_sums
from manylora.kernels.rows import MixedRows, Parts
from manylora.lora.memory.device_memory import DeviceMemory

__all__ = ["add_embedding_mixes_", "add_mixes_", "change_mixed_inputs_", "change_mixed_outputs_"]


def add_mixes_(out: torch.Tensor, x: torch.Tensor, group: SiteGroup, mixes: MixedRows, memory: DeviceMemory) -> None:
    """What mixes do to the product of `x` [T, in_features], in place in `out` [T, columns]."""
    for member, site in enumerate(group.sites):
        if not mixes.touched[site]:
            continue
        columns = slice(group.offsets[member], group.offsets[member + 1])
        for parts, rows in mixed_segments(mixes):
            base = out[rows, columns].float()
            total = _changed(base, parts, site, memory)
            for slot, weight in parts:
                delta = _delta(x[rows], slot, site, memory)
                if delta is not None:
                    total += weight * delta
            out[rows, columns] = total.to(out.dtype)


def add_embedding_mixes_(
    out: torch.Tensor, token_ids: torch.Tensor, site: int, scale: float, mixes: MixedRows, memory: DeviceMemory
) -> None:
    """What mixes do to the embeddings `out` [T, hidden] of `token_ids` [T], in place, deltas times `scale`."""
    if not mixes.touched[site]:
        return
    for parts, rows in mixed_segments(mixes):
        total = _changed(out[rows].float(), parts, site, memory)
        for slot, weight in parts:
            found = _embedded(token_ids[rows], slot, site, memory)
            if found is not None:
                total += weight * scale * _scaled(found, slot, site, memory)
        out[rows] = total.to(out.dtype)


def change_mixed_inputs_(x: torch.Tensor, site: int, mixes: MixedRows, memory: DeviceMemory) -> None:
    """Rows of `x` [T, in_features], in place, as the base is to have them: all parts' scales of it, summed."""
    for parts, rows in mixed_segments(mixes):
        factor = torch.ones(x.shape[1], dtype=torch.float32, device=x.device)
        for slot, weight in parts:
            scale = memory.input(slot, site)
            if scale is not None:
                factor += weight * (scale - 1)
        x[rows] = (x[rows].float() * factor).to(x.dtype)


def change_mixed_outputs_(out: torch.Tensor, site: int, mixes: MixedRows, memory: DeviceMemory) -> None:
    """Rows of `out` [T, width], in place, as mixes change them where nothing is added: of a norm, or before deltas."""
    for parts, rows in mixed_segments(mixes):
        out[rows] = _changed(out[rows].float(), parts, site, memory).to(out.dtype)


def _changed(base: torch.Tensor, parts: Parts, site: int, memory: DeviceMemory) -> torch.Tensor:
    """A new [rows, width]: scales and shifts of all parts on what the base gave."""
    factor: torch.Tensor | None = None
    total = base.clone()
    for slot, weight in parts:
        scale, shift = memory.output(slot, site) or (None, None)
        if scale is not None:
            factor = weight * (scale - 1) + (1 if factor is None else factor)
        if shift is not None:
            total += weight * shift
    return total if factor is None else total + base * (factor - 1)


def _delta(x: torch.Tensor, slot: int, site: int, memory: DeviceMemory) -> torch.Tensor | None:
    """What one adapter adds to the output of rows `x`, float32, as its own output scale leaves it."""
    pair, dense = memory.matrices(slot, site), memory.dense(slot, site)
    if pair is None and dense is None:
        return None
    scale = memory.input(slot, site)
    wide = x.float() if scale is None else (x.float() * scale).to(x.dtype).float()
    if pair is not None:
        a, b = pair
        delta = wide @ a.float().T @ b.float()
    else:
        assert dense is not None
        matrix, scales = dense
        delta = wide @ matrix.float().T
        delta = delta if scales is None else delta * scales
    return _scaled(delta, slot, site, memory)


def _embedded(token_ids: torch.Tensor, slot: int, site: int, memory: DeviceMemory) -> torch.Tensor | None:
    pair, dense = memory.embedding_matrices(slot, site, token_ids), memory.dense(slot, site)
    if pair is not None:
        a, b = pair
        return weighted_sums(b.float(), a.float())
    if dense is None:
        return None
    matrix, scales = dense
    delta = matrix[token_ids].float()
    return delta if scales is None else delta * scales[token_ids, None]


def _scaled(delta: torch.Tensor, slot: int, site: int, memory: DeviceMemory) -> torch.Tensor:
    scale, _ = memory.output(slot, site) or (None, None)
    return delta if scale is None else delta * scale
