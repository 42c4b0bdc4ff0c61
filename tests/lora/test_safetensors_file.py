"""The header parser against random and mutated bytes, and against the library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from manylora.errors import InvalidAdapter
from manylora.identity import TENSOR_FILE
from manylora.lora.format.problems import Problems
from manylora.lora.format.reader import Adapter, read, read_trusted
from manylora.lora.format.tensors import DTYPE_BITS, TensorView, map_file, parse
from tests.lora.malformed import config, layout, safetensors, tensors, tiny_modules, write

SOUND = safetensors(*layout(tensors()))
# Ends a sound file; a tensor that reached beyond its file would show these bytes.
GUARD = b"\xa5" * 4096


def parse_guarded(file: bytes) -> tuple[dict[str, TensorView] | None, Problems]:
    """Parses `file` where other bytes follow it in the same memory, which no tensor may show."""
    memory = memoryview(file + GUARD)
    problems = Problems()
    found = parse(memory[: len(file)], problems)
    assert (found is None) == bool(problems)
    assert {p.code for p in problems.all()} <= {"not_safetensors"}
    if found is not None:
        # Together the tensors are exactly the file's data: nothing beyond it, nothing twice.
        header_end = 8 + int.from_bytes(file[:8], "little")
        assert sum(len(view.data) for view in found.values()) == len(file) - header_end
        for view in found.values():
            assert len(view.data) * 8 == view.numel * DTYPE_BITS[view.dtype]
    return found, problems


headers = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "F4", "F99"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, min_size=1, max_size=3),
    }
)


@given(st.binary(max_size=300))
def test_random_bytes_give_problems_and_nothing_else(file: bytes) -> None:
    parse_guarded(file)


@given(headers, st.binary(max_size=40))
def test_random_json_headers_give_problems_and_nothing_else(header: Any, data: bytes) -> None:
    parse_guarded(safetensors(json.dumps(header), data))


@given(st.dictionaries(st.text(max_size=5), entries, max_size=4), st.binary(max_size=40))
def test_random_entries_never_show_bytes_outside_the_data(header: dict[str, Any], data: bytes) -> None:
    parse_guarded(safetensors(header, data))


@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.data())
def test_mutated_file_never_shows_bytes_outside_it(changes: list[tuple[int, int]], data: st.DataObject) -> None:
    file = bytearray(SOUND)
    for position, value in changes:
        # Half of the changes into the header, which is where they hurt.
        file[position % 700 if position % 2 else position] = value
    length = data.draw(st.integers(0, len(file)) | st.just(len(file)))
    parse_guarded(bytes(file[:length]))


def accept_or_refuse(reader: Callable[[], Adapter]) -> None:
    """Anything but an adapter or an InvalidAdapter with problems is a test failure."""
    try:
        adapter = reader()
    except InvalidAdapter as error:
        problems = error.problems
    else:
        assert adapter.modules
        return
    assert problems


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 1200), st.binary(min_size=1, max_size=4))
def test_mutated_folder_raises_nothing_but_invalid_adapter(tmp_path: Path, position: int, change: bytes) -> None:
    write(tmp_path, SOUND[:position] + change + SOUND[position + len(change) :])
    accept_or_refuse(lambda: read(tmp_path, tiny_modules(), max_rank=64, max_size=2**24))
    accept_or_refuse(lambda: read_trusted(tmp_path, tiny_modules()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200) | headers.map(lambda value: json.dumps(value).encode()))
def test_any_config_raises_nothing_but_invalid_adapter(tmp_path: Path, text: bytes) -> None:
    write(tmp_path, None, text)
    with pytest.raises(InvalidAdapter):
        read(tmp_path, tiny_modules(), max_rank=64, max_size=2**24)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from([*sorted(config()), "layers_to_transform", "init_lora_weights"]), headers))
def test_any_field_values_raise_nothing_but_invalid_adapter(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, None, config(**changes))
    accept_or_refuse(lambda: read(tmp_path, tiny_modules(), max_rank=64, max_size=2**24))


@given(st.dictionaries(st.text(max_size=5), entries, max_size=3), st.binary(max_size=40))
def test_what_the_library_refuses_is_refused_here_too(header: dict[str, Any], data: bytes) -> None:
    file = safetensors(header, data)
    try:
        deserialize(file)
    except SafetensorError:
        assert parse_guarded(file)[0] is None


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["<f2", "<f4", "<f8", "<i1"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_files_of_the_library_are_read_as_written(tmp_path: Path, plan: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.full(shape, number, dtype) for number, (name, (dtype, shape)) in enumerate(plan.items())}
    save_file(arrays, tmp_path / "x", metadata={"by": "the library"})
    problems = Problems()
    found = parse(map_file(tmp_path / "x"), problems)
    assert found is not None, problems.all()
    assert {name: (view.shape, bytes(view.data)) for name, view in found.items()} == {
        name: (array.shape, array.tobytes()) for name, array in arrays.items()
    }


def test_views_are_read_only(tmp_path: Path) -> None:
    write(tmp_path)
    found = parse(map_file(tmp_path / TENSOR_FILE), Problems())
    assert found is not None
    assert all(view.data.readonly for view in found.values())


def test_views_outlive_the_removal_of_their_file(tmp_path: Path) -> None:
    write(tmp_path)
    before = {name: array.copy() for name, array in tensors().items()}
    found = parse(map_file(tmp_path / TENSOR_FILE), Problems())
    (tmp_path / TENSOR_FILE).unlink()
    assert found is not None
    for name, view in found.items():
        np.testing.assert_array_equal(view.to_float32(), before[name])


def test_every_fault_of_a_header_is_listed() -> None:
    header, data = layout(tensors())
    for name, entry in zip(header, ({"dtype": "F31"}, {"shape": [-1]}, {"data_offsets": [0]}), strict=False):
        header[name] |= entry
    _, problems = parse_guarded(safetensors(header, data))
    assert len(problems.all()) == 3


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480])
def test_a_header_whose_length_begins_as_a_pickle_does_is_read(length: int) -> None:
    file = safetensors(*layout({"a": np.ones(4, np.float32)}))
    header = file[8 : 8 + int.from_bytes(file[:8], "little")].rstrip()
    padded = length.to_bytes(8, "little") + header.ljust(length) + file[-16:]
    found, problems = parse_guarded(padded)
    assert not problems
    assert found is not None
    assert found["a"].to_float32().tolist() == [1.0] * 4
