"""Methods that multiply the base's weight: OFT, BOFT, HRA, DEFT, RoAd. What they add is made with the served base."""

from typing import Final

import numpy as np

from manylora.lora.format.method import Method, Misfit, Site, product
from manylora.lora.format.spec import BaseLinear, Dense, Floats, LowRank, Made, Output, Term
from manylora.lora.format.tensors import TensorView

__all__ = ["BOFT", "DEFT", "HRA", "OFT", "ROAD"]

MAX_NEUMANN_TERMS: Final = 64  # of a series whose parts shrink or whose sum says nothing


def _cayley(skew: Floats) -> Floats:
    """(1 - Q) (1 + Q)^-1 for each Q of [blocks, n, n]."""
    unit = np.eye(skew.shape[-1], dtype=np.float64)
    wide = skew.astype(np.float64)
    found: Floats = np.linalg.solve((unit + wide).transpose(0, 2, 1), (unit - wide).transpose(0, 2, 1))
    return found.transpose(0, 2, 1).astype(np.float32)


def _neumann(skew: Floats, terms: int) -> Floats:
    """(1 - Q) (1 + Q)^-1 by the first terms of its series."""
    found = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape).copy()
    if terms > 1:
        found += 2 * skew
    if terms > 2:
        power = product(skew, skew)
        found += 2 * power
        for _ in range(3, terms - 1):
            power = product(power, skew)
            found += 2 * power
        found += product(power, skew)
    return found


def _turned(weight: Floats, blocks: Floats) -> Floats:
    """`weight` [out, in] times the transposed block-diagonal matrix of `blocks` [num, n, n]."""
    num, n, _ = blocks.shape
    pieces = weight.reshape(len(weight), num, n).transpose(1, 0, 2)
    return product(pieces, blocks.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(weight.shape)


def _oft(site: Site) -> tuple[Term, ...]:
    """W Rᵀ, R being orthogonal in blocks along the inputs."""
    inside, outside = site.width
    vectors = site.part("oft_R.weight", None, None)
    num, size = vectors.shape
    n = (1 + int(np.sqrt(1 + 8 * size))) // 2
    count = inside // n if n else 0
    site.require(
        n * (n - 1) // 2 == size and count * n == inside and num in (1, count), "oft_R.weight", "Its blocks do not fit."
    )
    constrained, eps = site.flag("coft", default=False), site.number_of("eps", 6e-5)
    by_series, terms = site.flag("use_cayley_neumann", default=True), site.count_of("num_cayley_neumann_terms", 5)
    if terms > MAX_NEUMANN_TERMS:
        where = "adapter_config.json: num_cayley_neumann_terms"
        raise Misfit("bad_config", where, f"At most {MAX_NEUMANN_TERMS} are computed.")

    def dense(base: BaseLinear) -> Floats:
        skew = np.zeros((num, n, n), dtype=np.float32)
        rows, columns = np.triu_indices(n, 1)
        skew[:, rows, columns] = vectors.to_float32()
        skew -= skew.transpose(0, 2, 1)
        if constrained:
            most = np.float32(eps / np.sqrt(num))
            lengths = np.sqrt((skew * skew).sum(axis=(1, 2), keepdims=True))
            skew = np.where(lengths <= most, skew, most * skew / np.where(lengths > 0, lengths, 1))
        blocks = _neumann(skew, terms) if by_series else _cayley(skew)
        weight = base.weight()
        return _turned(weight, np.broadcast_to(blocks, (count, n, n))) - weight

    return (Dense(Made((outside, inside), dense)),)


OFT = Method(
    "oft",
    _oft,
    parts=("oft_R.weight",),
    settings=frozenset({"coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"}),
    training=frozenset({"oft_block_size", "block_share", "module_dropout"}),
)


def _boft(site: Site) -> tuple[Term, ...]:
    """diag(s) W Rᵀ, with one factor of R."""
    inside, outside = site.width
    blocks, scale = site.part("boft_R", None, None, None, None), site.part("boft_s", outside, 1)
    factors, num, n, width = blocks.shape
    if factors != 1:
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: boft_n_butterfly_factor",
            "Not served: more than one butterfly factor, which PEFT computes on CUDA alone. Merge the adapter.",
        )
    site.require(n == width and num * n == inside, "boft_R", "Its blocks do not fit.")

    def dense(base: BaseLinear) -> Floats:
        data = blocks.to_float32()[0]
        weight = base.weight()
        turned = _turned(weight, _cayley(np.float32(0.5) * (data - data.transpose(0, 2, 1))))
        return turned * scale.to_float32() - weight

    return (Dense(Made((outside, inside), dense)),)


BOFT = Method(
    "boft",
    _boft,
    parts=("boft_R", "boft_s"),
    training=frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}),
)


def _hra(site: Site) -> tuple[Term, ...]:
    """W times r reflections: W - W Y Vᵀ, of rank r."""
    (inside, outside), rank = site.width, site.rank
    u, orthogonal = site.part("hra_u", inside, rank), site.flag("apply_GS", default=False)
    right = Made((rank, inside), lambda _: _reflections(u, is_orthogonal=orthogonal)[0])
    left = Made((outside, rank), lambda base: -base.project(_reflections(u, is_orthogonal=orthogonal)[1]).T)
    return (LowRank(rank, 1.0, right, left),)


def _reflections(u: TensorView, *, is_orthogonal: bool) -> tuple[Floats, Floats]:
    """V and Y, [rank, in] each, of which 1 - Yᵀ V is the product of the reflections by the columns of u, in order."""
    vectors = u.to_float32().T.astype(np.float64)
    rows = np.zeros_like(vectors)
    others = np.zeros_like(vectors)
    for k, vector in enumerate(vectors):
        along = vector
        if is_orthogonal:
            for before in rows[:k]:
                along = along - (before @ along) * before
        length = np.linalg.norm(along)
        rows[k] = along / (length if length > 0 else 1)
        others[k] = 2 * (rows[k] if is_orthogonal else rows[k] - others[:k].T @ (rows[:k] @ rows[k]))
    return rows.astype(np.float32), others.astype(np.float32)


HRA = Method("hra", _hra, parts=("hra_u",), settings=frozenset({"apply_GS"}))


def _deft(site: Site) -> tuple[Term, ...]:
    """W - P Qᵀ W + P R: of rank r."""
    (inside, outside) = site.width
    rank = min(site.rank, outside)
    p = site.part("deft_P", outside, rank)
    r = None if site.flag("para", default=False) else site.part("deft_R", rank, inside)
    method = site.choice("decomposition_method", "relu", ("relu", "qr"))
    alpha = site.number_of("alpha", 0.0)
    scale = np.float32(alpha / rank if alpha else 1.0)

    def factors() -> tuple[Floats, Floats]:
        whole = p.to_float32()
        if method == "relu":
            return whole, np.maximum(whole, 0)
        q = np.linalg.qr(whole)[0]
        return q, q

    def right(base: BaseLinear) -> Floats:
        before = product(factors()[1].T, base.weight())
        return -before if r is None else r.to_float32() * scale - before

    return (LowRank(rank, 1.0, Made((rank, inside), right), Made((outside, rank), lambda _: factors()[0])),)


DEFT = Method(
    "deft",
    _deft,
    parts=("deft_P", "deft_R"),
    settings=frozenset({"decomposition_method", "para", "alpha"}),
    training=frozenset({"init_scale", "deft_dropout"}),
)


def _road(site: Site) -> tuple[Term, ...]:
    """M (W x + bias), where M turns the outputs in pairs."""
    (inside, outside), size = site.width, site.count_of("group_size", 64)
    variant = site.choice("variant", "road_1", ("road_1", "road_2", "road_4"))
    numbers = {"road_1": outside // 2, "road_2": outside, "road_4": 2 * outside}[variant]
    theta, alpha = site.part("road_theta", numbers), site.part("road_alpha", numbers)
    site.require(size % 2 == 0 and outside % size == 0, "road_theta", f"Groups of {size} do not divide the outputs.")

    def turn(rows: Floats) -> Floats:
        """M - 1 times `rows` [out, n]."""
        first, second = _road_columns(variant, size, theta.to_float32(), alpha.to_float32())
        halves = rows.reshape(-1, 2, size // 2, rows.shape[1])
        swapped = np.stack((-halves[:, 1], halves[:, 0]), axis=1).reshape(rows.shape)
        return (first[:, None] - 1) * rows + second[:, None] * swapped

    def shift(base: BaseLinear) -> Floats:
        return np.zeros(outside, np.float32) if base.bias is None else turn(base.bias[:, None])[:, 0]

    return (Dense(Made((outside, inside), lambda base: turn(base.weight()))), Output(shift=Made((outside,), shift)))


def _road_columns(variant: str, size: int, theta: Floats, alpha: Floats) -> tuple[Floats, Floats]:
    """What each output and its partner are multiplied by: [out] each."""
    if variant == "road_1":
        theta, alpha = (each.reshape(-1, size // 2).repeat(2, axis=0).ravel() for each in (theta, alpha))
    if variant != "road_4":
        return alpha * np.cos(theta), alpha * np.sin(theta)
    angles, factors = (each.reshape(-1, 2, size) for each in (theta, alpha))
    first = factors[:, 0] * np.cos(angles[:, 0])
    return first.ravel(), (factors[:, 1] * np.sin(angles[:, 1])).ravel()


ROAD = Method("road", _road, parts=("road_theta", "road_alpha"), settings=frozenset({"variant", "group_size"}))
