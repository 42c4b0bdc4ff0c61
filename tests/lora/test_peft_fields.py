"""The pinned list of PEFT's settings: complete, documented, and true."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from manylora.errors import InvalidAdapter
from manylora.lora.format.config import KNOWN, NEUTRAL, REFUSED, SERVED
from manylora.lora.format.reader import Adapter, read
from tests.lora.malformed import config, tiny_modules, write
from tests.lora.plain import plain_modules
from tests.lora.test_format_malformed import CODES

DOCS = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()

# A value of each neutral key that is not PEFT's default.
NEUTRAL_VALUES: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "corda_config": {"corda_method": "ipm"},
    "eva_config": {"rho": 1.0},
    "fan_in_fan_out": True,
    "inference_mode": False,
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.5,
    "lora_ga_config": {"scale": "unit"},
    "megatron_core": "my.core",
    "merge_weights": True,
    "peft_version": "0.3.0",
    "qalora_group_size": 4,
    "revision": "v2",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "velora_config": {"num_groups": 8},
}


def test_every_setting_of_the_installed_peft_is_decided() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= KNOWN


def test_each_setting_is_decided_once() -> None:
    assert len(KNOWN) == len(SERVED) + len(NEUTRAL) + len(REFUSED)


def test_docs_show_each_setting_with_what_is_done_with_it() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (served|neutral|refused) \|", DOCS, re.MULTILINE))
    decided = dict.fromkeys(SERVED, "served") | dict.fromkeys(NEUTRAL, "neutral") | dict.fromkeys(REFUSED, "refused")
    assert rows == decided


def test_docs_explain_each_code() -> None:
    rows = set(re.findall(r"^\| `([a-z_]+)` \|(?! (?:served|neutral|refused) \|)", DOCS, re.MULTILINE))
    assert rows == CODES | {"unsafe_archive", "unexpected_file", "bad_defaults"}


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_neutral_setting_changes_nothing(tmp_path: Path, key: str) -> None:
    write(tmp_path / "plain")
    write(tmp_path / "with", None, config(**{key: NEUTRAL_VALUES[key]}))
    plain, other = (read(tmp_path / name, tiny_modules(), max_rank=64, max_size=2**24) for name in ("plain", "with"))

    def content(adapter: Adapter) -> list[tuple[str, int, float, bytes]]:
        return [(m.path, m.rank, m.scale, bytes(m.a.data)) for m in plain_modules(adapter)]

    assert content(other) == content(plain)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_setting_is_named(tmp_path: Path, key: str) -> None:
    write(tmp_path, None, config(**{key: [1]}))
    with pytest.raises(InvalidAdapter) as caught:
        read(tmp_path, tiny_modules(), max_rank=64, max_size=2**24)
    assert [(p.code, p.where) for p in caught.value.problems] == [
        ("unsupported_feature", f"adapter_config.json: {key}")
    ]


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_setting_that_is_switched_off_is_accepted(tmp_path: Path, key: str) -> None:
    values: tuple[Any, ...] = (None, False, [], {})
    for number, off in enumerate(values):
        write(tmp_path / str(number), None, config(**{key: off}))
        assert read(tmp_path / str(number), tiny_modules(), max_rank=64, max_size=2**24).rank == 4


def test_reader_imports_neither_torch_nor_peft() -> None:
    code = (
        "import sys, manylora.lora.format.reader\n"
        "sys.exit(bool({'torch', 'peft', 'transformers'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2] / "server"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, check=False).returncode == 0
