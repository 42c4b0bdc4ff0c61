"""GGUF files become Hugging Face folders: dequantised once, kept as bfloat16 safetensors."""

import re
from pathlib import Path
from typing import Any

from manylora.errors import ModelUnusable
from manylora.models import gguf_config
from manylora.models.gguf_config import GgufFile
from manylora.models.model_cache import ModelCache, file_digest
from manylora.models.stages import Stages, quiet

__all__ = ["convert", "ensure_converted", "is_gguf"]

_MAGIC = b"GGUF"
# Raised when the same file is converted into something else, so that what is in the caches is made anew.
_CONVERSION = 2
_SHOWN = 4
# The frequencies of the rotary embedding, which the config gives already.
_HARMLESS = re.compile(r"^blk\.\d+\.attn_rot_embd\.weight$")
# Names of `tokenizer.ggml.pre` beside those that transformers knows.
_DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_AS_GPT2 = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"})
# Control tokens that end a turn in every vocabulary that has them; older files name them nowhere else.
_ENDS_OF_TURNS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "penalty_repeat": "repetition_penalty"}


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def ensure_converted(path: Path, cache: ModelCache) -> Path:
    """The folder of the dequantised model, found again by the file's content. Raises ModelUnusable."""
    with Stages() as stages:
        with stages.step(f"Reading {path.name}"):
            name = f"{slug(path.stem)}-{file_digest(path)[:16]}-{_CONVERSION}"

        def build(folder: Path) -> None:
            with stages.step(f"Dequantising {path.name}"):
                convert(path, folder)

        return cache.get(name, build, on_wait=lambda: stages.say("Another start is dequantising it; waiting"))


def convert(path: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file in `folder`.

    Raises ModelUnusable where the file is damaged, or says something of the model that cannot be followed.
    """
    import transformers

    try:
        with quiet():
            file = gguf_config.read_file(path)
            model, tokenizer = _load(file), _tokenizer(file)
            _set_generation(file, model, tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ModelUnusable, OSError):
        raise
    except Exception as error:  # of a damaged file, or of a model's own code, which raises anything
        raise ModelUnusable(
            f"{path} cannot be dequantised by transformers {transformers.__version__}: {_short(error)}. "
            "Serve the original Hugging Face checkpoint instead."
        ) from error


def _load(file: GgufFile) -> Any:
    """The model in bfloat16, with every tensor of the file in it."""
    import torch
    import transformers

    where: dict[str, Any] = {"gguf_file": file.path.name, "local_files_only": True}
    read, _ = transformers.PretrainedConfig.get_config_dict(file.path.parent, **where)
    config = gguf_config.config_of(file, read)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.path.parent,
        config=config,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
        **where,
    )
    if missing := sorted(info["missing_keys"] | {entry[0] for entry in info["mismatched_keys"]}):
        raise file.refusal(f"has no tensor of the right size for {_some(missing)}.")
    if unused := sorted(info["unexpected_keys"] | _unread(file, model)):
        raise file.refusal(f"holds tensors that nothing in {config.model_type} uses: {_some(unused)}.")
    return model


def _unread(file: GgufFile, model: Any) -> set[str]:
    """Tensors that transformers' reader of this architecture passes over, but for those read into the config."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if file.architecture in GGUF_CONFIG_ARCHS:  # its reader of these reports them itself
        return set()
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    read = get_gguf_hf_weights_map(model, processor).keys()
    # Of experts the map has the name alone.
    stems = {name for name in file.tensors if name in read or name.removesuffix(".weight") in read}
    known = {name for name in file.tensors if _HARMLESS.search(name)}
    return set(file.tensors - stems - known) - set(gguf_config.ROPE_TENSORS)


def _short(error: Exception) -> str:
    """What transformers says, in one line, without its full stop."""
    return (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(". ")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _tokenizer(file: GgufFile) -> Any:
    """The tokenizer as transformers builds it, with text split as the file's `tokenizer.ggml.pre` says."""
    import transformers
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        file.path.parent, gguf_file=file.path.name, local_files_only=True
    )
    splitting = file.metadata.get("tokenizer.ggml.pre", "default")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or splitting in GGUF_PRE_TOKENIZER_SPLITS:
        return tokenizer
    if splitting in _DIGIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif splitting not in _AS_GPT2:
        raise file.refusal(f"splits text by the rules of {splitting!r}, which are not known here.")
    return tokenizer


def _set_generation(file: GgufFile, model: Any, tokenizer: Any) -> None:
    """All tokens that end an answer, and the sampling that the file recommends. transformers reads one end only."""
    generation = model.generation_config
    ends = generation.eos_token_id
    ids = list(ends) if isinstance(ends, list) else [ends]
    ids += [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids += [special.get(name) for name in _ENDS_OF_TURNS]
    if found := list(dict.fromkeys(int(number) for number in ids if number is not None)):
        generation.eos_token_id = found if len(found) > 1 else found[0]
    for key, name in _SAMPLING.items():
        value = file.metadata.get(f"general.sampling.{key}")
        if value is not None:
            setattr(generation, name, value)
            generation.do_sample = True


def slug(text: str) -> str:
    """A file or model name in the characters that names of adapters and models use."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model"
