"""What the start-up check finds out about models that differ far out, in their masks, or in a single part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from manylora.engine.build import EngineBuilder
from manylora.errors import InvalidSettings, ModelUnusable
from manylora.kernels import native
from manylora.kernels.torch_attention import hidden_from
from manylora.models import fused
from manylora.models.kv_cache import KVCache
from manylora.models.loading import load_base
from manylora.models.masks import Reach, reach_of
from manylora.models.positions import batch_limit, position_limit, probe_starts
from manylora.models.selfcheck import SelfCheck
from manylora.models.wrapping import WrappedModel, wrap
from tests.engine.harness import TORCH
from tests.models.front_door import make_adapters, settings_for, start, try_model, try_type
from tests.models.zoo import CHUNK, CONTEXT, ORIGINAL, WINDOW, make_zoo_model, tiny_config

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels are not installed")


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def checked(model: PreTrainedModel) -> tuple[WrappedModel, KVCache, SelfCheck]:
    wrapped = wrap(model, TORCH, context_length=128)
    cache = KVCache(wrapped.survey.kv_shapes, 64, 4, torch.float32, CPU)
    wrapped.attach_cache(cache)
    return wrapped, cache, SelfCheck(wrapped, cache)


def scaled_ministral(folder: Path) -> Path:
    scaling = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    rope = {**scaling, "original_max_position_embeddings": ORIGINAL}
    return make_zoo_model("ministral3", folder, rope_parameters=rope, sliding_window=None)


def test_queries_that_grow_with_the_position_keep_their_layers(tmp_path: Path) -> None:
    wrapped, cache, check = checked(load(scaled_ministral(tmp_path / "base")))
    candidates = fused.candidates(wrapped, cache)

    assert {probe.start for probe in wrapped.survey.probes} == {0, ORIGINAL - 6, 128 - 12}
    assert len(candidates) == 2
    assert check.proven(candidates) == {}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_queries_that_grow_with_the_position_are_served(kernels: str, tmp_path: Path) -> None:
    folder = scaled_ministral(tmp_path / "base")

    assert try_model(folder, make_adapters(folder), kernels=kernels).kind == "served"


def test_layers_without_rotary_embedding_keep_theirs_and_the_others_are_fused(tmp_path: Path) -> None:
    wrapped, cache, check = checked(load(make_zoo_model("smollm3", tmp_path / "base")))
    candidates = fused.candidates(wrapped, cache)

    assert list(candidates) == ["model.layers.0", "model.layers.1"]
    assert list(check.proven(candidates)) == ["model.layers.0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_layer_with_another_activation_epsilon_or_scale_is_not_taken(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """On untouched random weights, where the whole model's logits hardly move."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=dtype).eval()
    wrapped = wrap(model, TORCH, context_length=128)
    cache = KVCache(wrapped.survey.kv_shapes, 64, 4, dtype, CPU)
    wrapped.attach_cache(cache)
    check = SelfCheck(wrapped, cache)
    good = fused.candidates(wrapped, cache)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _a, out: (out[0] * 0.8, *out[1:]))

    assert check.proven(good) == {}


def test_a_window_that_only_the_mask_has_is_attended_by(tmp_path: Path) -> None:
    folder = make_zoo_model("qwen2_moe", tmp_path / "base")

    options = wrap(load(folder), TORCH).survey.options

    assert [each.window for each in options] == [WINDOW, 0]
    assert try_model(folder, make_adapters(folder)).kind == "served"


def test_a_window_that_only_the_mask_has_is_left_out_where_the_context_ends_before_it(tmp_path: Path) -> None:
    folder = make_zoo_model("qwen2_moe", tmp_path / "base", sliding_window=100)

    assert try_model(folder, make_adapters(folder), max_model_len=100).kind == "served"
    assert try_model(folder, make_adapters(folder)).kind == "served"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_attention_in_chunks_is_served_over_many_of_them(kernels: str, tmp_path: Path) -> None:
    folder = make_zoo_model("llama4_text", tmp_path / "base")

    assert [each.chunk for each in wrap(load(folder), TORCH).survey.options] == [CHUNK, 0]
    assert try_model(folder, make_adapters(folder), kernels=kernels).kind == "served"


def test_queries_that_grow_with_the_cache_are_served_as_long_as_they_do_not(tmp_path: Path) -> None:
    config = tiny_config("llama4_text")
    config.floor_scale = 12

    assert (position_limit(config), batch_limit(config)) == (11, 11)
    folder = make_zoo_model("llama4_text", tmp_path / "base", floor_scale=12)
    with pytest.raises(InvalidSettings, match="at most 11 tokens in one pass"):
        EngineBuilder(settings_for(folder, max_num_batched_tokens=16), load_base(settings_for(folder)))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("whisper", "ignores logits_to_keep"),
        ("doge", r"DogeAttention\) adds numbers of its own"),
        ("deepseek_v32", "sparse attention"),
        ("glm_moe_dsa", "sparse attention"),
        ("rwkv", "recurrent layers whose states are not kept"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_by_the_parts_name(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    outcome = try_type(model_type, tmp_path)

    assert outcome.kind == "refused"
    assert "\n" not in outcome.detail
    with pytest.raises(ModelUnusable, match=reason):
        wrap(load(tmp_path / "base"), TORCH)


def test_positions_begin_behind_the_paddings_row_of_their_table(tmp_path: Path) -> None:
    folder = make_zoo_model("roberta", tmp_path / "base", pad_token_id=3)

    assert EngineBuilder(settings_for(folder), load_base(settings_for(folder))).context_length == CONTEXT - 4
    assert try_model(folder, {}).kind == "served"

    model = load(folder)
    model.roberta.embeddings.position_embeddings.padding_idx = None
    with pytest.raises(ModelUnusable, match="numbers its positions"):
        wrap(model, TORCH)


def test_layers_with_the_same_weights_have_one_product(tmp_path: Path) -> None:
    wrapped = wrap(load(make_zoo_model("zamba", tmp_path / "base")), TORCH)
    paths = [f"model.layers.{layer}.shared_transf.feed_forward.down_proj" for layer in (1, 3)]

    first, second = (wrapped.model.get_submodule(path) for path in paths)
    assert first.matmul is second.matmul
    assert first.group.sites != second.group.sites
    assert len(wrapped.survey.kv_shapes) == 2


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize(
    "model_type",
    [
        "modernbert-decoder",
        "bert",
        "phimoe",
        "afmoe",
        "hunyuan_v1_moe",
        "biogpt",
        "gemma3_text",
        "ernie4_5",
        "gpt_oss",
        "minicpm3",
    ],
)
def test_parts_that_do_more_than_multiply_are_served_with_adapters_on_all_others(
    model_type: str, kernels: str, tmp_path: Path
) -> None:
    outcome = try_type(model_type, tmp_path, kernels=kernels)

    assert outcome.kind == "served", outcome.detail


@pytest.mark.parametrize("model_type", ["ernie4_5", "ministral3", "phimoe", "gemma2"])
@pytest.mark.parametrize(
    "how",
    [
        {"dtype": "bfloat16", "kernels": "torch"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        pytest.param({"quantization": "int8"}, marks=needs_kernels),
        pytest.param({"quantization": "int4"}, marks=needs_kernels),
    ],
    ids=str,
)
def test_good_models_pass_in_every_number_format(how: dict[str, str], model_type: str, tmp_path: Path) -> None:
    _, _, tiers = start(settings_for(make_zoo_model(model_type, tmp_path / "base"), **how), {})

    tiers.close()


def test_linears_on_the_wanted_rows_only_are_told_from_the_others(tmp_path: Path) -> None:
    found = wrap(load(make_zoo_model("modernbert-decoder", tmp_path / "base")), TORCH).survey

    assert found.on_logit_rows == {"lm_head.dense", "decoder"}


class _Odd(nn.Module):
    """Whatever a model's own code may raise."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        raise ZeroDivisionError("no such thing\nand more")


def test_whatever_a_models_code_raises_is_a_refusal_in_one_line_that_names_the_part(tmp_path: Path) -> None:
    model = load(make_zoo_model("llama", tmp_path / "base"))
    model.model.layers[1].mlp = _Odd()

    with pytest.raises(ModelUnusable) as caught:
        wrap(model, TORCH)

    assert str(caught.value) == (
        "LlamaForCausalLM cannot be served: while it was looked at, in model.layers.1.mlp (_Odd), its code raised "
        "ZeroDivisionError: no such thing"
    )


@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_the_window_of_a_mask_is_read_off_it(window: int) -> None:
    seen = ~hidden_from(6, 40, window, CPU)

    expected = window if window < 40 else 0
    assert reach_of(seen[None, None]) == Reach(window=expected)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert reach_of(added[None, None].expand(2, 3, -1, -1)) == Reach(window=expected)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_chunks_are_told_from_windows_by_the_size_that_they_would_have(length: int) -> None:
    seen = ~hidden_from(5, length, 0, CPU, chunk=3)

    assert reach_of(seen[None, None], chunk=3) == Reach(chunk=3)
    with pytest.raises(ValueError, match="of its own"):
        reach_of(seen[None, None], chunk=4)
    assert reach_of(~hidden_from(5, length, 0, CPU)[None, None], chunk=3) == Reach()


def test_a_mask_of_another_kind_is_told() -> None:
    seen = ~hidden_from(6, 40, 0, CPU)
    seen[2, 3] = False
    with pytest.raises(ValueError, match="of its own"):
        reach_of(seen[None, None])
    with pytest.raises(ValueError, match="numbers of its own"):
        reach_of(torch.full((1, 1, 2, 8), 0.5))


def test_probes_lie_across_every_threshold_and_at_the_end() -> None:
    config = tiny_config("ministral3")
    config.rope_parameters = {"original_max_position_embeddings": 32}
    config.sliding_window = 50

    assert probe_starts(config, 128, 12) == [26, 44, 116]
    assert probe_starts(config, 40, 12) == [26, 28]
    assert probe_starts(config, 12, 12) == []
