"""Methods whose deltas come out low rank, by their tensors alone: AdaLoRA, LoHa, VeRA, VB-LoRA, MiSS and their like."""

from typing import Final

import numpy as np

from manylora.lora.format.method import Method, Misfit, Site, product
from manylora.lora.format.spec import Dense, Floats, LowRank, Made, Term
from manylora.lora.format.tensors import TensorView

__all__ = ["ADALORA", "DELORA", "GRALORA", "LOHA", "MISS", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA"]

_LORA_ONLY: Final = {
    "alora_invocation_tokens": "AdaLoRA has no invocation tokens",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "it builds another base out of repeated layers",
    "lora_bias": "AdaLoRA has no bias on B",
    "megatron_config": "Megatron's parallel layers are not served",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "AdaLoRA adapts modules",
    "trainable_token_indices": "AdaLoRA does not train tokens",
    "use_bdlora": "block-diagonal LoRA has another layout",
    "use_dora": "AdaLoRA is not DoRA",
    "use_qalora": "QALoRA pools its input in groups",
}


def _adalora(site: Site) -> tuple[Term, ...]:
    """ΔW = B (E ∘ A), of the ranks that are left."""
    inside, outside = site.width
    b = site.part("lora_B", outside, None)
    rank = b.shape[1]
    a, e = site.part("lora_A", rank, inside), site.part("lora_E", rank, 1)
    alpha = site.alpha if site.alpha > 0 else float(rank)
    scaled = Made((rank, inside), lambda _: a.to_float32() * e.to_float32())
    return (LowRank(rank, alpha / (rank + 1e-5), scaled, b),)


ADALORA = Method(
    "adalora",
    _adalora,
    parts=("lora_A", "lora_B", "lora_E"),
    training=frozenset(
        {
            "alpha_pattern", "beta1", "beta2", "corda_config", "deltaT", "eva_config", "init_lora_weights", "init_r",
            "ensure_weight_tying", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "orth_reg_weight",
            "qalora_group_size", "r", "runtime_config", "target_r", "tfinal", "tinit", "total_step", "use_rslora",
            "velora_config", "rank_pattern",
        }
    ),
    refused=_LORA_ONLY,
    alpha_key="lora_alpha",
)  # fmt: skip


def _loha(site: Site) -> tuple[Term, ...]:
    """ΔW = (W1a W1b) ∘ (W2a W2b): of rank r² at most, as a product of the factors' columns and rows in pairs."""
    (inside, outside), rank = site.width, site.rank
    lefts = [site.part(f"hada_w{n}_a", outside, rank) for n in (1, 2)]
    rights = [site.part(f"hada_w{n}_b", rank, inside) for n in (1, 2)]
    scale = np.float32(site.alpha / rank)
    if rank * rank * (inside + outside) < inside * outside:

        def pairs(first: Floats, second: Floats) -> Floats:
            return (first[:, :, None] * second[:, None, :]).reshape(len(first), rank * rank)

        a = Made((rank * rank, inside), lambda _: pairs(*(each.to_float32().T for each in rights)).T)
        b = Made((outside, rank * rank), lambda _: pairs(*(each.to_float32() for each in lefts)))
        return (LowRank(rank * rank, float(scale), a, b),)

    def dense(_: object) -> Floats:
        first, second = (
            product(left.to_float32(), right.to_float32()) for left, right in zip(lefts, rights, strict=True)
        )
        return first * second * scale

    return (Dense(Made((outside, inside), dense)),)


LOHA = Method(
    "loha",
    _loha,
    parts=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    settings=frozenset({"rank_pattern", "alpha_pattern"}),
    training=frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"}),
)


def _projected(site: Site, prefix: str, rows: int) -> tuple[LowRank]:
    """ΔW = diag(b) B diag(d) A, with A and B of the whole adapter; of A and d the first ranks count."""
    (inside, outside), rank = site.width, site.rank
    if f"{prefix}_A" not in site.shared or f"{prefix}_B" not in site.shared:
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: save_projection",
            "Not served: the random projections are not in the file, and depend on the machine that trained it. Save "
            "the adapter with save_projection=True.",
        )
    a, b = site.common(f"{prefix}_A", rows, None), site.common(f"{prefix}_B", None, rank)
    d, diagonal = site.part(f"{prefix}_lambda_d", rows), site.part(f"{prefix}_lambda_b", outside)
    site.require(a.shape[1] >= inside and b.shape[0] >= outside, f"{prefix}_lambda_b", "A and B are too small for it.")
    return (
        LowRank(
            rank,
            1.0,
            Made((rank, inside), lambda _: d.to_float32()[:rank, None] * a.to_float32()[:rank, :inside]),
            Made((outside, rank), lambda _: diagonal.to_float32()[:, None] * b.to_float32()[:outside]),
        ),
    )


VERA = Method(
    "vera",
    lambda site: _projected(site, "vera", site.rank),
    parts=("vera_lambda_b", "vera_lambda_d"),
    shared=("vera_A", "vera_B"),
    settings=frozenset({"save_projection"}),
    training=frozenset({"d_initial", "projection_prng_key", "vera_dropout"}),
)
PVERA = Method(
    "pvera",
    lambda site: _projected(site, "pvera", 2 * site.rank),
    parts=("pvera_lambda_b", "pvera_lambda_d"),
    shared=("pvera_A", "pvera_B"),
    settings=frozenset({"save_projection"}),
    training=frozenset({"d_initial", "projection_prng_key", "pvera_dropout", "generator_seed"}),
    refused={"sample_at_inference": "it draws its weights anew for each token; set sample_at_inference=False"},
)


def _vblora(site: Site) -> tuple[Term, ...]:
    """A and B whose pieces are mixtures of a few vectors of one bank."""
    (inside, outside), rank = site.width, site.rank
    bank = site.common("vblora_vector_bank", None, None)
    count, length = bank.shape
    topk = site.count_of("topk", 2)
    site.require(
        inside % length == 0 and outside % length == 0 and topk <= count,
        "vblora_logits_A",
        f"Vectors of {length} numbers do not divide the module, or fewer are there than topk.",
    )
    shapes = {"A": (rank, inside // length), "B": (outside // length, rank)}
    if not site.has("vblora_logits_A"):
        for side, shape in shapes.items():
            site.indices(f"vblora_logits_{side}_topk_indices", count, *shape, topk)
            site.part(f"vblora_logits_{side}_topk_weights", *shape, topk - 1)
    else:
        for side, shape in shapes.items():
            site.part(f"vblora_logits_{side}", *shape, count)

    def pieces(side: str) -> Floats:
        """[.., .., length]"""
        if site.has("vblora_logits_A"):
            logits = site.parts[f"vblora_logits_{side}"].to_float32()
            chosen = np.argpartition(-logits, topk - 1, axis=-1)[..., :topk]
            largest = np.take_along_axis(logits, chosen, axis=-1)
            weights = np.exp(largest - largest.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
        else:
            chosen = site.indices(f"vblora_logits_{side}_topk_indices", count, *shapes[side], topk)
            first = site.parts[f"vblora_logits_{side}_topk_weights"].to_float32()
            weights = np.concatenate((first, 1 - first.sum(axis=-1, keepdims=True)), axis=-1)
        found: Floats = (weights[..., None] * bank.to_float32()[chosen]).sum(axis=-2)
        return found

    a = Made((rank, inside), lambda _: pieces("A").reshape(rank, inside))
    b = Made((outside, rank), lambda _: pieces("B").transpose(0, 2, 1).reshape(outside, rank))
    return (LowRank(rank, 1.0, a, b),)


VBLORA = Method(
    "vblora",
    _vblora,
    parts=tuple(
        f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_weights", "_topk_indices")
    ),
    shared=("vblora_vector_bank",),
    settings=frozenset({"topk"}),
    training=frozenset(
        {
            "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound",
            "init_logits_std",
        }
    ),
)  # fmt: skip


def _unilora(site: Site) -> tuple[Term, ...]:
    """A and B whose numbers are those of one short vector, at random places and scaled."""
    (inside, outside), rank = site.width, site.rank
    theta = site.common("unilora_theta_d", None)
    if not site.has("unilora_indices_A"):
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: save_indices",
            "Not served: the random places are not in the file, and depend on the order in which PEFT drew them. Save "
            "the adapter with save_indices=True.",
        )
    shapes = {"A": (rank, inside), "B": (outside, rank)}
    for side, shape in shapes.items():
        site.indices(f"unilora_indices_{side}", theta.numel, *shape)
        site.part(f"unilora_scales_{side}", *shape)

    def matrix(side: str) -> Floats:
        places = site.indices(f"unilora_indices_{side}", theta.numel, *shapes[side])
        found: Floats = theta.to_float32()[places] * site.parts[f"unilora_scales_{side}"].to_float32()
        return found

    return (LowRank(rank, 1.0, Made(shapes["A"], lambda _: matrix("A")), Made(shapes["B"], lambda _: matrix("B"))),)


UNILORA = Method(
    "unilora",
    _unilora,
    parts=tuple(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB"),
    shared=("unilora_theta_d",),
    settings=frozenset({"save_indices"}),
    training=frozenset({"proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound"}),
)


def _tinylora(site: Site) -> tuple[Term, ...]:
    """ΔW = B R A, R being a sum of fixed matrices with weights that groups of modules share."""
    inside, outside = site.width
    if not site.has("tinylora_A"):
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: save_projection",
            "Not served: the projections are not in the file. Save the adapter with save_projection=True.",
        )
    a = site.part("tinylora_A", None, inside)
    rank = a.shape[0]
    b, p = site.part("tinylora_B", outside, rank), site.part("tinylora_P", None, rank, rank)
    tying = site.number_of("weight_tying", 0.0)
    num_groups = max(1, round(site.count * (1.0 - min(max(tying, 0.0), 1.0))))
    group = min(site.number // max(1, site.count // num_groups), num_groups - 1)
    v = site.common(f"tinylora_v.{group}", p.shape[0])

    def left(_: object) -> Floats:
        mixed = np.einsum("i,ijk->jk", v.to_float32(), p.to_float32())
        return product(b.to_float32(), mixed)

    return (LowRank(rank, 1.0, a, Made((outside, rank), left)),)


TINYLORA = Method(
    "tinylora",
    _tinylora,
    parts=("tinylora_A", "tinylora_B", "tinylora_P"),
    shared=("tinylora_v",),
    settings=frozenset({"weight_tying", "save_projection"}),
    training=frozenset({"u", "projection_seed", "init_v_bound", "tinylora_dropout"}),
)


def _delora(site: Site) -> tuple[Term, ...]:
    """ΔW = λ/r B' A' diag(w), with the rows of A' and the columns of B' of length one and w the base's norms."""
    (inside, outside), rank = site.width, site.rank
    a, b = site.part("delora_A", rank, inside), site.part("delora_B", outside, rank)
    strength, norms = site.part("delora_lambda", 1), site.part("delora_w_norm", inside)

    def right(_: object) -> Floats:
        rows, columns = a.to_float32(), b.to_float32()
        lengths = np.maximum(np.linalg.norm(rows, axis=1), 1e-4) * np.maximum(np.linalg.norm(columns, axis=0), 1e-4)
        factor = strength.to_float32()[0] / rank / lengths
        found: Floats = (rows * factor[:, None] * norms.to_float32()).astype(np.float32)
        return found

    return (LowRank(rank, 1.0, Made((rank, inside), right), b),)


DELORA = Method(
    "delora",
    _delora,
    parts=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    settings=frozenset({"rank_pattern"}),
    training=frozenset({"delora_lambda", "module_dropout", "lambda_pattern"}),
)


def _gralora(site: Site) -> tuple[Term, ...]:
    """ΔW in k times k blocks, each of a low rank of its own; and perhaps one of low rank over all."""
    (inside, outside), rank = site.width, site.rank
    k, general = site.count_of("gralora_k", 2), site.count_of("hybrid_r", 0, least=0)
    site.require(
        inside % k == 0 and outside % k == 0 and rank % k == 0, "gralora_A", f"It is not divisible by gralora_k, {k}."
    )
    a, b = site.part("gralora_A", k, inside // k, rank), site.part("gralora_B", k, rank, outside // k)
    more: tuple[TensorView, ...] = ()
    if general:
        more = (
            site.part("gralora_A_general.weight", general, inside),
            site.part("gralora_B_general.weight", outside, general),
        )
    total, sub = k * rank + general, rank // k

    def right(_: object) -> Floats:
        found = np.zeros((k, k, sub, k, inside // k), dtype=np.float32)  # block of outputs, of inputs, rank; inputs
        blocks = a.to_float32().reshape(k, inside // k, k, sub)
        for n in range(k):
            found[:, n, :, n] = blocks[n].transpose(1, 2, 0)
        rows = found.reshape(k * rank, inside)
        return rows if not more else np.concatenate((rows, more[0].to_float32()))

    def left(_: object) -> Floats:
        found = np.zeros((k, rank, k, outside // k), dtype=np.float32)
        for j in range(k):
            found[j, :, j] = b.to_float32()[j]
        columns = found.reshape(k * rank, outside).T
        return columns if not more else np.concatenate((columns, more[1].to_float32()), axis=1)

    scale = site.alpha / (rank + general)
    return (LowRank(total, scale, Made((total, inside), right), Made((outside, total), left)),)


GRALORA = Method(
    "gralora",
    _gralora,
    parts=("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    settings=frozenset({"gralora_k", "hybrid_r"}),
    training=frozenset({"gralora_dropout"}),
)


def _miss(site: Site) -> tuple[Term, ...]:
    """Inputs are summed in groups of r and multiplied by one block; "bat" multiplies the base's blocks as well."""
    (inside, outside), init = site.width, site.config.get("init_weights")
    if init == "bat":
        block = site.part("miss_block", None, None, None)
        r = block.shape[-1]
        site.require(
            block.shape[1] == r and inside % r == 0 and outside % r == 0 and block.shape[0] * r == outside,
            "miss_block",
            "Its blocks do not divide the module.",
        )
        return (Dense(Made((outside, inside), lambda base: _bat(block.to_float32(), base.weight()))),)
    rank = site.rank
    width = site.count_of("mini_r", 1) if init == "mini" else outside
    block = site.part("miss_block", rank, width)
    site.require(outside % width == 0, "miss_block", "It does not divide the module's outputs.")
    pool = Made((rank, inside), lambda _: (np.arange(inside) % rank == np.arange(rank)[:, None]).astype(np.float32))
    return (LowRank(rank, 1.0, pool, Made((outside, rank), lambda _: np.tile(block.to_float32(), outside // width).T)),)


def _bat(block: Floats, weight: Floats) -> Floats:
    r = block.shape[-1]
    outside, inside = weight.shape
    blocks = weight.reshape(outside // r, r, inside // r, r).transpose(2, 0, 1, 3)
    found: Floats = (product(blocks, block) + block).transpose(1, 2, 0, 3).reshape(outside, inside)
    return found


MISS = Method(
    "miss",
    _miss,
    parts=("miss_block",),
    settings=frozenset({"mini_r"}),
    training=frozenset({"miss_dropout"}),
)


def _randlora(site: Site) -> tuple[Term, ...]:
    """ΔW is a sum over pairs of random bases, each scaled; of full rank, so it is kept as it comes out."""
    (inside, outside), rank = site.width, site.rank
    small, large = min(inside, outside), max(inside, outside)
    bases = -(-small // rank)
    if "randlora_A" not in site.shared:
        raise Misfit(
            "unsupported_feature",
            "adapter_config.json: save_projection",
            "Not served: the random bases are not in the file. Save the adapter with save_projection=True.",
        )
    a, b = site.common("randlora_A", rank, 1, None), site.common("randlora_B", None, None, rank)
    site.require(
        a.shape[2] >= small and b.shape[0] >= large and b.shape[1] >= bases,
        "randlora_lambda",
        "The bases are too small.",
    )
    factors, gamma = site.part("randlora_lambda", rank, bases), site.part("randlora_gamma", bases, small)
    scale = np.float32(site.alpha / rank)

    def dense(_: object) -> Floats:
        first = a.to_float32()[:, :, :small]
        scaled = (factors.to_float32()[:, :, None] * first * gamma.to_float32()[None]).reshape(rank * bases, small)
        # Of B the ranks come after the bases, of A before: PEFT flattens both as they are.
        other = b.to_float32()[:large, :bases].reshape(large, bases * rank)
        found = product(other, scaled)
        return (found if small == inside else found.T) * scale

    return (Dense(Made((outside, inside), dense)),)


RANDLORA = Method(
    "randlora",
    _randlora,
    parts=("randlora_lambda", "randlora_gamma"),
    shared=("randlora_A", "randlora_B"),
    training=frozenset({"projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout"}),
    left_aside=("randlora_A", "randlora_B"),
    alpha_key="randlora_alpha",
)
