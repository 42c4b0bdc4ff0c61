"""Small modules have a reason to be modules, and a library speaks of parameters, never of flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_layers import MODULES, PACKAGE, imports

SMALL_LINES = 60
# Modules below so many lines with one importer, and why they are not a part of it.
REASONS = {
    "api.query": "a dependency of all routes, put in front of them in one place",
    "api.usage": "a router: all routers are put together in one place",
    "catalog.orphans": "a command's work without its printing; the command imports it when it runs",
    "catalog.retired": "the rows of deleted versions, apart from the files that go with them",
    "catalog.verify": "a command's work without its printing; the command imports it when it runs",
    "engine.drafting": "the interface that a drafter implements, and the one that drafts nothing",
    "engine.speech_executor": "the device part of a step, which could be in another process than the host's",
    "engine.speech_runner": "the host part of a step, which knows no torch",
    "kernels.native_attention": "one of two implementations of the same attention, chosen by the backend",
    "kernels.tiles": "arithmetic on the host, without Triton, which the module that launches programs needs",
    "lifecycle.train.memory": "an estimate from a base's config, which is nothing of how a training runs",
    "kernels.triton_elementwise": "launches of programs, beside the others of Triton; layers know no program",
    "models.triton_layers": "one of three implementations of the same layers, chosen by the backend",
    "lora.memory.eviction": "arithmetic without locks and tiers, tested by itself",
    "usage.training": "rows of the bill that jobs write, in the package whose bill it is",
    "models.minilm_package": "what one package on PyPI holds, as the other packages have a module each",
    "models.masks": "what a mask comes to, told without a model; the survey is long enough without it",
}


def importers() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for imported in imports(name, path):
            found.setdefault(imported, set()).add(name)
    return found


def test_a_small_module_with_one_importer_has_a_reason() -> None:
    users = importers()
    small = {
        name.removeprefix("manylora.")
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and len(path.read_text(encoding="utf-8").splitlines()) < SMALL_LINES
        and len(users.get(name, ())) == 1
    }

    assert small - REASONS.keys() == set(), "a new home, or a reason in this table"
    assert REASONS.keys() - small == set(), "not small, or with more importers by now: out of the table"


def texts(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


# Recipes are made of command lines, for people and for the cards of the shipped adapters.
LIBRARY = [
    path
    for part in ("lifecycle", "client")
    for path in sorted((PACKAGE / part).rglob("*.py"))
    if "recipes" not in path.parts
]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_names_parameters_and_no_flags(path: Path) -> None:
    flags = [f"{path.name}:{line}: {text}" for line, text in texts(path) if re.search(r"(?<![\w-])--[a-z]", text)]

    assert flags == []
