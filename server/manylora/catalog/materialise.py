"""A mix that becomes files: its adapters are merged number by number, and the result is taken as an upload is."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from manylora.catalog.records import Wish
from manylora.catalog.upload import Brought
from manylora.errors import AdapterLoadFailed, InvalidAdapter
from manylora.identity import CARD_FILE, AdapterRef, Mix
from manylora.lora.format.encoders import bare_task_of
from manylora.lora.format.merged import Method, Recipe, write_merged
from manylora.lora.format.reader import ModuleSpec, read_trusted

__all__ = ["Method", "Recipe", "receive_mix"]


async def receive_mix(
    wish: Wish,
    mix: Mix,
    recipe: Recipe,
    folder_of: Callable[[AdapterRef], Path],
    modules: Mapping[str, ModuleSpec],
    folder: Path,
) -> tuple[Wish, Brought]:
    """Write the merged adapter into a folder of the quarantine. Raises InvalidRequest, or AdapterLoadFailed."""
    await asyncio.to_thread(_write, mix, recipe, folder_of, modules, folder)
    return wish, Brought(folder)


def _write(
    mix: Mix,
    recipe: Recipe,
    folder_of: Callable[[AdapterRef], Path],
    modules: Mapping[str, ModuleSpec],
    folder: Path,
) -> None:
    try:
        parts = [(read_trusted(folder_of(ref), modules), weight, ref.label) for ref, weight in mix.parts]
    except InvalidAdapter as error:
        raise AdapterLoadFailed(f"The stored files of the mix's adapters cannot be read: {error.message}") from error
    write_merged(parts, recipe, folder, bare_task_of(modules))
    made_of = "".join(f"- {ref.label}, weight {weight:g}\n" for ref, weight in mix.parts)
    title = " and ".join(ref.name for ref in mix.refs)
    how = f"{recipe.method}, density {recipe.density:g}, seed {recipe.seed}"
    (folder / CARD_FILE).write_text(f"# {title}\n\nMade by {how}, of:\n\n{made_of}", encoding="utf-8")
