"""A tiny Llama base, a sound adapter for it, and every way we know to break one.

`MALFORMED` lists (name, builder, code): the builder writes a folder whose validation must give at least one
problem with that code. Nothing here needs torch or PEFT, so upload tests can use it as well.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.reader import ModuleSpec

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Builder = Callable[[Path], None]

# Arguments for transformers' LlamaConfig that make the base described by `tiny_modules`.
TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
PREFIX = "base_model.model."
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8", "uint16": "BF16"}


def tiny_modules(*, layers: int = 2, hidden: int = 16, vocab: int = 64) -> dict[str, ModuleSpec]:
    """The adaptable modules of a `TINY_LLAMA`, by path."""
    mlp, kv = hidden * 3 // 2, hidden // 2
    widths = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, mlp), "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }  # fmt: skip
    specs = [ModuleSpec("model.embed_tokens", "embedding", vocab, hidden)]
    specs += [
        ModuleSpec(f"model.layers.{layer}.{name}", "linear", inside, outside)
        for layer in range(layers)
        for name, (inside, outside) in widths.items()
    ]
    specs.append(ModuleSpec("lm_head", "linear", hidden, vocab))
    return {spec.path: spec for spec in specs}


def config(**changes: Any) -> dict[str, Any]:
    """A sound config, with `changes`; a change to `...` removes the key."""
    sound = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny", "modules_to_save": None,
        "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True,
    }  # fmt: skip
    return {key: value for key, value in {**sound, **changes}.items() if value is not ...}


def tensors(paths: dict[str, int] | None = None, modules: dict[str, ModuleSpec] | None = None) -> Tensors:
    """Random pairs for `paths` (path to rank); without it for what `config()` targets."""
    modules = modules or tiny_modules()
    ranks = paths or {path: 4 for path in modules if path.endswith(("q_proj", "v_proj"))}
    draw = np.random.default_rng(0)
    result: Tensors = {}
    for path, rank in ranks.items():
        spec = modules[path]
        a, b = ("lora_embedding_A", "lora_embedding_B") if spec.kind == "embedding" else ("lora_A", "lora_B")
        end = "" if spec.kind == "embedding" else ".weight"
        result[f"{PREFIX}{path}.{a}{end}"] = draw.standard_normal((rank, spec.in_features), dtype=np.float32)
        result[f"{PREFIX}{path}.{b}{end}"] = draw.standard_normal((spec.out_features, rank), dtype=np.float32)
    return result


def layout(arrays: Tensors) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file. uint16 arrays are stored as BF16."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in arrays.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(blob)],
        }
        data += blob
    return header, data


def safetensors(header: dict[str, Any] | str | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A file of these parts, sound or not; `length` is what it claims its header to have."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write(folder: Path, arrays: Tensors | bytes | None = None, configuration: Any = None) -> None:
    """An adapter's two files; by default a sound adapter. `bytes` are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = config() if configuration is None else configuration
    text = configuration if isinstance(configuration, bytes) else json.dumps(configuration).encode()
    (folder / CONFIG_FILE).write_bytes(text)
    arrays = tensors() if arrays is None else arrays
    (folder / TENSOR_FILE).write_bytes(arrays if isinstance(arrays, bytes) else safetensors(*layout(arrays)))


def _with_config(**changes: Any) -> Builder:
    return lambda folder: write(folder, None, config(**changes))


def _with_text(text: bytes) -> Builder:
    return lambda folder: write(folder, None, text)


def _with_file(data: bytes) -> Builder:
    return lambda folder: write(folder, data)


def _with_tensors(change: Callable[[Tensors], Tensors], **changes: Any) -> Builder:
    return lambda folder: write(folder, change(tensors()), config(**changes))


def _with_header(change: Callable[[dict[str, Any], bytes], bytes]) -> Builder:
    return lambda folder: write(folder, change(*layout(tensors())))


def _without(name: str) -> Builder:
    def build(folder: Path) -> None:
        write(folder)
        (folder / name).unlink()

    return build


def _pipe(folder: Path) -> None:
    write(folder)
    (folder / TENSOR_FILE).unlink()
    os.mkfifo(folder / TENSOR_FILE)


def _pickled(folder: Path) -> None:
    write(folder)
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")


_A, _B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def _set(**arrays: Array) -> Callable[[Tensors], Tensors]:
    """Replaces Q0's A (`a=`) or B (`b=`)."""
    names = {"a": _A, "b": _B}
    return lambda t: {**t, **{names[key]: value for key, value in arrays.items()}}


def _poke(value: float, dtype: str = "float32") -> Callable[[Tensors], Tensors]:
    def change(t: Tensors) -> Tensors:
        array = t[_B].astype(dtype)
        array[3, 1] = value
        return {**t, _B: array}

    return change


def _bf16_nan(t: Tensors) -> Tensors:
    array = (t[_B].view(np.uint32) >> 16).astype(np.uint16)
    array[0, 0] = 0x7FC0
    return {**t, _B: array}


def _drop(end: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: array for name, array in t.items() if not name.endswith(end)}


def _rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {name.replace(old, new): array for name, array in t.items()}


def _zero(part: str, zero: float = 0.0) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: np.full_like(array, zero) if part in name else array for name, array in t.items()}


def _rank_65(folder: Path) -> None:
    write(folder, tensors({Q0: 65}), config(r=65, target_modules=[Q0]))


def _entry(**fields: Any) -> Builder:
    """Changes fields of the first tensor's header entry."""

    def change(header: dict[str, Any], data: bytes) -> bytes:
        header[_A] = {**header[_A], **fields}
        return safetensors(header, data)

    return _with_header(change)


def _hole(header: dict[str, Any], data: bytes) -> bytes:
    for entry in list(header.values())[1:]:
        entry["data_offsets"] = [n + 4 for n in entry["data_offsets"]]
    return safetensors(header, data + b"\0" * 4)


def _overlap(header: dict[str, Any], data: bytes) -> bytes:
    names = list(header)
    span = header[names[0]]["data_offsets"]
    header[names[0]]["shape"] = [span[1] // 4]
    header[names[1]]["shape"] = [span[1] // 4]
    header[names[1]]["data_offsets"] = span
    return safetensors(header, data)


def _twice(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header)
    return safetensors(f"{text[:-1]}, {json.dumps(_A)}: {json.dumps(header[_A])}}}", data)


def _metadata(header: dict[str, Any], data: bytes) -> bytes:
    return safetensors({**header, "__metadata__": {"format": 1}}, data)


def _other_base(**sizes: int) -> Builder:
    return lambda folder: write(folder, tensors(modules=tiny_modules(**sizes)))


def _gpt2(folder: Path) -> None:
    arrays = {
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight": np.ones((4, 16), np.float32),
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.weight": np.ones((48, 4), np.float32),
    }
    write(folder, arrays, config(target_modules=["c_attn"]))


def _resized_vocabulary(folder: Path) -> None:
    modules = tiny_modules(vocab=70)
    ranks = {"model.embed_tokens": 4, "lm_head": 4}
    write(folder, tensors(ranks, modules), config(target_modules=["embed_tokens", "lm_head"]))


MALFORMED: list[tuple[str, Builder, str]] = [
    # the folder
    ("empty folder", lambda folder: folder.mkdir(parents=True, exist_ok=True), "missing_file"),
    ("no config", _without(CONFIG_FILE), "missing_file"),
    ("no tensors", _without(TENSOR_FILE), "missing_file"),
    ("tensors are a pipe", _pipe, "missing_file"),
    ("a pickle instead", _pickled, "not_safetensors"),
    # the tensor file's frame
    ("empty file", _with_file(b""), "not_safetensors"),
    ("seven bytes", _with_file(b"\0" * 7), "not_safetensors"),
    ("a pickle", _with_file(b"\x80\x04\x95cposix\nsystem\n"), "not_safetensors"),
    ("a torch zip", _with_file(b"PK\x03\x04" + b"\0" * 64), "not_safetensors"),
    ("a Git LFS pointer", _with_file(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "not_safetensors"),
    ("header longer than the file", _with_header(lambda h, d: safetensors(h, d, length=10**6)), "not_safetensors"),
    ("header size bomb", _with_header(lambda h, d: safetensors(h, d, length=2**63)), "not_safetensors"),
    ("header cut short", _with_header(lambda h, d: safetensors(h, d, length=40)), "not_safetensors"),
    ("header is a list", _with_file(safetensors("[]", b"")), "not_safetensors"),
    ("header begins with space", _with_file(safetensors(" {}", b"")), "not_safetensors"),
    ("header is not UTF-8", _with_file(safetensors(b'{"\xff": 1}', b"")), "not_safetensors"),
    ("header nested deep", _with_file(safetensors('{"a":' * 5000 + "1" + "}" * 5000, b"")), "not_safetensors"),
    ("header has NaN", _with_file(safetensors('{"a": NaN}', b"")), "not_safetensors"),
    ("truncated data", _with_header(lambda h, d: safetensors(h, d[:-8])), "not_safetensors"),
    ("bytes at the end", _with_header(lambda h, d: safetensors(h, d + b"pad")), "not_safetensors"),
    ("a hole", _with_header(_hole), "not_safetensors"),
    ("overlapping offsets", _with_header(_overlap), "not_safetensors"),
    ("a tensor twice", _with_header(_twice), "not_safetensors"),
    ("offsets reversed", _entry(data_offsets=[256, 0]), "not_safetensors"),
    ("offsets negative", _entry(data_offsets=[-256, 0]), "not_safetensors"),
    ("offsets not numbers", _entry(data_offsets=["0", "256"]), "not_safetensors"),
    ("shape lies", _entry(shape=[4, 17]), "not_safetensors"),
    ("shape overflows", _entry(shape=[2**62, 2**62, 4]), "not_safetensors"),
    ("shape is true", _entry(shape=[True, 64]), "not_safetensors"),
    ("dtype unknown", _entry(dtype="F31"), "not_safetensors"),
    ("dtype lies", _entry(dtype="F16"), "not_safetensors"),
    ("an entry too much", _entry(stride=[1]), "not_safetensors"),
    ("metadata not text", _with_header(_metadata), "not_safetensors"),
    # the config's frame
    ("config empty", _with_text(b""), "bad_config"),
    ("config is a list", _with_text(b"[]"), "bad_config"),
    ("config not UTF-8", _with_text(b'{"r": "\xff"}'), "bad_config"),
    ("config has NaN", _with_text(b'{"lora_alpha": NaN}'), "bad_config"),
    ("config has Infinity", _with_text(b'{"lora_alpha": 1e999}'), "bad_config"),
    ("config has a key twice", _with_text(b'{"r": 4, "r": 8}'), "bad_config"),
    ("config nested deep", _with_text(b'{"a":' * 20000 + b"1" + b"}" * 20000), "bad_config"),
    ("config nested", _with_text(b'{"a":' * 40 + b"1" + b"}" * 40), "bad_config"),
    ("config has half a surrogate", _with_text(b'{"r": "\\ud800"}'), "bad_config"),
    ("config has a number of 5000 digits", _with_text(b'{"r": ' + b"9" * 5000 + b"}"), "bad_config"),
    ("config of 2 MiB", _with_text(b'{"a": "' + b"a" * 2**21 + b'"}'), "bad_config"),
    # the config's fields
    ("no peft_type", _with_config(peft_type=...), "bad_config"),
    ("no rank", _with_config(r=...), "bad_config"),
    ("rank is null", _with_config(r=None), "bad_config"),
    ("alpha is null", _with_config(lora_alpha=None), "bad_config"),
    ("rank 0", _with_config(r=0), "bad_config"),
    ("rank negative", _with_config(r=-4), "bad_config"),
    ("rank is text", _with_config(r="4"), "bad_config"),
    ("rank is a fraction", _with_config(r=4.5), "bad_config"),
    ("rank is true", _with_config(r=True), "bad_config"),
    ("rank huge", _with_config(r=10**12), "rank_too_large"),
    ("alpha is text", _with_config(lora_alpha="16"), "bad_config"),
    ("dropout is text", _with_config(lora_dropout="none"), "bad_config"),
    ("use_rslora is text", _with_config(use_rslora="yes"), "bad_config"),
    ("rank_pattern is a list", _with_config(rank_pattern=["q_proj"]), "bad_config"),
    ("rank_pattern holds 0", _with_config(rank_pattern={"q_proj": 0}), "bad_config"),
    ("rank_pattern is no expression", _with_config(rank_pattern={"(q_proj": 4}), "bad_config"),
    ("alpha_pattern holds text", _with_config(alpha_pattern={"q_proj": "8"}), "bad_config"),
    ("no targets", _with_config(target_modules=...), "bad_config"),
    ("targets empty", _with_config(target_modules=[]), "bad_config"),
    ("bias is another word", _with_config(bias="some"), "bad_config"),
    ("modules_to_save is text", _with_config(modules_to_save="lm_head"), "bad_config"),
    ("targets are numbers", _with_config(target_modules=[1, 2]), "bad_config"),
    ("target pattern is no expression", _with_config(target_modules="*q_proj"), "bad_config"),
    ("target pattern runs for ever", _with_config(target_modules=r"(.|..)*(.|..)*\1\2[!?]"), "bad_config"),
    ("target pattern is a repeat bomb", _with_config(target_modules="(?:(?:a{999}){999}){999}"), "bad_config"),
    ("layers with a pattern", _with_config(target_modules=".*_proj", layers_to_transform=[0]), "bad_config"),
    ("layers_pattern alone", _with_config(layers_pattern="layers"), "bad_config"),
    ("layers are text", _with_config(layers_to_transform=["0"]), "bad_config"),
    ("initialisation unknown", _with_config(init_lora_weights="magic"), "bad_config"),
    ("task unknown", _with_config(task_type="POETRY"), "bad_config"),
    ("a key unknown", _with_config(lora_gamma=2), "unknown_config_key"),
    # what is not served
    ("X-LoRA", _with_config(peft_type="XLORA"), "unsupported_feature"),
    ("Poly", _with_config(peft_type="POLY"), "unsupported_feature"),
    ("multitask prompt tuning", _with_config(peft_type="MULTITASK_PROMPT_TUNING"), "unsupported_feature"),
    ("a method of another year", _with_config(peft_type="NEXT"), "unsupported_feature"),
    ("layer replication", _with_config(layer_replication=[[0, 1], [0, 2]]), "unsupported_feature"),
    ("Megatron", _with_config(megatron_config={"a": 1}), "unsupported_feature"),
    ("PiSSA", _with_config(init_lora_weights="pissa_niter_16"), "unsupported_feature"),
    ("CorDA", _with_config(init_lora_weights="corda"), "unsupported_feature"),
    ("LoftQ", _with_config(init_lora_weights="loftq"), "unsupported_feature"),
    ("LoRA-GA", _with_config(init_lora_weights="lora_ga"), "unsupported_feature"),
    ("aLoRA of DoRA", _with_config(alora_invocation_tokens=[5], use_dora=True), "unsupported_feature"),
    ("aLoRA of text", _with_config(alora_invocation_tokens="<|assistant|>"), "bad_config"),
    ("aLoRA of a token that is not there", _with_config(alora_invocation_tokens=[10**6]), "base_mismatch"),
    ("Arrow", _with_config(arrow_config={"top_k": 2}), "unsupported_feature"),
    ("BD-LoRA", _with_config(use_bdlora={"nblocks": 2}), "unsupported_feature"),
    ("KaSA", _with_config(kasa_config={"beta": 0.1}), "unsupported_feature"),
    ("MonteCLoRA", _with_config(monteclora_config={"num_samples": 8}), "unsupported_feature"),
    ("a classifier of tokens", _with_config(task_type="TOKEN_CLS"), "unsupported_feature"),
    # names
    ("targets that no base has", _with_config(target_modules=["c_attn", "q_porj"]), "unmatched_module"),
    ("pattern that matches nothing", _with_config(target_modules=r".*\.c_attn"), "unmatched_module"),
    ("layers that the base lacks", _with_config(layers_to_transform=[7, 9]), "unmatched_module"),
    ("foreign module", _with_tensors(_rename("layers.1.", "layers.x.")), "unmatched_module"),
    ("A without B", _with_tensors(_drop("layers.1.self_attn.q_proj.lora_B.weight")), "missing_tensor"),
    ("B without A", _with_tensors(_drop("layers.0.self_attn.v_proj.lora_A.weight")), "missing_tensor"),
    ("DoRA without magnitudes", _with_config(use_dora=True), "missing_tensor"),
    ("lora_bias without biases", _with_config(lora_bias=True), "missing_tensor"),
    ("modules_to_save without them", _with_config(modules_to_save=["lm_head"]), "missing_tensor"),
    ("trained tokens without rows", _with_config(trainable_token_indices=[1, 2]), "missing_tensor"),
    ("IA3 of LoRA's tensors", _with_config(peft_type="IA3"), "missing_tensor"),
    ("a layer without tensors", _with_config(target_modules=["q_proj", "v_proj", "o_proj"]), "missing_tensor"),
    ("no tensor at all", _with_file(safetensors({}, b"")), "missing_tensor"),
    ("tensors that no target asks for", _with_config(target_modules=["q_proj"]), "unexpected_tensor"),
    ("tensors of an excluded module", _with_config(exclude_modules=[V1]), "unexpected_tensor"),
    ("magnitudes without DoRA", _with_tensors(lambda t: {**t, f"{PREFIX}{V1}.lora_magnitude_vector": np.ones(16)}),
     "unexpected_tensor"),
    ("a bare weight", _with_tensors(lambda t: {**t, "lm_head.weight": t[_A]}), "unexpected_tensor"),
    ("a pair twice", _with_tensors(lambda t: {**t, _A.removeprefix(PREFIX): t[_A]}), "unexpected_tensor"),
    ("embedding pair on a linear", _with_tensors(_rename("lora_A.weight", "lora_embedding_A")), "unexpected_tensor"),
    # shapes and values
    ("rank of a pair differs", _with_tensors(_set(a=np.ones((8, 16), np.float32))), "wrong_shape"),
    ("A transposed", _with_tensors(_set(a=np.ones((16, 4), np.float32))), "wrong_shape"),
    ("width of one module differs", _with_tensors(_set(a=np.ones((4, 20), np.float32))), "wrong_shape"),
    ("one dimension", _with_tensors(_set(b=np.ones(64, np.float32))), "wrong_shape"),
    ("an empty tensor", _with_tensors(_set(b=np.ones((0, 4), np.float32))), "wrong_shape"),
    ("rank_pattern disagrees", _with_config(rank_pattern={"q_proj": 2}), "wrong_shape"),
    ("float64", _with_tensors(_set(a=np.ones((4, 16), np.float64))), "wrong_dtype"),
    ("int8", _with_tensors(_set(a=np.ones((4, 16), np.int8))), "wrong_dtype"),
    ("NaN", _with_tensors(_poke(float("nan"))), "not_finite"),
    ("infinity", _with_tensors(_poke(float("-inf"))), "not_finite"),
    ("NaN in float16", _with_tensors(_poke(float("nan"), "float16")), "not_finite"),
    ("NaN in bfloat16", _with_tensors(_bf16_nan), "not_finite"),
    ("rank above the limit", _rank_65, "rank_too_large"),
    ("B all zero", _with_tensors(_zero("lora_B")), "no_effect"),
    ("A all zero", _with_tensors(_zero("lora_A")), "no_effect"),
    ("B all minus zero", _with_tensors(_zero("lora_B", -0.0)), "no_effect"),
    ("alpha 0", _with_config(lora_alpha=0), "no_effect"),
    # another base
    ("a wider base", _other_base(hidden=32), "base_mismatch"),
    ("a deeper base", _other_base(layers=4), "base_mismatch"),
    ("a shallower base", _other_base(layers=1), "base_mismatch"),
    ("another architecture", _gpt2, "base_mismatch"),
    ("a resized vocabulary", _resized_vocabulary, "base_mismatch"),
]  # fmt: skip
