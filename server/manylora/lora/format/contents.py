"""What the numbers of an adapter say: are they finite, do they do anything, what is their digest."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from manylora.identity import TENSOR_FILE
from manylora.lora.format.problems import Problems, listed, shown
from manylora.lora.format.spec import AdaptedModule, Dense, LowRank, Matrix, Reordered, Term
from manylora.lora.format.tensors import TensorView

# dtype -> (numpy's type of the raw bits, mask without the sign, smallest bit pattern that is not finite)
_BITS = {"BF16": ("<u2", 0x7FFF, 0x7F80), "F16": ("<u2", 0x7FFF, 0x7C00), "F32": ("<u4", 0x7FFFFFFF, 0x7F800000)}
SERVED_DTYPES = tuple(_BITS)
_CHUNK = 2**20
_Floats = npt.NDArray[np.float32]
_Round = Callable[[_Floats], _Floats]


def _as_they_are(values: _Floats) -> _Floats:
    return values


def _to_bfloat16(values: _Floats) -> _Floats:
    """To the nearest number, and of two to the even one, as torch does."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)


def _to_float16(values: _Floats) -> _Floats:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


# What an adapter's copy, and what the base, may have been rounded to: by the training, by who saved it, by both.
_ROUNDINGS: Final[tuple[tuple[_Round, _Round], ...]] = (
    (_as_they_are, _as_they_are),
    (_as_they_are, _to_bfloat16),
    (_as_they_are, _to_float16),
    (_to_bfloat16, _as_they_are),
    (_to_float16, _as_they_are),
    (_as_they_are, lambda values: _to_float16(_to_bfloat16(values))),
    (_as_they_are, lambda values: _to_bfloat16(_to_float16(values))),
)


@dataclass(frozen=True, slots=True)
class _Content:
    is_finite: bool
    is_zero: bool


def _scan(view: TensorView) -> _Content:
    """One pass over the raw bits, in chunks, so that a large file takes no extra memory."""
    stored, magnitude, infinity = _BITS[view.dtype]
    bits = np.frombuffer(view.data, dtype=stored)
    largest = 0
    for start in range(0, bits.size, _CHUNK):
        largest = max(largest, int((bits[start : start + _CHUNK] & magnitude).max()))
    return _Content(is_finite=largest < infinity, is_zero=largest == 0)


def check_values(
    tensors: Mapping[str, TensorView], problems: Problems, is_index: Callable[[str], bool] = lambda name: False
) -> None:
    """`wrong_dtype` and `not_finite`, for every tensor of the file but those of whole numbers."""
    for name, view in sorted(tensors.items()):
        if is_index(name):
            continue
        where = f"{TENSOR_FILE}: {shown(name)}"
        if view.dtype not in _BITS:
            problems.add("wrong_dtype", where, f"It is {view.dtype}; save it as {', '.join(SERVED_DTYPES)}.")
        elif not _scan(view).is_finite:
            problems.add("not_finite", where, "It holds NaN or infinity: the training diverged; train it again.")


def check_effect(modules: Sequence[AdaptedModule], problems: Problems, warnings: list[str]) -> None:
    """`no_effect` where every module's delta is zero; a warning where some are."""
    idle = [module.path for module in modules if all(map(_is_idle, module.terms))]
    if modules and len(idle) == len(modules):
        problems.add(
            "no_effect",
            TENSOR_FILE,
            "Every module's A or B is zero (or lora_alpha is 0), so it answers as the base does. Was it saved before "
            "it was trained?",
        )
    elif idle:
        warnings.append(f"{len(idle)} of {len(modules)} modules are zero and change nothing: {listed(idle, 3)}.")


def _is_idle(term: Term) -> bool:
    """Whether a term of the files' own numbers does nothing; of what is made of them the probe finds out."""
    match term:
        case LowRank():
            return term.scale == 0 or _is_zero(term.b) or _is_zero(term.a)
        case Dense():
            return _is_zero(term.matrix)
        case _:
            return False


def _is_zero(matrix: Matrix) -> bool:
    view = matrix.view if isinstance(matrix, Reordered) else matrix
    return isinstance(view, TensorView) and _scan(view).is_zero


def num_different(copy: TensorView, base: TensorView | None) -> int:
    """How many numbers of `copy` are not those of `base` (zeros for None); 0 where all are, but for a rounding.

    Training in 16 bits rounds the base's numbers, and saving may round the copy. Then one of the two is the other one
    in a 16-bit format, to the last bit. Being close is not enough: numbers that were trained a little are close too.
    """
    if copy.dtype not in _BITS or (base is not None and (base.dtype not in _BITS or base.shape != copy.shape)):
        return copy.numel
    fewest = copy.numel
    for of_copy, of_base in _ROUNDINGS:
        fewest = _num_different(copy, base, of_copy, of_base, fewest)
        if fewest == 0:
            break
    return fewest


def _num_different(copy: TensorView, base: TensorView | None, of_copy: _Round, of_base: _Round, most: int) -> int:
    """After these roundings; where there are more than `most`, it is not told how many more."""
    different = 0
    for start in range(0, copy.numel, _CHUNK):
        ours = _piece(copy, start)
        theirs = np.zeros_like(ours) if base is None else _piece(base, start)
        different += int((of_copy(ours) != of_base(theirs)).sum())
        if different >= most:
            return most
    return different


def _piece(view: TensorView, start: int) -> npt.NDArray[np.float32]:
    """`_CHUNK` numbers from `start` on, or what is left."""
    width = len(view.data) // view.numel
    count = min(_CHUNK, view.numel - start)
    return TensorView(view.dtype, (count,), view.data[start * width : (start + count) * width]).to_float32()


def digest(config: bytes, tensors: Mapping[str, TensorView]) -> str:
    """sha256 of the canonical content: config, then each tensor by name with dtype, shape and bytes."""
    state = hashlib.sha256(b"manylora adapter 1\n")
    state.update(len(config).to_bytes(8, "little") + config)
    for name, view in sorted(tensors.items()):
        head = json.dumps([name, view.dtype, view.shape, len(view.data)]).encode()
        state.update(len(head).to_bytes(8, "little") + head)
        state.update(view.data)
    return state.hexdigest()
