"""A Hugging Face folder, read with every way it can be wrong told apart. Safetensors only; no code from the folder."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from manylora.errors import ModelUnusable
from manylora.identity import CONFIG_FILE
from manylora.log import get_logger
from manylora.models.refusals import refusing
from manylora.models.stages import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "INDEX",
    "StoredTensor",
    "auto_class",
    "causal_class_names",
    "config_json",
    "has_more_than_text",
    "load_model",
    "load_tokenizer",
    "names_in",
    "num_parameters",
    "read_config",
    "read_encoder_config",
    "read_speech_config",
    "refuse_coded",
    "some",
    "stored_tensors",
    "weight_files",
]

_log = get_logger("manylora.models")
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
    "spiece.model",
    "tekken.json",
)
_UNPACKED = "mxfp4"  # gpt-oss as it is published
_PACKED = re.compile(r"_(blocks|scales)$")  # two numbers of 4 bits in a byte, and the exponents of 32 at a time
_SHOWN = 4  # names listed in one message
_NUMBERS = frozenset({"BF16", "F16", "F32", "F64"})
_OLD_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|(attn|attention)\.(masked_bias|causal_mask))$")
_OLD_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def read_config(folder: Path, *, to_serve: bool = False) -> "PretrainedConfig":
    """The config of a causal language model. Raises ModelUnusable for anything else.

    With `to_serve` also of what is served and cannot be written again as it is: a vision-language model, of which the
    text part is, and one with experts in MXFP4, which loading unpacks.
    """
    config = _read(folder, may_unpack=to_serve)
    if not (to_serve and _is_vision_language(config)):
        _require_causal(folder, config)
    return config


def auto_class(config: "PretrainedConfig") -> Any:
    """Transformers' Auto class by which a model with this config is loaded."""
    import transformers

    if _is_vision_language(config):
        return transformers.AutoModelForImageTextToText
    return _part_class(config) or transformers.AutoModelForCausalLM


def _part_class(config: Any) -> Any | None:
    """The class of a causal language model that is a part of a larger one and has no Auto class; None for others."""
    import transformers

    if causal_class_names(config.model_type):
        return None
    found = [getattr(transformers, str(name), None) for name in getattr(config, "architectures", None) or ()]
    return next((each for each in found if _is_causal_part(each, config)), None)


def _is_causal_part(named: Any, config: Any) -> bool:
    return getattr(named, "config_class", None) is type(config) and named.__name__.endswith("ForCausalLM")


def _is_vision_language(config: Any) -> bool:
    """Whether the checkpoint is a model of images and text, which says so, or is of a type that is nothing else."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    wanted = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    causal, stated = _causal_classes(config), set(getattr(config, "architectures", None) or ())
    return wanted is not None and not causal & stated and (wanted in stated or not (causal or stated))


def read_encoder_config(folder: Path) -> "PretrainedConfig":
    """The config of a model of any kind that is not encoder and decoder in one. Raises ModelUnusable."""
    return _read(folder)


def read_speech_config(folder: Path) -> "PretrainedConfig":
    """The config of a model of speech, which is encoder and decoder in one. Raises ModelUnusable."""
    return _read(folder, has_encoder=True)


def _read(folder: Path, *, may_unpack: bool = False, has_encoder: bool = False) -> "PretrainedConfig":
    import transformers

    raw = config_json(folder)
    _refuse_others(folder, raw, may_unpack=may_unpack, has_encoder=has_encoder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a class of config checks its own values, and raises what it likes
        if not _is_known(raw.get("model_type")):
            raise ModelUnusable(
                f"{folder}: transformers {transformers.__version__} has no model of type {raw.get('model_type')!r}, "
                "and code shipped with a model is never run. Choose another model, or a newer transformers."
            ) from error
        raise ModelUnusable(f"{folder / 'config.json'} is not usable: {error}") from error
    if isinstance(quantized := raw.get("quantization_config"), dict):
        config.quantization_config = {**quantized, "dequantize": True}
    return config


def config_json(folder: Path) -> dict[str, Any]:
    """The config's JSON object. Raises ModelUnusable."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / CONFIG_FILE).is_file():
            hint = "It is an adapter: give its parent folder with --adapters, and the base as MODEL."
        elif files := sorted(folder.glob("*.gguf")):
            hint = f"For a GGUF model give the file: {files[0]}."
        else:
            hint = "Give the folder of a Hugging Face checkpoint."
        raise ModelUnusable(f"{folder} has no config.json. {hint}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelUnusable(f"{path} is no JSON object.")
    return raw


def _refuse_others(folder: Path, raw: dict[str, Any], *, may_unpack: bool, has_encoder: bool) -> None:
    if raw.get("is_encoder_decoder") and not has_encoder:
        raise ModelUnusable(
            f"{folder} holds an encoder-decoder model. Of these Whisper is served, and no language model."
        )
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict) and not (may_unpack and quantized.get("quant_method") == _UNPACKED):
        method = quantized.get("quant_method", "an unnamed method")
        raise ModelUnusable(
            f"{folder} is quantised with {method}, which is not supported. Give the unquantised checkpoint."
        )


def _is_known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _causal_classes(config: Any) -> set[str]:
    """The classes of causal language models that transformers has for a config's type, or for that part."""
    part = _part_class(config)
    return causal_class_names(config.model_type) if part is None else {part.__name__}


def causal_class_names(model_type: str) -> set[str]:
    """The classes of causal language models that transformers has for a type of model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return {wanted} if isinstance(wanted, str) else set(wanted or ())


def _require_causal(folder: Path, config: Any) -> None:
    classes = _causal_classes(config)
    stated = list(getattr(config, "architectures", None) or ())
    if not classes or (stated and not classes & set(stated)) or _is_encoder(config):
        raise _not_causal(folder, config)


def _is_encoder(config: Any) -> bool:
    """Whether the attention says that it looks ahead, as in BERT's relatives unless the config has `is_decoder`.

    GPT-NeoX has that field too and never looks ahead. Where the attention says nothing, see `_looks_ahead`.
    """
    import torch
    import transformers

    if getattr(config, "is_decoder", True) is not False:
        return False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    said = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    return said == {False}


def _kind(config: Any) -> str:
    return ", ".join(getattr(config, "architectures", None) or ()) or str(config.model_type)


def has_more_than_text(config: Any) -> bool:
    """Whether a model with this config also sees or hears."""
    return any(sense in part for part in _parts(config) for sense in ("vision", "audio"))


def _parts(config: Any) -> list[str]:
    return [str(name) for name in getattr(config, "sub_configs", None) or () if getattr(config, name, None) is not None]


def _not_causal(folder: Path, config: Any) -> ModelUnusable:
    parts = _parts(config)
    for sense, what in (("vision", "a vision-language model"), ("audio", "a model of speech or sound")):
        if any(sense in part for part in parts):
            return ModelUnusable(
                f"{folder} holds {_kind(config)}, {what}. Only language models are served: give a text model's "
                "checkpoint."
            )
    what = "which is no causal language model"
    if _kind(config).endswith("ForCausalLM") and not _causal_classes(config):
        what = "a part of a larger model, which transformers does not load by itself"
    return ModelUnusable(f"{folder} holds {_kind(config)}, {what}. Choose a decoder-only one.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all present. Raises ModelUnusable."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelUnusable(f"{folder / INDEX} is not usable: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelUnusable(f"{folder} lacks {some(missing)}. Fetch the checkpoint again.")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ModelUnusable(
            f"{folder} has its weights as pickles only, which can run code when read. "
            "Convert them to safetensors (`model.save_pretrained` in transformers does it)."
        )
    raise ModelUnusable(f"{folder} has no weights: neither {_SINGLE} nor {INDEX}.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file's header says of a tensor. `dtype` is the format's name for it: "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    def is_harmless(self, name: str) -> bool:
        """Whether it is a buffer that older releases of transformers saved and newer ones compute."""
        return _OLD_BUFFER.search(name) is not None or (_OLD_MASK.search(name) is not None and len(self.shape) == 4)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by name, from the files' headers. Raises ModelUnusable."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    view = file.get_slice(name)
                    found[name] = StoredTensor(str(view.get_dtype()), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelUnusable(f"{path} is no whole safetensors file: {error}. Fetch the checkpoint again.") from error
    return found


def names_in(path: Path) -> list[str]:
    """The names of a file's tensors. Raises ModelUnusable."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelUnusable(f"{path} is no whole safetensors file: {error}. Fetch the checkpoint again.") from error


def num_parameters(folder: Path) -> int:
    """Numbers in the checkpoint's tensors, from the files' headers. Raises ModelUnusable."""
    return sum(
        prod(tensor.shape) * (2 if tensor.dtype == "U8" and name.endswith("_blocks") else 1)
        for name, tensor in stored_tensors(folder).items()
    )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Raises ModelUnusable where there is none, or one that needs code from the folder."""
    import transformers

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelUnusable(f"{folder} has no tokenizer (tokenizer.json). Copy the tokenizer's files beside the model.")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelUnusable(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def load_model(folder: Path, config: "PretrainedConfig", dtype: "torch.dtype") -> "PreTrainedModel":
    """The model on the CPU, every weight from the files; of one that also sees, the text part. Raises ModelUnusable."""
    stored = stored_tensors(folder)
    is_unpacked = getattr(config, "quantization_config", None) is not None
    refuse_coded(folder, {name: each for name, each in stored.items() if not (is_unpacked and _PACKED.search(name))})
    model, info = from_folder(auto_class(config), folder, config, dtype)
    # transformers fills what the files lack with random numbers and goes on.
    if missing := sorted(str(name) for name in info["missing_keys"]):
        raise ModelUnusable(f"The weights in {folder} lack {some(missing)}. Fetch the checkpoint again.")
    if mismatched := sorted(str(entry[0]) for entry in info.get("mismatched_keys", ())):
        raise ModelUnusable(f"The weights in {folder} do not fit its config.json: {some(mismatched)}.")
    unused = sorted(str(name) for name in info["unexpected_keys"])
    if unused := [name for name in unused if name not in stored or not stored[name].is_harmless(name)]:
        raise ModelUnusable(
            f"No part of {_kind(config)} uses {some(unused)} of the weights in {folder}, so its answers would be "
            "others than those the checkpoint was made for. Give the original, unquantised checkpoint."
        )
    if getattr(config, "is_decoder", True) is False and _looks_ahead(model):
        raise _not_causal(folder, config)
    from manylora.models.text_part import put_aside

    with refusing(model, "its text part was looked for"):
        if aside := put_aside(model):
            _log.info("text_part", left_aside=aside)
    return model


def from_folder(
    kind: Any, folder: Path, config: "PretrainedConfig", dtype: "torch.dtype"
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """What transformers' `kind` (an Auto class) makes of the folder's safetensors, and its report of the names.

    Raises ModelUnusable.
    """
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # of a model's own code
        raise ModelUnusable(f"The model in {folder} cannot be loaded: {error}") from error
    return model, info


def refuse_coded(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Raises ModelUnusable for numbers of 8 bits and fewer.

    They mean something by their scales only, and a cast would leave those out.
    """
    coded = sorted(n for n, tensor in stored.items() if tensor.dtype not in _NUMBERS and not tensor.is_harmless(n))
    if coded:
        kinds = ", ".join(sorted({stored[name].dtype for name in coded}))
        raise ModelUnusable(
            f"{folder} stores {some(coded)} as {kinds}: it is quantised, in a form that is not supported. "
            "Give the unquantised checkpoint."
        )


def _looks_ahead(model: "PreTrainedModel") -> bool:
    """Whether another last token changes the logits of the tokens before it: an encoder, whatever it is called."""
    import torch

    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    other = ids.clone()
    other[0, -1] = 0
    with torch.inference_mode():
        # One call each, alike in everything but that token: nothing is rounded in another order.
        first, second = (model.eval()(input_ids=row).logits[:, :-1] for row in (ids, other))
    tolerance = 4 * torch.finfo(first.dtype).eps * float(first.float().std())
    return float((first - second).abs().max()) > tolerance


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
