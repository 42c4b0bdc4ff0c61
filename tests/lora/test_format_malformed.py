"""Every malformed adapter gets its documented code, all of them at once, in messages that say what to do."""

import re
from pathlib import Path

import numpy as np
import pytest

from manylora.errors import InvalidAdapter, TooLarge
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.problems import MAX_PER_CODE
from manylora.lora.format.reader import digest_of, read, read_trusted
from tests.lora.malformed import MALFORMED, Builder, config, safetensors, tensors, tiny_modules, write

# The codes of docs/adapters.md that a folder can have; the two that only uploads have are left out.
CODES = {
    "not_safetensors", "missing_file", "bad_config", "unknown_config_key", "unsupported_feature",
    "unmatched_module", "missing_tensor", "unexpected_tensor", "wrong_shape", "wrong_dtype", "not_finite",
    "rank_too_large", "no_effect", "base_mismatch",
}  # fmt: skip


def problems_of(folder: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(InvalidAdapter) as caught:
        read(folder, tiny_modules(), max_rank=64, max_size=2**24)
    return [(p.code, p.where, p.message) for p in caught.value.problems]


def test_the_unbroken_adapter_is_accepted(tmp_path: Path) -> None:
    write(tmp_path)
    adapter = read(tmp_path, tiny_modules(), max_rank=64, max_size=2**24)
    assert (adapter.rank, len(adapter.modules), adapter.warnings) == (4, 4, [])


@pytest.mark.parametrize(("build", "code"), [pytest.param(b, c, id=name) for name, b, c in MALFORMED])
def test_malformed_adapter_gets_its_documented_code(tmp_path: Path, build: Builder, code: str) -> None:
    build(tmp_path)
    found = problems_of(tmp_path)
    assert code in {c for c, _, _ in found}
    assert {c for c, _, _ in found} <= CODES
    for _, where, message in found:
        assert where
        assert message[-1] in ".?…", message
        assert len(message) < 1000


def test_every_code_of_a_folder_has_a_malformed_example() -> None:
    assert {code for _, _, code in MALFORMED} == CODES


def test_names_of_malformed_examples_are_unique() -> None:
    names = [name for name, _, _ in MALFORMED]
    assert len(names) == len(set(names))


# Problems that a single fault must not drag along, so that an uploader is not misled.
@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("A without B", {"missing_tensor"}),
        ("width of one module differs", {"wrong_shape"}),
        ("a wider base", {"base_mismatch"}),
        ("a resized vocabulary", {"base_mismatch"}),
        ("DoRA without magnitudes", {"missing_tensor"}),
        ("X-LoRA", {"unsupported_feature"}),
        ("NaN in bfloat16", {"not_finite"}),
        ("B all zero", {"no_effect"}),
        ("a key unknown", {"unknown_config_key"}),
        ("target pattern runs for ever", {"bad_config"}),
    ],
)
def test_one_fault_gives_one_kind_of_problem(tmp_path: Path, name: str, codes: set[str]) -> None:
    next(build for known, build, _ in MALFORMED if known == name)(tmp_path)
    assert {code for code, _, _ in problems_of(tmp_path)} == codes


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    arrays = tensors()
    arrays["base_model.model.lm_head.weight"] = arrays.pop(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    )
    arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = float("nan")
    write(tmp_path, arrays, config(r=80, novelty=1, target_modules=["q_proj", "v_proj"]))
    assert {code for code, _, _ in problems_of(tmp_path)} == {
        "unknown_config_key", "not_finite", "rank_too_large", "missing_tensor",
        "unexpected_tensor", "wrong_shape",
    }  # fmt: skip


def test_several_unsupported_features_are_all_named(tmp_path: Path) -> None:
    write(tmp_path, None, config(kasa_config={"a": 1}, use_bdlora={"nblocks": 2}, init_lora_weights="corda"))
    named = {where.partition(": ")[2] for _, where, _ in problems_of(tmp_path)}
    assert named >= {"kasa_config", "use_bdlora", "init_lora_weights"}


def test_a_million_faults_make_a_short_answer(tmp_path: Path) -> None:
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0]} for i in range(5000)}
    write(tmp_path, safetensors(header, b""))
    found = problems_of(tmp_path)
    assert len(found) == MAX_PER_CODE + 1
    assert found[-1][2].startswith(f"{5000 - MAX_PER_CODE} more")


def test_misspelt_target_is_answered_with_the_likely_name(tmp_path: Path) -> None:
    write(tmp_path, None, config(target_modules=["gate_porj"]))
    assert any("Did you mean 'gate_proj'?" in message for _, _, message in problems_of(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_proj", "v_proj", "gate_porj"]}, "'gate_porj', .* Did you mean 'gate_proj'"),
        ({"target_modules": ["q_proj", "v_proj", "c_attn", "W_pack"]}, "'W_pack', 'c_attn'"),
        ({"layers_to_transform": [0, 1, 9]}, "no layers '9'"),
    ],
)
def test_names_and_layers_that_mean_nothing_beside_others_are_a_warning(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    write(tmp_path, None, config(**changes))

    (warning,) = read(tmp_path, tiny_modules(), max_rank=64, max_size=2**20).warnings

    assert re.search(said, warning)


def test_a_stranger_beside_good_names_is_no_warning_where_the_file_has_it(tmp_path: Path) -> None:
    arrays = tensors()
    arrays["base_model.model.model.layers.0.self_attn.W_pack.lora_A.weight"] = np.ones((4, 16), np.float32)
    write(tmp_path, arrays, config(target_modules=["q_proj", "v_proj", "W_pack"]))

    assert "unmatched_module" in {code for code, _, _ in problems_of(tmp_path)}


def test_hostile_names_are_escaped_in_messages(tmp_path: Path) -> None:
    header = {"\x1b[31m<script>\n": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}
    write(tmp_path, safetensors(header, b""))
    for _, where, message in problems_of(tmp_path):
        assert (where + message).isprintable()


def test_adapter_over_the_size_limit_is_too_large(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(TooLarge, match="at most 1000"):
        read(tmp_path, tiny_modules(), max_rank=64, max_size=1000)


def test_missing_folder_is_reported_as_missing_files(tmp_path: Path) -> None:
    found = problems_of(tmp_path / "nowhere")
    assert [(code, where) for code, where, _ in found] == [("missing_file", CONFIG_FILE), ("missing_file", TENSOR_FILE)]


def test_unreadable_file_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / TENSOR_FILE).unlink()
    (tmp_path / TENSOR_FILE).symlink_to(tmp_path / "gone")
    assert ("missing_file", TENSOR_FILE) in {(code, where) for code, where, _ in problems_of(tmp_path)}


def test_describing_files_beside_an_adapter_are_allowed(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("README.md", "LICENSE", "NOTICE.txt", "loss.png", "report.json", ".gitattributes"):
        (tmp_path / name).write_text("x")
    assert read(tmp_path, tiny_modules(), max_rank=64, max_size=2**24).rank == 4


@pytest.mark.parametrize("name", ["a pickle", "truncated data", "config has NaN", "no tensors", "no config"])
def test_digest_of_refuses_what_cannot_be_parsed(tmp_path: Path, name: str) -> None:
    build, code = next((build, code) for known, build, code in MALFORMED if known == name)
    build(tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        digest_of(tmp_path)
    assert {p.code for p in caught.value.problems} == {code}


def test_trusted_read_still_refuses_an_adapter_of_another_base(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        read_trusted(tmp_path, tiny_modules(hidden=32))
    assert {p.code for p in caught.value.problems} == {"base_mismatch"}


@pytest.mark.parametrize("name", ["truncated data", "overlapping offsets", "int8", "empty folder", "A without B"])
def test_trusted_read_still_refuses_damaged_files(tmp_path: Path, name: str) -> None:
    next(build for known, build, _ in MALFORMED if known == name)(tmp_path)
    with pytest.raises(InvalidAdapter):
        read_trusted(tmp_path, tiny_modules())
