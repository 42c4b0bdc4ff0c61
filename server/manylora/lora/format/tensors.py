"""A strict reader of safetensors files: the bytes of an upload are trusted for nothing.

The rules are those of the format's specification, and each is checked before a byte of data is touched:

    8 bytes    N, little-endian unsigned, the header's length
    N bytes    header: a JSON object in UTF-8 that begins with `{`, padded with spaces at the end
               {name: {"dtype", "shape", "data_offsets": [begin, end]}}, and optionally
               {"__metadata__": {text: text}}
    the rest   data; the tensors cover it exactly, without holes, overlaps or a rest

The library `safetensors` stops at the first fault; here every fault of a header is collected.
"""

import mmap
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.identity import TENSOR_FILE
from manylora.lora.format import strict_json
from manylora.lora.format.problems import Problems, shown

MAX_HEADER_BYTES = 8 * 2**20
MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 512
_PREFIX_BYTES = 8

# Bits per element, of every dtype that the format knows.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
_DISGUISES = {
    b"PK\x03\x04": "a zip archive, most likely a pickled PyTorch file",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the real file with `git lfs pull`",
    b"\x1f\x8b": "gzip data",
}


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor's bytes in place: little-endian, row-major, read-only, not necessarily aligned.

    `dtype` is the format's name; in a validated adapter it is "BF16", "F16" or "F32". `data` keeps the
    mapped file alive; the file must not be shortened while a view of it is in use.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def values(self, _base: object = None) -> npt.NDArray[np.float32]:
        """What `to_float32` gives: a file's numbers do not depend on the base's."""
        return self.to_float32()

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values, converted, in a new array of `shape`. Raises KeyError for other dtypes than the three."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << 16
            return bits.view(np.float32).reshape(self.shape)
        stored = {"F16": "<f2", "F32": "<f4"}[self.dtype]
        return np.frombuffer(self.data, dtype=stored).astype(np.float32).reshape(self.shape)


def read_bytes(path: Path, limit: int) -> bytes:
    """At most `limit + 1` bytes of a regular file. Raises OSError, also for anything that is not a regular file."""
    descriptor = _open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit + 1)


def _open_regular(path: Path) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path.name} is not a regular file")


def map_file(path: Path) -> memoryview:
    """The file's bytes, mapped read-only; empty for an empty file. Raises OSError."""
    descriptor = _open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b"")
    finally:
        os.close(descriptor)


def parse(file: memoryview, problems: Problems) -> dict[str, TensorView] | None:
    """The tensors in `file` by name, or None with `not_safetensors` problems saying everything that is wrong."""
    header = _read_header(file, problems)
    if header is None:
        return None
    data = file[_PREFIX_BYTES + header[0] :]
    entries = header[1]
    if not _metadata_is_sound(entries.pop("__metadata__", {})):
        _fault(problems, "__metadata__", "it must be an object of texts")
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorView] = {}
    for name, entry in entries.items():
        fault = _entry_fault(name, entry, len(data))
        if fault:
            _fault(problems, name, fault)
            continue
        begin, end = entry["data_offsets"]
        spans.append((begin, end, name))
        tensors[name] = TensorView(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    if len(spans) == len(entries):
        for name, fault in _coverage_faults(sorted(spans), len(data)):
            _fault(problems, name, fault)
    return None if problems.has("not_safetensors") else tensors


def _fault(problems: Problems, name: str, message: str) -> None:
    problems.add("not_safetensors", f"{TENSOR_FILE}: {shown(name)}", f"{message[0].upper()}{message[1:]}.")


def _read_header(file: memoryview, problems: Problems) -> tuple[int, dict[str, Any]] | None:
    """The header's length and its JSON object."""
    start = bytes(file[:32])
    # A header's length may begin with the bytes of a pickle, but nothing else has the header's first brace behind it.
    is_plausible = start[_PREFIX_BYTES : _PREFIX_BYTES + 1] == b"{"
    disguise = next((what for magic, what in _DISGUISES.items() if start.startswith(magic) and not is_plausible), None)
    length = int.from_bytes(start[:_PREFIX_BYTES], "little")
    room = len(file) - _PREFIX_BYTES
    if disguise:
        reason = f"this is {disguise}"
    elif room < 2:
        reason = f"the file has only {len(file)} bytes"
    elif length > MAX_HEADER_BYTES:
        reason = f"it claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
    elif length > room:
        reason = (
            f"it claims a header of {length} bytes, but only {room} follow: the file is truncated or not safetensors"
        )
    elif start[_PREFIX_BYTES : _PREFIX_BYTES + 1] != b"{":
        reason = "its header does not begin with '{'"
    else:
        try:
            return length, strict_json.loads(bytes(file[_PREFIX_BYTES : _PREFIX_BYTES + length]))
        except strict_json.JsonFault as fault:
            reason = f"its header is not valid JSON: {fault}"
    problems.add(
        "not_safetensors",
        TENSOR_FILE,
        f"Not a safetensors file: {reason}. Save the adapter with PEFT's save_pretrained (safe_serialization=True).",
    )
    return None


def _metadata_is_sound(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry_fault(name: str, entry: Any, data_bytes: int) -> str | None:
    """What is wrong with one tensor's header entry, looked at alone."""
    if not name or len(name) > MAX_NAME_LENGTH:
        return f"a tensor's name must have 1 to {MAX_NAME_LENGTH} characters"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "its entry must hold dtype, shape and data_offsets and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"{shown(dtype)} is not a dtype of the safetensors format"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        return f"its shape must be a list of at most {MAX_DIMENSIONS} sizes, not {shown(shape)}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        return f"its data_offsets must be two positions, not {shown(offsets)}"
    begin, end = offsets
    if not begin <= end <= data_bytes:
        return f"its data_offsets {begin} to {end} lie outside the {data_bytes} bytes of data: the file is truncated"
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        return f"{dtype} {shown(shape)} takes {-(-bits // 8)} bytes, but its data_offsets span {end - begin}"
    return None


def _coverage_faults(spans: list[tuple[int, int, str]], data_bytes: int) -> Iterable[tuple[str, str]]:
    """Holes and overlaps between the tensors, sorted by offset, and bytes after the last."""
    position = 0
    for begin, end, name in spans:
        if begin < position:
            yield name, f"its data begins at {begin}, inside another tensor's, which ends at {position}"
        elif begin > position:
            yield name, f"{begin - position} bytes before its data belong to no tensor"
        position = max(position, end)
    if position < data_bytes:
        yield TENSOR_FILE, f"{data_bytes - position} bytes at its end belong to no tensor"
