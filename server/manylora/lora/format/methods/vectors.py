"""Methods that train vectors: IA3, BEFT, LN tuning, and rows of tokens."""

import numpy as np

from manylora.lora.format.extras import own_norm, own_rows, tokens_fault
from manylora.lora.format.method import Method, Misfit, Site
from manylora.lora.format.patterns import suffixes
from manylora.lora.format.spec import BaseLinear, Dense, Floats, Input, Made, Output, Term
from manylora.lora.format.vocabulary import has_tokens, num_tokens

__all__ = ["BEFT", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"]


def _ia3(site: Site) -> tuple[Term, ...]:
    """The output, with its bias, times a vector; of feed-forward modules the input."""
    inside, outside = site.width
    names = site.config.get("feedforward_modules") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Misfit(
            "unsupported_feature", "adapter_config.json: feedforward_modules", "Not served: a pattern. List the names."
        )
    if not set(names) & set(suffixes(site.spec.path)):
        vector = site.part("ia3_l", outside, 1)
        return (Output(scale=Made((outside,), lambda _: vector.to_float32()[:, 0])),)
    vector = site.part("ia3_l", 1, inside)
    if not site.spec.shares_input:
        return (Input(Made((inside,), lambda _: vector.to_float32()[0])),)

    # Other linears get the same input, and not from this adapter alone: so the columns of the weight are scaled.
    def dense(base: BaseLinear) -> Floats:
        return base.weight() * (vector.to_float32() - np.float32(1))

    return (Dense(Made((outside, inside), dense)),)


IA3 = Method(
    "ia3",
    _ia3,
    parts=("ia3_l",),
    settings=frozenset({"feedforward_modules"}),
    training=frozenset({"init_ia3_weights"}),
)


def _beft(site: Site) -> tuple[Term, ...]:
    """A bias beside the base's."""
    outside = site.spec.out_features
    bias = site.part("beft_bias", 1, outside)
    return (Output(shift=Made((outside,), lambda _: bias.to_float32()[0])),)


BEFT = Method("beft", _beft, parts=("beft_bias",))


def _ln_tuning(site: Site) -> tuple[Term, ...]:
    """A norm's own weight, and bias where it has one."""
    width, name = site.spec.out_features, "ln_tuning_layers"
    weight = site.part(f"{name}.weight", width)
    return (own_norm(site.spec, weight, site.part(f"{name}.bias", width) if site.has(f"{name}.bias") else None),)


LN_TUNING = Method("ln_tuning", _ln_tuning, parts=("ln_tuning_layers.weight", "ln_tuning_layers.bias"), on_norms=True)


def _tokens(site: Site) -> tuple[Term, ...]:
    """Rows of an embedding, of some tokens."""
    ids, where = site.config.get("token_indices"), "adapter_config.json: token_indices"
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise Misfit("bad_config", where, "It must be a list of token ids.")
    if not has_tokens(site.spec):
        raise Misfit("unsupported_feature", where, "Not served: rows of what is no embedding and no head.")
    if problem := tokens_fault(num_tokens(site.spec), ids):
        raise Misfit("base_mismatch", where, problem)
    hidden = site.spec.out_features if site.spec.kind == "embedding" else site.spec.in_features
    return (own_rows(site.spec, ids, site.part("trainable_tokens_delta", len(ids), hidden)),)


TRAINABLE_TOKENS = Method(
    "trainable_tokens",
    _tokens,
    parts=("trainable_tokens_delta",),
    settings=frozenset({"token_indices"}),
    on_embeddings=True,
    on_tied_heads=True,
)
