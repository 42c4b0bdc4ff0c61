"""What a base takes is told before it is loaded, and comes to what it takes then."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from manylora.cli.main import build as build_cli
from manylora.engine.pool_build import PoolBuilder
from manylora.engine.speech_build import SpeechBuilder
from manylora.errors import InvalidSettings, ModelUnusable, NotEnoughMemory
from manylora.kernels import native
from manylora.kernels.matmul import Paneled, Rounded, RoundedToNibbles
from manylora.metrics import Metrics
from manylora.models.encoder_loading import load_encoder
from manylora.models.kv_cache import bytes_per_block
from manylora.models.linear import AdaptedLinear, FusedMember
from manylora.models.memory_report import MemoryReport, memory_report
from manylora.models.speech_loading import load_speech
from manylora.settings import load_settings
from tests.encoders.tiny import make_encoder
from tests.engine.test_build import NoFolders, build
from tests.speech.tiny import make_whisper

if not native.is_available():
    pytest.skip("the C++ kernels are not installed", allow_module_level=True)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_base_takes_what_was_told(quantization: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    builder, settings = build(tiny_llama_dir, tmp_path, quantization=quantization, kv_cache_memory="4MiB")
    told = memory_report(settings)

    assert told.others == check_weights(told, builder.wrapped.model)
    assert told.kv_per_token == 2 * 2 * 2 * 16 * 4
    assert told.kv_cache == 4 * 2**20
    assert told.total > told.base + told.kv_cache


def check_weights(told: MemoryReport, model: torch.nn.Module) -> int:
    """The linears take what was told; returns what the rest takes."""
    linears = [each for each in model.modules() if isinstance(each, AdaptedLinear)]
    linears += {id(each.fused): each.fused.linear for each in model.modules() if isinstance(each, FusedMember)}.values()
    taken = 0
    for matmul in (each.matmul for each in linears):
        assert isinstance(matmul, Paneled | Rounded | RoundedToNibbles)
        taken += matmul.weight.nbytes
    # Linears that share their input are rounded up to whole panels together, here they are told one by one.
    assert taken <= told.linears + told.head <= 1.4 * taken
    return sum(parameter.nbytes for parameter in model.parameters())


def test_an_encoder_has_no_cache_and_is_never_rounded(tmp_path: Path) -> None:
    folder = make_encoder("bert", tmp_path / "base")
    settings = load_settings(model=str(folder), device="cpu", dtype="float32", profile="small")
    told = memory_report(settings)

    rest = check_weights(told, PoolBuilder(settings, load_encoder(settings, folder)).encoder.wrapped.model)
    assert told.others == pytest.approx(rest, rel=0.2)  # biases are told there, and kept with their linears
    assert (told.kv_cache, told.kv_per_token, told.per_window) == (0, None, None)
    assert told.limits == {"adapter_memory": 2**27, "host_tier_memory": 2**27}
    done = CliRunner().invoke(build_cli(), ["serve", str(folder), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "a token)" not in done.output
    with pytest.raises(InvalidSettings, match="quantization: encoders"):
        memory_report(load_settings(model=str(folder), device="cpu", quantization="int4"))


def test_a_model_of_speech_keeps_windows(tmp_path: Path) -> None:
    folder = make_whisper(tmp_path / "base")
    settings = load_settings(
        model=str(folder), device="cpu", dtype="float32", profile="small", kv_cache_memory="200KiB", block_size=4
    )
    told = memory_report(settings)

    builder = SpeechBuilder(settings, load_speech(settings, folder))
    rest = check_weights(told, builder.speech.wrapped.model)
    assert told.others == pytest.approx(rest, rel=0.2)
    engine, tiers = builder.build_core(NoFolders(), Metrics())
    tiers.close()
    num_windows = engine.scheduler.max_num_seqs
    assert 1 < num_windows < settings.max_num_seqs
    assert told.per_window is not None
    assert told.kv_cache == num_windows * told.per_window <= 200 * 2**10
    heard, shapes = builder.speech._heard.states, builder.speech.wrapped.survey.kv_shapes
    assert heard is not None
    in_slot = (heard.keys.nbytes + heard.values.nbytes) // (num_windows + 1)
    assert told.per_window == in_slot + 12 * bytes_per_block(shapes, 4, torch.float32)
    done = CliRunner().invoke(build_cli(), ["serve", str(folder), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "windows of sound (0.0 MiB each)" in done.output
    # A share says how much may be taken, not that nothing may be served; bytes are taken at their word.
    builder.settings = settings.model_copy(update={"kv_cache_memory": 1e-9})
    assert builder._num_windows() == 1
    builder.settings = settings.model_copy(update={"kv_cache_memory": 1000})
    with pytest.raises(NotEnoughMemory, match="one window of sound"):
        builder._num_windows()


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
