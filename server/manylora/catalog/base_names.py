"""Whether an adapter names another base than the one that is served. A guess from names: it warns and never refuses.

Models of one family have the same shapes (Base, Instruct, Coder, other languages), so an adapter of one loads on all of
them and is only good on its own. Its config names what it was trained on, which says something where it is a name on
the hub; a path on somebody's machine says nothing. The same weights have many names there: who mirrors or quantises a
model gives it another owner and another ending, and owners are renamed.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from manylora.errors import quoted

__all__ = ["BaseNames"]

_LONGEST_HUB_NAME: Final = 200  # owner and name have 96 characters each at most
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# First parts of paths that look like `owner/name`.
_FOLDERS: Final = frozenset({
    "adapters", "base", "checkpoint", "checkpoints", "ckpt", "content", "data", "home", "llm", "mnt", "model", "models",
    "output", "outputs", "results", "root", "runs", "tmp", "weights", "workspace",
})  # fmt: skip
_SNAPSHOT: Final = re.compile(r"models--[\w.-]+?--([\w.-]+)/snapshots/")
# How the same weights are kept: formats, quantisations, who packed them, a file's number among several.
_ENDING: Final = re.compile(
    r"[-.](?:gguf|ggml|hf|mlx|onnx|awq|gptq|exl2|eetq|hqq|fp8|fp16|fp4|bf16|f16|f32|nvfp4|mxfp4|unsloth|dynamic"
    r"|bnb|quantized|autoround|(?:bnb-)?[2-8]-?bit|int[48]|w\d+a\d+|g\d+|i?q\d(?:-[a-z0-9]+)*|\d{5}-of-\d{5}|sharded)$"
)


class BaseNames:
    """The names that the served base goes by: its id, its folder's or file's name, the name in requests."""

    def __init__(self, names: Iterable[str | None] = ()) -> None:
        given = [name for name in names if name]
        # Never a path: whoever uploads has no business with the server's folders.
        self._shown = next((name for name in given if not name.startswith(("/", ".", "~"))), "a folder")
        self._models = {_model_of(name) for name in given}

    def differ_from(self, named: str | None) -> bool:
        """Whether `named`, from an adapter's config, is another model on the hub."""
        if not self._models or not named or len(named) > _LONGEST_HUB_NAME or not _HUB_NAME.fullmatch(named):
            return False
        return named.split("/")[0].lower() not in _FOLDERS and _model_of(named) not in self._models

    def warning(self, named: str | None) -> str | None:
        """What a report says of an adapter whose config names `named`; None where the names agree."""
        if named is None or not self.differ_from(named):
            return None
        return (
            f"The config names the base {quoted(named)!r}, and this server's is {quoted(self._shown)!r}. Both have the "
            "same shapes, so it is served; if they are different models, its answers are not what it was trained for."
        )


@lru_cache(maxsize=4096)  # asked again for every row of a list
def _model_of(name: str) -> str:
    """The model that a hub name, a folder or a file means: without owner, revision, format and quantisation."""
    snapshot = _SNAPSHOT.search(name)
    text = snapshot[1] if snapshot else name.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    text = text.lower().replace("_", "-").removeprefix("meta-")
    while (shorter := _ENDING.sub("", text)) != text and shorter:
        text = shorter
    return text
