"""Methods whose deltas have no small factors and are kept whole: LoKr, FourierFT, WaveFT, C3A, SHiRA and their like."""

from typing import Any, Final

import numpy as np

from manylora.lora.format.method import Method, Misfit, Site, product
from manylora.lora.format.spec import BaseLinear, Dense, Floats, LowRank, Made, Output, Term
from manylora.lora.format.tensors import TensorView

__all__ = ["C3A", "FOURIERFT", "FROD", "GLORA", "HIRA", "LOKR", "OSF", "PEANUT", "SHIRA", "SUPERTUNING", "WAVEFT"]


def _lokr(site: Site) -> tuple[Term, ...]:
    """ΔW = W1 ⊗ W2, each whole or a product."""
    inside, outside = site.width
    views: list[tuple[TensorView, ...]] = []
    shapes: list[tuple[int, ...]] = []
    for name in ("lokr_w1", "lokr_w2"):
        if site.has(name):
            views.append((site.part(name, None, None),))
            shapes.append(views[-1][0].shape)
        else:
            left = site.part(f"{name}_a", None, None)
            right = site.part(f"{name}_b", left.shape[1], None)
            views.append((left, right))
            shapes.append((left.shape[0], right.shape[1]))
    rows, columns = (shapes[0][axis] * shapes[1][axis] for axis in (0, 1))
    site.require((rows, columns) == (outside, inside), "lokr_w1", f"Its product is [{rows}, {columns}].")
    scale = np.float32(site.alpha / site.rank)

    def dense(_: object) -> Floats:
        first, second = (
            product(each[0].to_float32(), each[1].to_float32()) if len(each) == 2 else each[0].to_float32()
            for each in views
        )
        return np.kron(first, second) * scale

    return (Dense(Made((outside, inside), dense)),)


LOKR = Method(
    "lokr",
    _lokr,
    parts=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    settings=frozenset({"rank_pattern", "alpha_pattern"}),
    training=frozenset(
        {
            "rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both", "decompose_factor",
            "rank_dropout_scale",
        }
    ),
)  # fmt: skip


def _drawn_places(count: int, size: int, seed: int) -> np.ndarray:
    """The first `count` of a random order of `size` places, as PEFT draws them: by torch's generator."""
    import torch

    found: np.ndarray = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    return found


def _spread(site: Site, name: str) -> Any:
    """The function that puts the trained numbers to their random places: [out, in]."""
    inside, outside = site.width
    spectrum = site.part(name, None)
    site.require(spectrum.numel <= inside * outside, name, "It has more numbers than the module.")
    seed = site.count_of("random_loc_seed", 777, least=0)

    def spread() -> Floats:
        found = np.zeros(outside * inside, dtype=np.float32)
        found[_drawn_places(spectrum.numel, found.size, seed)] = spectrum.to_float32()
        return found.reshape(outside, inside)

    return spread


def _fourierft(site: Site) -> tuple[Term, ...]:
    """ΔW is the real part of the inverse Fourier transform of a few frequencies."""
    (inside, outside), scale = site.width, site.number_of("scaling", 150.0)
    spread = _spread(site, "fourierft_spectrum")
    dense = Made((outside, inside), lambda _: (np.fft.ifft2(spread()).real * scale).astype(np.float32))
    return (Dense(dense),)


FOURIERFT = Method(
    "fourierft",
    _fourierft,
    parts=("fourierft_spectrum",),
    settings=frozenset({"scaling", "random_loc_seed"}),
    training=frozenset({"n_frequency", "n_frequency_pattern"}),
)


def _waveft(site: Site) -> tuple[Term, ...]:
    """ΔW is the inverse wavelet transform of a few coefficients, for Haar's; or they are ΔW's own numbers."""
    (inside, outside), scale = site.width, np.float32(site.number_of("scaling", 25.0))
    spread = _spread(site, "waveft_spectrum")
    if not site.flag("use_idwt", default=True):
        return (Dense(Made((outside, inside), lambda _: spread() * scale)),)
    if site.config.get("wavelet_family", "db1") not in ("db1", "haar"):
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: wavelet_family",
            "Not served: wavelets other than db1. Merge the adapter, or train it with wavelet_family='db1'.",
        )
    site.require(inside % 2 == 0 and outside % 2 == 0, "waveft_spectrum", "Haar's wavelets need even sizes.")

    def dense(_: object) -> Floats:
        found, half = spread(), (outside // 2, inside // 2)
        parts = [found[: half[0], : half[1]], found[: half[0], half[1] :]]
        parts += [found[half[0] :, : half[1]], found[half[0] :, half[1] :]]
        result: Floats = np.empty_like(found)
        for row in (0, 1):
            for column in (0, 1):
                signs = (1, 1 - 2 * row, 1 - 2 * column, (1 - 2 * row) * (1 - 2 * column))
                result[row::2, column::2] = sum(s * part for s, part in zip(signs, parts, strict=True)) / 2
        result *= scale
        return result

    return (Dense(Made((outside, inside), dense)),)


WAVEFT = Method(
    "waveft",
    _waveft,
    parts=("waveft_spectrum",),
    settings=frozenset({"scaling", "random_loc_seed", "use_idwt", "wavelet_family"}),
    training=frozenset({"n_frequency", "n_frequency_pattern", "proportional_parameters"}),
)


def _c3a(site: Site) -> tuple[Term, ...]:
    """ΔW in blocks that are circulant: each row is the one before, moved by one."""
    inside, outside = site.width
    kernel = site.part("c3a_kernel", None, None, None)
    rows, columns, size = kernel.shape
    site.require((rows * size, columns * size) == (outside, inside), "c3a_kernel", "Its blocks do not make the module.")

    def dense(_: object) -> Floats:
        turn = (np.arange(size) - np.arange(size)[:, None]) % size
        blocks = kernel.to_float32()[:, :, turn]  # [rows, columns, size, size]
        return blocks.transpose(0, 2, 1, 3).reshape(outside, inside) / np.float32(inside)

    return (Dense(Made((outside, inside), dense)),)


C3A = Method(
    "c3a",
    _c3a,
    parts=("c3a_kernel",),
    training=frozenset({"block_size", "block_size_pattern"}),
)


def _shira(site: Site) -> tuple[Term, ...]:
    """ΔW has a few numbers, at places that the file names."""
    inside, outside = site.width
    values = site.part("shira_weight", None)
    rows = site.indices("shira_indices", max(outside, inside), 2, values.numel)
    site.require(
        bool((rows[0] < outside).all() and (rows[1] < inside).all()), "shira_indices", "It names other places."
    )

    def dense(_: object) -> Floats:
        found = np.zeros((outside, inside), dtype=np.float32)
        np.add.at(found, (rows[0], rows[1]), values.to_float32())
        return found

    return (Dense(Made((outside, inside), dense)),)


SHIRA = Method(
    "shira", _shira, parts=("shira_weight", "shira_indices"), training=frozenset({"mask_type", "random_seed"})
)


def _supertuning(site: Site) -> tuple[Term, ...]:
    inside, outside = site.width
    values = site.part("supertuning_values", None)
    if not site.has("supertuning_indices"):
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: save_precomputed_indices",
            "Not served: the places are not in the file. Save the adapter with save_precomputed_indices=True.",
        )
    places = site.indices("supertuning_indices", outside * inside, values.numel)

    def dense(_: object) -> Floats:
        found = np.zeros(outside * inside, dtype=np.float32)
        np.add.at(found, places, values.to_float32())
        return found.reshape(outside, inside)

    return (Dense(Made((outside, inside), dense)),)


SUPERTUNING = Method(
    "supertuning",
    _supertuning,
    parts=("supertuning_values", "supertuning_indices"),
    settings=frozenset({"save_precomputed_indices"}),
    training=frozenset({"sparsity", "select_top", "lora_dropout", "lora_alpha"}),
    refused={"r": "a low-rank part beside the sparse one"},
    rank_key="rank",
    alpha_key="lora_alpha",
)


def _hira(site: Site) -> tuple[Term, ...]:
    """ΔW = W ∘ (B A)."""
    (inside, outside), rank = site.width, site.rank
    a, b = site.part("hira_A", rank, inside), site.part("hira_B", outside, rank)
    dense = Made((outside, inside), lambda base: base.weight() * product(b.to_float32(), a.to_float32()))
    return (Dense(dense),)


HIRA = Method(
    "hira",
    _hira,
    parts=("hira_A", "hira_B"),
    settings=frozenset({"rank_pattern"}),
    training=frozenset({"hira_dropout"}),
)

_GLORA_PARTS: Final = ("Xd", "Xu", "X", "zeros")


def _glora_path(site: Site, name: str, *shape: int) -> Any:
    """The function that makes one of GLoRA's five matrices, which may be low rank, a vector, a number or nothing."""
    if site.has(f"{name}.Xd"):
        left = site.part(f"{name}.Xd", shape[0], None)
        right = site.part(f"{name}.Xu", left.shape[1], shape[1])
        return lambda: product(left.to_float32(), right.to_float32())
    if site.has(f"{name}.X"):
        view = site.part(f"{name}.X", *site.parts[f"{name}.X"].shape)
        fits = view.shape == (1,) or view.shape in ((shape[0],), (shape[0], 1))
        site.require(fits, f"{name}.X", f"Its shape is {list(view.shape)}.")
        return lambda: view.to_float32()[0] if view.shape == (1,) else view.to_float32()
    site.part(f"{name}.zeros", *shape)
    return lambda: np.float32(0)


def _glora(site: Site) -> tuple[Term, ...]:
    """W (1 + A) + B, and with a bias of the base: bias (1 + D) + E + W C."""
    inside, outside = site.width
    a, b = (_glora_path(site, f"glora_{name}", outside, inside) for name in "AB")
    c = _glora_path(site, "glora_C", inside, 1)
    d, e = (_glora_path(site, f"glora_{name}", outside) for name in "DE")

    def shift(base: BaseLinear) -> Floats:
        found = np.zeros(outside, dtype=np.float32)
        if base.bias is None:
            return found
        column = np.broadcast_to(c(), (inside, 1))
        found += base.bias * d() + e() + product(base.weight(), column)[:, 0]
        return found

    dense = Made((outside, inside), lambda base: base.weight() * a() + np.broadcast_to(b(), (outside, inside)))
    return (Dense(dense), Output(shift=Made((outside,), shift)))


GLORA = Method(
    "glora",
    _glora,
    parts=tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in _GLORA_PARTS),
    training=frozenset({"config_A_B", "config_C", "config_D_E"}),
)


def _peanut(site: Site) -> tuple[Term, ...]:
    """ΔW = (B f(A W))ᵀ, a small network of the base's weight."""
    (inside, outside), rank = site.width, site.rank
    a, b = site.part("peanut_A.weight", rank, outside), site.part("peanut_B.weight", outside, rank)
    scale = np.float32(site.number_of("scaling", 1.0))
    if site.count_of("depth", 0, least=0):
        raise Misfit(
            "unsupported_feature", "adapter_config.json: depth", "Not served: more than one layer. Merge the adapter."
        )
    site.choice("act_fn", "relu", ("relu",))

    def right(base: BaseLinear) -> Floats:
        found: Floats = np.maximum(product(a.to_float32(), base.weight()), 0)
        return found

    return (LowRank(rank, float(scale), Made((rank, inside), right), b),)


PEANUT = Method(
    "peanut",
    _peanut,
    parts=("peanut_A.weight", "peanut_B.weight"),
    settings=frozenset({"depth", "act_fn", "scaling"}),
)


def _osf(site: Site) -> tuple[Term, ...]:
    """What the smallest singular values and their vectors were trained to, in place of the base's."""
    inside, outside = site.width
    s = site.part("osf_svd_params.S_low", None)
    rank = s.numel
    u, v = site.part("osf_svd_params.U_low", outside, rank), site.part("osf_svd_params.V_low", rank, inside)
    site.require(rank <= min(inside, outside), "osf_svd_params.S_low", "It has more values than the module.")

    def dense(base: BaseLinear) -> Floats:
        left, values, right = np.linalg.svd(base.weight(), full_matrices=False)
        before = product(left[:, -rank:] * values[-rank:], right[-rank:])
        return product(u.to_float32() * s.to_float32(), v.to_float32()) - before

    return (Dense(Made((outside, inside), dense)),)


OSF = Method(
    "osf",
    _osf,
    parts=tuple(f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low")),
    training=frozenset({"effective_rank", "rank_pattern", "target_svd_config"}),
)


def _frod(site: Site) -> tuple[Term, ...]:
    """U (S + L) Vᵀ in place of W = U L Vᵀ, with V of all modules of one name and S sparse."""
    inside, outside = site.width
    category = "_".join(site.spec.path.split(".")[-2:])
    if f"frod_V.{category}" not in site.shared:
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: save_projection",
            "Not served: the projections are not in the file. Save the adapter with save_projection=True.",
        )
    v = site.common(f"frod_V.{category}", inside, inside)
    values = site.part("frod_lambda_s_values", None)
    diagonal = site.part("frod_lambda_l", inside)
    places = np.frombuffer(site.common(f"frod_s_indices.{category}", 2, values.numel).data, dtype="<i8")
    rows, columns = places.reshape(2, -1)
    within = bool(((rows >= 0) & (rows < inside) & (columns >= 0) & (columns < inside)).all())
    site.require(within, "frod_lambda_s_values", "Its places are beyond the module.")

    def dense(base: BaseLinear) -> Floats:
        right, weight = v.to_float32().astype(np.float64), base.weight().astype(np.float64)
        try:
            both = np.linalg.solve(right, weight.T).T
        except np.linalg.LinAlgError:
            both = weight @ np.linalg.pinv(right, rcond=1e-6).T
        lengths = np.linalg.norm(both, axis=0)
        left = np.divide(both, lengths, out=np.zeros_like(both), where=lengths > 1e-12).astype(np.float32)
        middle = np.diag(diagonal.to_float32())
        np.add.at(middle, (rows, columns), values.to_float32())
        return product(product(left, middle), v.to_float32().T) - base.weight()

    return (Dense(Made((outside, inside), dense)),)


FROD = Method(
    "frod",
    _frod,
    parts=("frod_lambda_l", "frod_lambda_s_values"),
    shared=("frod_V", "frod_s_indices", "frod_s_size"),
    training=frozenset(
        {
            "projection_prng_key", "save_projection", "frod_dropout", "sparse_rate", "regularization_alpha",
            "progressbar", "runtime_offload_base_weight",
        }
    ),
)  # fmt: skip
