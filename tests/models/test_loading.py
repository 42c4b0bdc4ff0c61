"""Finding and loading the base model, and every way in which a folder can be none."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    LlavaConfig,
    Qwen2AudioConfig,
    Qwen2VLConfig,
    RoFormerConfig,
    RoFormerForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from manylora.errors import InvalidSettings, ModelUnusable, NotEnoughMemory
from manylora.models.backends import has_bfloat16, select_device, select_dtype
from manylora.models.checkpoint import read_config
from manylora.models.loading import (
    GenerationDefaults,
    base_name,
    load_base,
    resolve_model,
)
from manylora.settings import Settings
from tests.conftest import ModelMaker
from tests.models.tiny_gguf import write_tiny_gguf
from tests.tiny_models import ARCHITECTURES, END_OF_TURN, draw_weights, make_tiny_model, make_tokenizer

CPU = torch.device("cpu")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "broken-llama"))


def settings(model: Path | str, **values: Any) -> Settings:
    return Settings(**{"model": str(model), "device": "cpu", "dtype": "float32", **values})


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# what works


def test_a_loaded_base_is_frozen_in_eval_mode_and_answers_as_transformers_does(tiny_llama_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = load_base(settings(tiny_llama_dir))

    ids = torch.tensor([base.codec.encode("The quick")])
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)(ids).logits
    assert torch.equal(base.model(ids).logits, expected)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.name == "tiny-llama"
    assert base.codec.eos_ids == {END_OF_TURN}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_take_the_dtype_asked_for(tiny_llama_dir: Path, dtype: str) -> None:
    base = load_base(settings(tiny_llama_dir, dtype=dtype))

    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}


def test_the_served_name_can_be_chosen(tiny_llama_dir: Path) -> None:
    assert load_base(settings(tiny_llama_dir, served_name="base")).name == "base"


def test_a_gguf_file_is_served_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tiny_gguf(tmp_path / "Tiny.Q4.gguf")

    base = load_base(settings(path))

    assert base.name == "Tiny.Q4"
    assert base.folder.is_relative_to(tmp_path / "cache" / "manylora" / "models")
    assert base.codec.eos_ids == {2}


def test_sampling_defaults_and_all_end_tokens_come_from_the_generation_config(folder: Path) -> None:
    edit(folder / "generation_config.json", temperature=0.6, top_p=0.9, top_k=20, eos_token_id=[5, 7])

    base = load_base(settings(folder))

    assert base.generation == GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.0)
    assert base.codec.eos_ids == {5, 7, END_OF_TURN}


def test_without_a_generation_config_the_defaults_are_openais(folder: Path) -> None:
    (folder / "generation_config.json").unlink()

    assert load_base(settings(folder)).generation == GenerationDefaults(1.0, 1.0, 0, 1.0)


def test_a_checkpoint_in_shards_is_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_tiny_model("llama", tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    make_tokenizer().save_pretrained(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1

    loaded = load_base(settings(tmp_path / "many")).model

    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_loaded_from_a_folder(architecture: str, tiny_model_dir: ModelMaker) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir(architecture)
    ids = torch.tensor([[5, 6, 7, 8]])

    base = load_base(settings(folder))

    assert torch.equal(base.model(ids).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_model_that_never_looks_ahead_is_served_whatever_its_config_says(is_decoder: bool, tmp_path: Path) -> None:
    make_tiny_model("gpt_neox", tmp_path, is_decoder=is_decoder)

    assert load_base(settings(tmp_path)).config.is_decoder is is_decoder


def test_buffers_of_older_releases_are_left_aside(tmp_path: Path) -> None:
    path = make_tiny_model("gpt_neox", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, path, {"format": "pt"})

    assert load_base(settings(tmp_path)).model.config.model_type == "gpt_neox"


# what is no model


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    with pytest.raises(ModelUnusable, match=r"no weights: neither model\.safetensors"):
        load_base(settings(folder))


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(ModelUnusable, match="pickles only"):
        load_base(settings(folder))


def test_a_missing_shard_is_named(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelUnusable, match="lacks model-00001-of-00002"):
        load_base(settings(folder))


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(ModelUnusable, match="no whole safetensors file"):
        load_base(settings(folder))


def test_a_weight_that_is_missing_is_not_filled_with_random_numbers(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, {"format": "pt"})

    with pytest.raises(ModelUnusable, match=r"lack model\.layers\.1\.mlp\.down_proj\.weight"):
        load_base(settings(folder))


def add_tensors(folder: Path, **more: torch.Tensor) -> None:
    """`a__b=…` adds the tensor `a.b`."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in more.items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_weights_that_need_their_scales_are_refused_without_a_quantization_config(
    folder: Path, dtype: torch.dtype
) -> None:
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    scale = weight.abs().max() / 100
    add_tensors(
        folder,
        model__layers__0__mlp__up_proj__weight=(weight / scale).to(dtype),
        model__layers__0__mlp__up_proj__weight_scale=scale,
    )

    with pytest.raises(ModelUnusable, match=r"up_proj\.weight as .*: it is quantised"):
        load_base(settings(folder))


@pytest.mark.parametrize(
    "name",
    ["self_attn.q_proj.weight_scale", "self_attn.k_proj.k_scale", "self_attn.q_proj.bias", "mlp.extra.weight"],
)
def test_a_tensor_that_nothing_uses_is_named(folder: Path, name: str) -> None:
    add_tensors(folder, **{f"model.layers.1.{name}": torch.ones(1)})

    with pytest.raises(ModelUnusable, match=rf"No part of LlamaForCausalLM uses model\.layers\.1\.{name}"):
        load_base(settings(folder))


def test_a_bias_is_no_mask(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    add_tensors(tmp_path, model__layers__1__attn__bias=torch.ones(64))

    with pytest.raises(ModelUnusable, match=r"uses model\.layers\.1\.attn\.bias"):
        load_base(settings(tmp_path))


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=100)

    with pytest.raises(ModelUnusable):
        load_base(settings(folder))


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()

    with pytest.raises(ModelUnusable, match=r"no config\.json"):
        load_base(settings(folder))


def test_an_adapter_given_as_the_model_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(ModelUnusable, match="--adapters"):
        load_base(settings(tmp_path))


def test_a_folder_with_a_gguf_file_says_to_give_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(ModelUnusable, match=r"give the file: .*model\.gguf"):
        load_base(settings(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(ModelUnusable, match=r"config\.json"):
        load_base(settings(folder))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(ModelUnusable, match="no tokenizer"):
        load_base(settings(folder))


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")

    with pytest.raises(ModelUnusable, match=r"tokenizer in .* cannot be loaded"):
        load_base(settings(folder))


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)

    with pytest.raises(ModelUnusable, match="encoder-decoder"):
        load_base(settings(tmp_path))


def test_an_encoder_whose_attention_does_not_say_so_is_refused(tmp_path: Path) -> None:
    config = RoFormerConfig(
        vocab_size=320, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)  # of some weights nothing can be seen of what is behind a token
    model = RoFormerForCausalLM(config)
    draw_weights(model)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(ModelUnusable, match="no causal language model"):
        load_base(settings(tmp_path))


@pytest.mark.parametrize("kind", [BertModel, BertLMHeadModel])
def test_an_encoder_is_refused(tmp_path: Path, kind: Any) -> None:
    config = BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    kind(config).save_pretrained(tmp_path)

    with pytest.raises(ModelUnusable, match="no causal language model"):
        load_base(settings(tmp_path))


def test_a_model_with_ears_is_named_as_what_it_is(tmp_path: Path) -> None:
    Qwen2AudioConfig(architectures=["Qwen2AudioForConditionalGeneration"]).save_pretrained(tmp_path)

    with pytest.raises(ModelUnusable, match="ForConditionalGeneration, a model of speech or sound"):
        load_base(settings(tmp_path))


@pytest.mark.parametrize("kind", [Qwen2VLConfig, LlavaConfig])
def test_who_takes_no_text_part_names_a_model_with_eyes(tmp_path: Path, kind: Any) -> None:
    """As training and merging do, which would lose the rest."""
    name = kind.__name__.replace("Config", "ForConditionalGeneration")
    kind(architectures=[name]).save_pretrained(tmp_path)

    with pytest.raises(ModelUnusable, match=f"{name}, a vision-language model"):
        read_config(tmp_path)
    assert read_config(tmp_path, to_serve=True).model_type == kind.model_type


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    edit(folder / "config.json", model_type="hyperion")

    with pytest.raises(ModelUnusable, match="no model of type 'hyperion'"):
        load_base(settings(folder))


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    edit(folder / "config.json", model_type="hyperion", auto_map={"AutoConfig": "code.Config"})

    with pytest.raises(ModelUnusable, match="never run"):
        load_base(settings(folder))

    assert not marker.exists()


def test_a_quantised_checkpoint_is_refused_with_its_method(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

    with pytest.raises(ModelUnusable, match="gptq"):
        load_base(settings(folder))


def test_too_little_memory_for_the_weights_is_said_before_loading(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)

    with pytest.raises(NotEnoughMemory, match="GiB are free"):
        load_base(settings(tiny_llama_dir))


# names


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c", "-x", ""])
def test_a_path_without_a_model_is_named(name: str) -> None:
    with pytest.raises(ModelUnusable, match="no model at"):
        resolve_model(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04pickle")

    with pytest.raises(ModelUnusable, match="no GGUF file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_a_hub_id_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ModelUnusable, match=r"huggingface\.co cannot be reached"):
        resolve_model("some-owner/some-model@main")


def test_names_are_the_last_part_of_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert base_name(None) == "smollm2-135m-instruct"
    assert base_name("owner/Model-1.5@main") == "Model-1.5"
    assert base_name("weights/Model.Q4_1.gguf") == "Model.Q4_1"
    assert base_name(".") == tmp_path.name


# device and dtype


def test_auto_on_a_cpu_is_bfloat16_only_where_the_cpu_computes_in_it() -> None:
    assert has_bfloat16({"avx512_bf16": True, "avx2": True})
    assert has_bfloat16({"avx2": True, "amx_bf16": True})
    assert not has_bfloat16({"avx512_f": True, "avx512_bf16": False})
    expected = torch.bfloat16 if has_bfloat16(torch.cpu.get_capabilities()) else torch.float32
    assert select_dtype("auto", CPU) is expected


def test_auto_on_cuda_is_the_models_own_dtype() -> None:
    cuda = torch.device("cuda")

    assert select_dtype("auto", cuda, torch.float16) is torch.float16
    assert select_dtype("auto", cuda, None) is torch.bfloat16
    assert select_dtype("float32", cuda, torch.float16) is torch.float32


@needs_no_cuda
def test_cuda_on_a_machine_without_it_is_an_error() -> None:
    with pytest.raises(InvalidSettings, match="no usable CUDA device"):
        select_device("cuda")


@needs_no_cuda
def test_auto_on_a_machine_without_cuda_is_the_cpu() -> None:
    assert select_device("auto") == CPU
