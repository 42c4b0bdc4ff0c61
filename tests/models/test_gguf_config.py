"""What a GGUF file says of its model is followed, at positions past the original context too, or refused by name."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf.constants import Keys
from transformers import AutoModelForCausalLM, PretrainedConfig

from manylora.errors import ModelUnusable
from manylora.models import gguf, gguf_config
from manylora.models.loading import LoadedBase, load_base
from manylora.settings import Settings
from tests.engine.harness import build_rig, load
from tests.engine.oracle import check_greedy, with_adapter
from tests.models.hf_gguf import write_gguf
from tests.tiny_models import make_tiny_model

ORIGINAL, LONG = 64, 400
Arrays = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def base_of(path: Path) -> LoadedBase:
    return load_base(Settings(model=str(path), device="cpu", dtype="float32"))


def make(folder: Path, architecture: str, **config: Any) -> Path:
    """A model of numbers that bfloat16 has, since that is what files are converted to."""
    return make_tiny_model(architecture, folder, dtype=torch.bfloat16, **config)


def check_logits(folder: Path, path: Path) -> None:
    """The file's model gives the logits of the folder's, whose positions matter that much."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (1, LONG), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids).logits
        found = base_of(path).model(ids).logits
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.std())


def llama3_divisors(dim: int, factor: float, low: float, high: float, original: int) -> npt.NDArray[np.float32]:
    """As llama.cpp's converter writes them into rope_freqs.weight."""
    found = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * 10_000.0 ** (i / dim)
        smooth = (original / wavelength - low) / (high - low)
        found.append(
            1.0
            if wavelength < original / high
            else factor
            if wavelength > original / low
            else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(found, dtype=np.float32)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **values}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"factor": 6.0, "original_max_position_embeddings": ORIGINAL}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 6.0,
    "rope.scaling.original_context_length": ORIGINAL,
    "rope.scaling.finetuned": True,
}
SHORT_FACTOR, LONG_FACTOR = [1.0 + 0.1 * i for i in range(8)], [3.0 + i for i in range(8)]
LONG_ROPE = rope(
    "longrope",
    short_factor=SHORT_FACTOR,
    long_factor=LONG_FACTOR,
    original_max_position_embeddings=ORIGINAL,
    attention_factor=1.25,
)
LONG_ROPE_KEYS = {"rope.scaling.original_context_length": ORIGINAL, "rope.scaling.attn_factor": 1.25}
TWO_ROPES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
    }
}

# name: (architecture, fields of its config, keys in which the file says them, tensors that the file has besides)
SAID: dict[str, tuple[str, dict[str, Any], dict[str, Any], Arrays]] = {
    "nothing": ("llama", {}, {}, {}),
    "qwen2": ("qwen2", {}, {}, {}),
    "width of heads": ("qwen3", {}, {}, {}),
    "gpt2": ("gpt2", {}, {}, {}),
    "Llama 3.1": (
        "llama",
        rope("llama3", **LLAMA3),
        {},
        {"rope_freqs.weight": llama3_divisors(16, 8.0, 1.0, 4.0, ORIGINAL)},
    ),
    "YaRN": ("llama", rope("yarn", **YARN), YARN_KEYS, {}),
    "YaRN in qwen2": ("qwen2", rope("yarn", **YARN), YARN_KEYS, {}),
    "YaRN in qwen3": (
        "qwen3",
        rope("yarn", beta_fast=16.0, beta_slow=2.0, **YARN),
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "linear": (
        "llama",
        rope("linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "a factor alone": ("qwen2", rope("linear", factor=4.0), {"rope.scaling.factor": 4.0}, {}),
    "the oldest key": ("llama", rope("linear", factor=4.0), {"rope.scale_linear": 4.0}, {}),
    "no scaling, in words": ("llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "base frequency": ("qwen3", rope("default", rope_theta=500.0), {}, {}),
    "LongRoPE": (
        "phi3",
        {"original_max_position_embeddings": ORIGINAL, **LONG_ROPE},
        LONG_ROPE_KEYS,
        {
            "rope_factors_short.weight": np.array(SHORT_FACTOR, dtype=np.float32),
            "rope_factors_long.weight": np.array(LONG_FACTOR, dtype=np.float32),
        },
    ),
    "half-rotary heads": ("phi3", rope("default", partial_rotary_factor=0.5), {}, {}),
    "a window": ("phi3", {"sliding_window": 50}, {}, {}),
    "no window": ("phi3", {}, {"attention.sliding_window": 0}, {}),
    "soft caps": (
        "gemma2",
        {"tie_word_embeddings": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {},
        {},
    ),
    "attention's scale": (
        "gemma2",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 64},
        {"attention.scale": 0.125},
        {},
    ),
    "two kinds of layers": (
        "gemma3",
        {"tie_word_embeddings": True, "num_hidden_layers": 4, "sliding_window_pattern": 2, **TWO_ROPES},
        {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "rope.freq_base_swa": 3_000.0,
            "attention.sliding_window_pattern": 2,
        },
        {},
    ),
    "a kind for each layer": (
        "gemma3",
        {
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {"attention.sliding_window_pattern": [False, True]},
        {},
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_the_file_says_is_followed(case: str, tmp_path: Path) -> None:
    architecture, config, keys, tensors = SAID[case]
    folder = make(tmp_path / "folder", architecture, **config)

    path = write_gguf(folder, tmp_path / "model.gguf", keys=keys, tensors=tensors)

    check_logits(folder, path)


@pytest.mark.parametrize("case", ["Llama 3.1", "YaRN"])
def test_it_is_served_past_the_original_context(case: str, tmp_path: Path) -> None:
    architecture, config, keys, tensors = SAID[case]
    folder = make(tmp_path / "folder", architecture, **config)
    path = write_gguf(folder, tmp_path / "model.gguf", keys=keys, tensors=tensors)
    prompt = [(7 * i) % 300 for i in range(150)]

    rig = build_rig(load(path), num_blocks=64)
    rig.add("r", prompt, max_tokens=12)
    rig.run()
    rig.close()

    check_greedy(with_adapter(folder, None), prompt, rig.tokens("r"))


def templates() -> list[str]:
    """Every key of an architecture that the gguf package knows, without the architecture's name."""
    groups = (Keys.LLM, Keys.Attention, Keys.Attention.Indexer, Keys.Rope, Keys.SSM, Keys.KDA, Keys.WKV, Keys.ShortConv)
    texts = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    return sorted(text.removeprefix("{arch}.") for text in texts if text.startswith("{arch}."))


HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "gpt2"])
def test_every_key_is_followed_or_named(architecture: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if architecture.startswith("gemma") else {}
    path = write_gguf(make(tmp_path / "folder", architecture, **tied), tmp_path / "model.gguf")
    read, _ = PretrainedConfig.get_config_dict(tmp_path, gguf_file=path.name)
    file = gguf_config.read_file(path)
    keys = set(templates()) - file.of_architecture().keys() - HARMLESS

    def config(**more: Any) -> dict[str, Any]:
        metadata = {**file.metadata, **{f"{file.architecture}.{key}": value for key, value in more.items()}}
        values: dict[str, Any] = gguf_config.config_of(dataclasses.replace(file, metadata=metadata), read).to_dict()
        return values

    ignored = []
    for key in [*sorted(keys), "brand_new", "attention.brand_new", "rope.brand_new"]:
        try:
            if config(**{key: [False, True] if key.endswith("window_pattern") else 3}) == config():
                ignored.append(key)
        except ModelUnusable as error:
            assert key in error.message or "what transformers refuses" in error.message  # noqa: PT017
    # Alone it means nothing: there is no scaling.
    assert ignored == (["rope.scaling.original_context_length"] if architecture != "gpt2" else [])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope.scaling.type": "ntk"}, "ntk"),
        ({**YARN_KEYS, "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
        ({**YARN_KEYS, "rope.scaling.yarn_attn_factor": 2.0}, "yarn_attn_factor = 2.0"),
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor = 2.0"),
        ({"rope.dimension_count": 8}, "dimension_count = 8"),
        ({"attention.head_count_kv": [2, 1]}, r"head_count_kv = \[2, 1\]"),
        ({"attention.causal": False}, "causal = False"),
        ({"attention.scale": 0.3}, "scale = 0.3"),
        ({"expert_count": 8, "expert_used_count": 2}, "expert_count = 8"),
    ],
)
def test_what_a_llama_does_not_do_is_named(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", "llama")
    path = write_gguf(folder, tmp_path / "model.gguf", keys=keys)

    with pytest.raises(ModelUnusable, match=rf"says .*{named}.* of its llama model") as caught:
        base_of(path)

    assert "\n" not in caught.value.message


DIVISORS = np.ones(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "leave_out", "reason"),
    [
        ({"blk.0.attn_sinks.weight": DIVISORS}, (), r"nothing in llama uses: blk\.0\.attn_sinks\.weight"),
        ({"blk.1.attn_q.bias": np.ones(64, dtype=np.float32)}, (), r"nothing in llama uses: blk\.1\.attn_q\.bias"),
        ({}, ("blk.1.ffn_up.weight",), r"no tensor of the right size for model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"rope_factors_long.weight": DIVISORS}, (), r"rope_factors_long\.weight"),
    ],
)
def test_every_tensor_has_its_place(tensors: Arrays, leave_out: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", "llama")
    path = write_gguf(folder, tmp_path / "model.gguf", tensors=tensors, leave_out=leave_out)

    with pytest.raises(ModelUnusable, match=reason):
        base_of(path)


def test_rotary_divisors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", "llama")
    path = write_gguf(folder, tmp_path / "model.gguf", keys=YARN_KEYS, tensors={"rope_freqs.weight": DIVISORS})

    with pytest.raises(ModelUnusable, match=r"rope_freqs\.weight"):
        base_of(path)


def test_old_copies_of_the_frequencies_are_left_aside(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", "llama")
    path = write_gguf(folder, tmp_path / "model.gguf", tensors={"blk.0.attn_rot_embd.weight": DIVISORS})

    check_logits(folder, path)


# ends, sampling, tokenizers


def llama_file(tmp_path: Path, **raw: Any) -> Path:
    folder = make(tmp_path / "folder", "llama")
    return write_gguf(folder, tmp_path / "model.gguf", raw={name.replace("__", "."): v for name, v in raw.items()})


def test_all_tokens_that_end_a_turn_stop_an_answer(tmp_path: Path) -> None:
    path = llama_file(tmp_path, tokenizer__ggml__eot_token_id=7, tokenizer__ggml__eom_token_id=9)

    assert base_of(path).codec.eos_ids == {2, 7, 9}


def test_tokens_known_by_their_name_stop_an_answer_too(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", "llama")
    text = (folder / "tokenizer.json").read_text().replace("<|im_start|>", "<|eot_id|>")
    (folder / "tokenizer.json").write_text(text)

    assert base_of(write_gguf(folder, tmp_path / "model.gguf")).codec.eos_ids == {1, 2}


def test_the_sampling_that_a_file_recommends_is_the_default(tmp_path: Path) -> None:
    recommended = {"temp": 0.6, "top_p": 0.9, "top_k": 20, "penalty_repeat": 1.1}
    path = llama_file(tmp_path, **{f"general__sampling__{name}": value for name, value in recommended.items()})

    found = base_of(path).generation

    assert found.top_k == 20
    assert [found.temperature, found.top_p, found.repetition_penalty] == pytest.approx([0.6, 0.9, 1.1])


def test_rules_for_splitting_text_that_are_not_known_are_refused(tmp_path: Path) -> None:
    path = llama_file(tmp_path, tokenizer__ggml__pre="deepseek-llm")

    with pytest.raises(ModelUnusable, match="rules of 'deepseek-llm'"):
        base_of(path)


def test_a_part_of_a_model_says_how_to_join_it(tmp_path: Path) -> None:
    path = llama_file(tmp_path, split__count=3, split__no=0)

    with pytest.raises(ModelUnusable, match=r"one of 3 parts.*--merge"):
        base_of(path)


def test_notes_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    path = llama_file(tmp_path, quantize__imatrix__chunks_count=12, mradermacher__quantized_by="someone")

    assert base_of(path).config.model_type == "llama"


def test_what_an_older_release_converted_is_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama_file(tmp_path)
    monkeypatch.setattr(gguf, "_CONVERSION", 1)
    before = base_of(path).folder
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert base_of(path).folder != before


@pytest.mark.parametrize(
    ("architecture", "layers", "expected"), [("gemma2", 46, 144), ("gemma3", 62, 168), ("gemma2", 42, 256)]
)
def test_the_largest_gemmas_scale_by_their_own_heads(architecture: str, layers: int, expected: int) -> None:
    keys = {"block_count": layers, "embedding_length": expected * 32, "attention.head_count": 32}
    file = gguf_config.GgufFile(
        Path("g.gguf"), architecture, {f"{architecture}.{k}": v for k, v in keys.items()}, frozenset(), {}
    )
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)

    assert gguf_config.config_of(file, {"model_type": kind}).query_pre_attn_scalar == expected
