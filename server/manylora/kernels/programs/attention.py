"""Paged attention over the cache as it lies: [blocks, kv heads, block size, width].

A program is a few queries of one sequence, times the heads of one kv head, against one part of the keys that they see.
`items` int32 [n, 2]: a sequence, or -1, and the first of its queries in this step. A sequence's own length alone says
how its keys are cut into parts, so a row is the same to the last bit whatever is beside it.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a b. WIDE: in float32; else in b's type."""
    if WIDE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a.to(b.dtype), b, acc)
    return acc


@triton.jit
def _seen(lowest, length, window, chunk, BQ: tl.constexpr, BN: tl.constexpr):
    """The keys that any of BQ queries from position `lowest` on sees: where they begin, at a whole block, and end."""
    begin = tl.where(window > 0, tl.maximum(lowest - window + 1, 0), 0)
    begin = tl.where(chunk > 0, tl.maximum(begin, lowest // tl.maximum(chunk, 1) * chunk), begin)
    return begin // BN * BN, tl.minimum(lowest + BQ, length)


@triton.jit
def _part(begin, end, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """How many of the keys from `begin` to `end` are one part: LEAST, or what makes SPLITS parts of them."""
    return tl.maximum(LEAST, tl.cdiv(tl.cdiv(end - begin, SPLITS), BN) * BN)


@triton.jit
def _scores(
    mine, k, j, position, stop, head, is_row, slopes, scale, window, softcap, chunk,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[BM, BN], -inf where a key is not seen."""
    scores = _dot(mine, tl.trans(k), tl.zeros((BM, BN), dtype=tl.float32), WIDE) * scale
    if HAS_CAP:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    if HAS_SLOPES:
        ahead = (j[None, :] - position[:, None]).to(tl.float32)
        scores += ahead * tl.load(slopes + head, is_row, other=0.0)[:, None]
    is_seen = (j[None, :] <= position[:, None]) & (j[None, :] < stop)
    is_seen &= (window <= 0) | (j[None, :] > position[:, None] - window)
    is_seen &= (chunk <= 0) | (j[None, :] >= (position // tl.maximum(chunk, 1) * chunk)[:, None])
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def attend(
    out, weights, q, keys, values, tables, items, starts, lens, sinks, slopes,
    num_rows, heads, group, stride_q, stride_q_head, stride_table, stride_block, stride_head, stride_value_block,
    stride_value_head, scale, window, softcap, chunk,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, GP: tl.constexpr,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SLOPES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One part of the keys; grid (items, kv heads, SPLITS). See `reference.attention`.

    `q` [T, heads, D]. Of one part, `out` [T, heads, E] is the result. Of several it is float32 [parts, num_rows, heads,
    E] of the first rows, and `weights` [parts, num_rows, heads, 2] has each part's largest score and sum for `combine`.
    """
    item, kv, split = items + 2 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, first = tl.load(item).to(tl.int64), tl.load(item + 1)
    if s >= 0:
        start, length = tl.load(starts + s), tl.load(lens + s)
        count = tl.load(starts + s + 1) - start
        m = tl.arange(0, BM)
        query, head = first + m // GP, kv * group + m % GP
        is_row = (query < count) & (m % GP < group) & (m // GP < BQ)
        position = length - count + query
        begin, end = _seen(length - count + first, length, window, chunk, BQ, BN)
        part = _part(begin, end, BN, SPLITS, LEAST)
        begin += split * part
        stop = tl.minimum(begin + part, end)
        if begin < stop:
            row = (start + query).to(tl.int64)
            d, e = tl.arange(0, DP), tl.arange(0, EP)
            place = q + row[:, None] * stride_q + head[:, None] * stride_q_head + d[None, :]
            mine = tl.load(place, is_row[:, None] & (d[None, :] < D), other=0.0)
            best = tl.full((BM,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BM,), dtype=tl.float32)
            acc = tl.zeros((BM, EP), dtype=tl.float32)
            for j0 in range(begin, stop, BN):
                j = j0 + tl.arange(0, BN)
                block = tl.load(tables + s * stride_table + j // BLOCK, j < stop, other=0).to(tl.int64)
                at = block * stride_block + kv * stride_head + (j % BLOCK) * D
                k = tl.load(keys + at[:, None] + d[None, :], (j[:, None] < stop) & (d[None, :] < D), other=0.0)
                scores = _scores(mine, k, j, position, stop, head, is_row, slopes, scale, window, softcap, chunk,
                                 HAS_CAP, HAS_SLOPES, WIDE, BM, BN)  # fmt: skip
                higher = tl.maximum(best, tl.max(scores, axis=1))
                safe = tl.where(higher == float("-inf"), 0.0, higher)
                kept = tl.exp(best - safe)
                p = tl.exp(scores - safe[:, None])
                total = total * kept + tl.sum(p, axis=1)
                at = block * stride_value_block + kv * stride_value_head + (j % BLOCK) * E
                v = tl.load(values + at[:, None] + e[None, :], (j[:, None] < stop) & (e[None, :] < E), other=0.0)
                acc = _dot(p, v, acc * kept[:, None], WIDE)
                best = higher
            line = (split.to(tl.int64) * num_rows + row) * heads + head
            if SPLITS == 1:
                if HAS_SINKS:
                    total += tl.exp(tl.load(sinks + head, is_row, other=0.0) - best)
                acc = acc / total[:, None]
            else:
                tl.store(weights + line * 2, best, is_row)
                tl.store(weights + line * 2 + 1, total, is_row)
            to = out + line[:, None] * E + e[None, :]
            tl.store(to, acc.to(out.dtype.element_ty), is_row[:, None] & (e[None, :] < E))


@triton.jit(do_not_specialize=["num_rows"])
def combine(
    out, parts, weights, items, starts, lens, sinks, num_rows, heads, window, chunk,
    E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """What the parts of `attend` come to, of sequences with one query each; grid (items, heads)."""
    s, head = tl.load(items + 2 * tl.program_id(0)).to(tl.int64), tl.program_id(1)
    if s >= 0:
        row, length = tl.load(starts + s).to(tl.int64), tl.load(lens + s)
        begin, end = _seen(length - 1, length, window, chunk, 1, BN)
        split, e = tl.arange(0, SPLITS), tl.arange(0, EP)
        is_there = split * _part(begin, end, BN, SPLITS, LEAST) < end - begin
        line = (split.to(tl.int64) * num_rows + row) * heads + head
        best = tl.load(weights + line * 2, is_there, other=float("-inf"))
        highest = tl.max(best, axis=0)
        shares = tl.exp(best - highest)
        total = tl.sum(shares * tl.load(weights + line * 2 + 1, is_there, other=0.0), axis=0)
        if HAS_SINKS:
            total += tl.exp(tl.load(sinks + head) - highest)
        held = tl.load(parts + line[:, None] * E + e[None, :], is_there[:, None] & (e[None, :] < E), other=0.0)
        found = tl.sum(held * shares[:, None], axis=0) / total
        tl.store(out + (row * heads + head) * E + e, found.to(out.dtype.element_ty), e < E)


@triton.jit
def write_kv(
    k, v, keys, values, slots, stride_k, stride_k_head, stride_v, stride_v_head,
    stride_block, stride_head, stride_value_block, stride_value_head,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Each token's key and value to their place, bit for bit; grid (T, kv heads). None for a negative slot."""
    t, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + t)
    if slot >= 0:
        block, at = slot // BLOCK, slot % BLOCK
        d, e = tl.arange(0, DP), tl.arange(0, EP)
        key = tl.load(k + t * stride_k + kv * stride_k_head + d, d < D)
        tl.store(keys + block * stride_block + kv * stride_head + at * D + d, key, d < D)
        value = tl.load(v + t * stride_v + kv * stride_v_head + e, e < E)
        tl.store(values + block * stride_value_block + kv * stride_value_head + at * E + e, value, e < E)
