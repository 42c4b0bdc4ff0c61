"""What a base takes is told before it is loaded, and comes to what it takes then."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from manylora.cli.main import build as build_cli
from manylora.errors import ModelUnusable
from manylora.kernels import native
from manylora.kernels.matmul import Paneled, Rounded, RoundedToNibbles
from manylora.models.linear import AdaptedLinear, FusedMember
from manylora.models.memory_report import memory_report
from tests.engine.test_build import build

if not native.is_available():
    pytest.skip("the C++ kernels are not installed", allow_module_level=True)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_base_takes_what_was_told(quantization: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    builder, settings = build(tiny_llama_dir, tmp_path, quantization=quantization, kv_cache_memory="4MiB")
    told = memory_report(settings)

    model = builder.wrapped.model
    linears = [each for each in model.modules() if isinstance(each, AdaptedLinear)]
    linears += {id(each.fused): each.fused.linear for each in model.modules() if isinstance(each, FusedMember)}.values()
    taken = 0
    for matmul in (each.matmul for each in linears):
        assert isinstance(matmul, Paneled | Rounded | RoundedToNibbles)
        taken += matmul.weight.nbytes
    others = sum(parameter.nbytes for parameter in model.parameters())
    # Linears that share their input are rounded up to whole panels together, here they are told one by one.
    assert taken <= told.linears + told.head <= 1.4 * taken
    assert told.others == others
    assert told.kv_per_token == 2 * 2 * 2 * 16 * 4
    assert told.kv_cache == 4 * 2**20
    assert told.total > told.base + told.kv_cache


def test_the_command_says_it_and_ends(tiny_llama_dir: Path) -> None:
    words = ["serve", str(tiny_llama_dir), "--dry-run", "--quantization", "int4", "--adapter-memory", "3MiB"]
    done = CliRunner().invoke(build_cli(), words)

    assert done.exit_code == 0, done.output
    assert "--profile default:" in done.output
    assert "a token)" in done.output
    told = [line.split() for line in done.output.splitlines()]
    assert ["at", "most,", "by", "--adapter-memory", "3.0", "MiB"] in told


def test_a_model_that_cannot_be_served_is_refused_alike(tmp_path: Path) -> None:
    done = CliRunner().invoke(build_cli(), ["serve", str(tmp_path), "--dry-run"])

    assert isinstance(done.exception, ModelUnusable)
    assert torch.get_default_dtype() is torch.float32
