"""The low-rank deltas: two products for each tile of rows, at the rank, in the modules and the format of its adapter.

`tables` int64 [members, slots, FIELDS] holds what `device_memory.TableEntry` has: a, b, rank, scales, dtype and sizes.
`tiles` int32 [n, 3]: a slot, or -1 for a tile that is not there; a first place in `order`; how many rows. `order`
int32: rows. `columns` int32 [blocks, 4]: a member, a first column of it, its width, where it begins in the output.
FORMAT is the number of the weights' type there, or -1 where adapters of a step have several. ALIGNED: matrices and
their rows begin at multiples of 16 elements. Of an address out of a table the compiler knows nothing, and would load
weights two bytes at a time. WIDE: products are of float32, of whatever type the numbers are. There is no variant of a
program for any number of rows: it would be compiled while requests wait.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a b; b has to fit into a's type where it is not WIDE."""
    if WIDE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a, b.to(a.dtype), acc)
    return acc


@triton.jit
def _dot_low(low, b, acc, WIDE: tl.constexpr):
    """acc + low b, for `low` in float32: as two parts of 16 bits, of which the second is what the first leaves."""
    if WIDE:
        acc = tl.dot(low, b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        high = low.to(tl.bfloat16)
        rest = (low - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(rest, b.to(tl.bfloat16), tl.dot(high, b.to(tl.bfloat16), acc))
    return acc


@triton.jit
def _matrix(address, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    if FORMAT == 0:
        matrix = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == 1:
        matrix = address.to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == 2:
        matrix = address.to(tl.pointer_type(tl.float16))
    else:
        matrix = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        matrix = tl.multiple_of(matrix, 16)
    return matrix


@triton.jit
def _factors(address, at, is_there):
    """float32 at `address`, one where there is none."""
    return tl.load(address.to(tl.pointer_type(tl.float32)) + at, is_there & (address != 0), other=1.0)


@triton.jit
def _shrink(
    low, x, a, rows, is_row, begin, end, rank, K, stride_x, width,
    WIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    for r0 in range(0, rank, BR):
        r = r0 + tl.arange(0, BR)
        acc = tl.zeros((BM, BR), dtype=tl.float32)
        for k0 in range(begin, end, BK):
            k = k0 + tl.arange(0, BK)
            mine = tl.load(x + rows[:, None] * stride_x + k[None, :], is_row[:, None] & (k[None, :] < end), other=0.0)
            weights = tl.load(
                a + r[:, None].to(tl.int64) * K + k[None, :], (r[:, None] < rank) & (k[None, :] < end), other=0
            )
            acc = _dot(mine, tl.trans(weights), acc, WIDE)
        tl.store(low + tl.arange(0, BM)[:, None] * width + r[None, :], acc, is_row[:, None] & (r[None, :] < rank))


@triton.jit(do_not_specialize=["num_rows"])
def shrink(
    low, x, tables, order, tiles, num_rows, K, stride_x, stride_member, width,
    FIELDS: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """low[split, member, i, r] = x[order[i]] . A[r] over the split's part of K; grid (tiles, members, SPLITS).

    `low` float32 [SPLITS, members, num_rows, width]. Nothing is written for a member without an adapter.
    """
    member, split = tl.program_id(1), tl.program_id(2)
    tile = tiles + tl.program_id(0) * 3
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot >= 0:
        entry = tables + member.to(tl.int64) * stride_member + slot * FIELDS
        rank = tl.load(entry + 2).to(tl.int32)
        if (rank > 0) & (tl.load(entry + 1) != 0):
            i = tl.arange(0, BM)
            rows = tl.load(order + first + i, i < count, other=0).to(tl.int64)
            part = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
            begin = split * part
            end = tl.minimum(begin + part, K)
            place = low + ((split * tl.num_programs(1) + member).to(tl.int64) * num_rows + first) * width
            if FORMAT < 0:
                for each in tl.static_range(4):
                    if tl.load(entry + 4) == each:
                        a = _matrix(tl.load(entry), each, ALIGNED)
                        _shrink(place, x, a, rows, i < count, begin, end, rank, K, stride_x, width, WIDE, BM, BK, BR)
            else:
                a = _matrix(tl.load(entry), FORMAT, ALIGNED)
                _shrink(place, x, a, rows, i < count, begin, end, rank, K, stride_x, width, WIDE, BM, BK, BR)


@triton.jit
def _column_block(columns, ALIGNED: tl.constexpr):
    block = columns + tl.program_id(1) * 4
    member, first, width, begin = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    if ALIGNED:
        first, width, begin = tl.multiple_of(first, 16), tl.multiple_of(width, 16), tl.multiple_of(begin, 16)
    return member, first, width, begin


@triton.jit
def _expand(
    out, low, b, scales, rows, is_row, n, rank, stride_plane, stride_out, width, n_width,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for r0 in range(0, rank, BR):
        r = r0 + tl.arange(0, BR)
        is_low = is_row[:, None] & (r[None, :] < rank)
        place = low + tl.arange(0, BM)[:, None] * width + r[None, :]
        total = tl.load(place, is_low, other=0.0)
        for split in tl.static_range(1, SPLITS):
            total += tl.load(place + split * stride_plane, is_low, other=0.0)
        total *= _factors(scales, r, r < rank)[None, :]
        weights = tl.load(
            b + r[:, None].to(tl.int64) * n_width + n[None, :], (r[:, None] < rank) & (n[None, :] < n_width), other=0
        )
        acc = _dot_low(total, weights, acc, WIDE)
    place = out + rows[:, None] * stride_out + n[None, :]
    is_there = is_row[:, None] & (n[None, :] < n_width)
    given = tl.load(place, is_there, other=0.0)
    tl.store(place, (given.to(tl.float32) + acc).to(given.dtype), is_there)


@triton.jit(do_not_specialize=["num_rows"])
def expand(
    out, low, tables, order, tiles, columns, num_rows, stride_plane, stride_out, stride_member, width,
    FIELDS: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[order[i], columns] += (sum over splits of low[split, member, i]) * scales . B; grid (tiles, blocks)."""
    tile = tiles + tl.program_id(0) * 3
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot >= 0:
        member, first_column, n_width, begin = _column_block(columns, ALIGNED)
        entry = tables + member.to(tl.int64) * stride_member + slot * FIELDS
        rank = tl.load(entry + 2).to(tl.int32)
        if (rank > 0) & (tl.load(entry + 1) != 0):
            i = tl.arange(0, BM)
            rows = tl.load(order + first + i, i < count, other=0).to(tl.int64)
            n = first_column + tl.arange(0, BN)
            place = low + (member.to(tl.int64) * num_rows + first) * width
            scales = tl.load(entry + 3)
            if FORMAT < 0:
                for each in tl.static_range(4):
                    if tl.load(entry + 4) == each:
                        b = _matrix(tl.load(entry + 1), each, ALIGNED)
                        _expand(out + begin, place, b, scales, rows, i < count, n, rank, stride_plane, stride_out,
                                width, n_width, WIDE, BM, BN, BR, SPLITS)  # fmt: skip
            else:
                b = _matrix(tl.load(entry + 1), FORMAT, ALIGNED)
                _expand(out + begin, place, b, scales, rows, i < count, n, rank, stride_plane, stride_out, width,
                        n_width, WIDE, BM, BN, BR, SPLITS)  # fmt: skip


@triton.jit
def _add_dense(
    out, x, matrix, scales, rows, is_row, n, K, stride_x, stride_out, n_width,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mine = tl.load(x + rows[:, None] * stride_x + k[None, :], is_row[:, None] & (k[None, :] < K), other=0.0)
        weights = tl.load(
            matrix + n[:, None].to(tl.int64) * K + k[None, :], (n[:, None] < n_width) & (k[None, :] < K), other=0
        )
        acc = _dot(mine, tl.trans(weights), acc, WIDE)
    acc *= _factors(scales, n, n < n_width)[None, :]
    place = out + rows[:, None] * stride_out + n[None, :]
    is_there = is_row[:, None] & (n[None, :] < n_width)
    given = tl.load(place, is_there, other=0.0)
    tl.store(place, (given.to(tl.float32) + acc).to(given.dtype), is_there)


@triton.jit
def add_dense(
    out, x, tables, order, tiles, columns, K, stride_x, stride_out, stride_member,
    FIELDS: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[order[i], columns] += scales * D x[order[i]], of adapters with whole matrices; grid (tiles, blocks)."""
    tile = tiles + tl.program_id(0) * 3
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot >= 0:
        member, first_column, n_width, begin = _column_block(columns, ALIGNED)
        entry = tables + member.to(tl.int64) * stride_member + slot * FIELDS
        if (tl.load(entry + 2) > 0) & (tl.load(entry + 1) == 0):
            i = tl.arange(0, BM)
            rows = tl.load(order + first + i, i < count, other=0).to(tl.int64)
            n = first_column + tl.arange(0, BN)
            scales = tl.load(entry + 3)
            if FORMAT < 0:
                for each in tl.static_range(4):
                    if tl.load(entry + 4) == each:
                        matrix = _matrix(tl.load(entry), each, ALIGNED)
                        _add_dense(out + begin, x, matrix, scales, rows, i < count, n, K, stride_x, stride_out,
                                   n_width, WIDE, BM, BN, BK)  # fmt: skip
            else:
                matrix = _matrix(tl.load(entry), FORMAT, ALIGNED)
                _add_dense(out + begin, x, matrix, scales, rows, i < count, n, K, stride_x, stride_out,
                           n_width, WIDE, BM, BN, BK)  # fmt: skip


@triton.jit
def change(
    values, tables, order, tiles, columns, stride, stride_member,
    FIELDS: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """values[order[i], columns] = scale * it + shift; grid (tiles, blocks).

    `tables` int64 [members, slots, FIELDS] has `device_memory.OutputEntry`: scale, shift, out.
    """
    tile = tiles + tl.program_id(0) * 3
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot >= 0:
        member, first_column, width, begin = _column_block(columns, ALIGNED)
        entry = tables + member.to(tl.int64) * stride_member + slot * FIELDS
        if tl.load(entry + 2) > 0:
            i = tl.arange(0, BM)
            rows = tl.load(order + first + i, i < count, other=0).to(tl.int64)
            n = first_column + tl.arange(0, BN)
            shift = tl.load(entry + 1)
            place = values + begin + rows[:, None] * stride + n[None, :]
            is_there = (i < count)[:, None] & (n[None, :] < width)
            given = tl.load(place, is_there, other=0.0)
            changed = given.to(tl.float32) * _factors(tl.load(entry), n, n < width)[None, :]
            if shift != 0:
                changed += _factors(shift, n, n < width)[None, :]
            tl.store(place, changed.to(given.dtype), is_there)


@triton.jit
def _embed(
    out, tokens, entry, rows, is_row, n, n_width, scale, stride_out,
    FORMAT: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rank, scales = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3)
    token = tl.load(tokens + rows, is_row, other=0)
    first = _matrix(tl.load(entry), FORMAT, True)
    second = tl.load(entry + 1)
    if second != 0:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        b = _matrix(second, FORMAT, ALIGNED)
        padded = tl.multiple_of(tl.where(rank <= 4, 4, tl.cdiv(rank, 8) * 8), 4)
        for r0 in range(0, rank, BR):
            r = r0 + tl.arange(0, BR)
            is_low = is_row[:, None] & (r[None, :] < padded)
            low = tl.load(first + token[:, None] * padded + r[None, :], is_low, other=0)
            low = tl.where(r[None, :] < rank, low.to(tl.float32), 0.0)
            factors = _factors(scales, r, r < rank)
            weights = tl.load(
                b + r[:, None].to(tl.int64) * n_width + n[None, :], (r[:, None] < rank) & (n[None, :] < n_width),
                other=0,
            )  # fmt: skip
            acc = _dot(low * factors[None, :], weights, acc, True)
    else:
        is_there = is_row[:, None] & (n[None, :] < n_width)
        acc = tl.load(first + token[:, None] * n_width + n[None, :], is_there, other=0).to(tl.float32)
        acc *= _factors(scales, token, is_row)[:, None]
    place = out + rows[:, None] * stride_out + n[None, :]
    is_there = is_row[:, None] & (n[None, :] < n_width)
    given = tl.load(place, is_there, other=0.0)
    tl.store(place, (given.to(tl.float32) + acc * scale).to(given.dtype), is_there)


@triton.jit
def embed(
    out, tokens, tables, order, tiles, n_width, scale, stride_out,
    FIELDS: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[order[i]] += scale * (A[token] * scales) . B, or D[token]; grid (tiles, blocks of BN columns).

    `tokens` int64 [T]; `tables` those of one site, whose A is [vocabulary, padded rank].
    """
    tile = tiles + tl.program_id(0) * 3
    slot, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot >= 0:
        entry = tables + slot * FIELDS
        if tl.load(entry + 2) > 0:
            i = tl.arange(0, BM)
            rows = tl.load(order + first + i, i < count, other=0).to(tl.int64)
            n = tl.program_id(1) * BN + tl.arange(0, BN)
            if FORMAT < 0:
                for each in tl.static_range(4):
                    if tl.load(entry + 4) == each:
                        _embed(out, tokens, entry, rows, i < count, n, n_width, scale, stride_out,
                               each, ALIGNED, BM, BN, BR)  # fmt: skip
            else:
                _embed(out, tokens, entry, rows, i < count, n, n_width, scale, stride_out,
                       FORMAT, ALIGNED, BM, BN, BR)  # fmt: skip
