"""`docs/limits.md` and the code say the same: every bound on what a caller sends has a row, and every row its bound."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manylora.settings import Settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "server" / "manylora"
PAGE = ROOT / "docs" / "limits.md"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "%": 0.01}

# `MAX_…` constants that bound nothing that a caller sends, each with what it is instead.
NO_BOUNDS = {
    "api.traffic.MAX_ADAPTERS": "how much /v1/stats remembers",
    "api.traffic.MAX_ERRORS": "how much /v1/stats remembers",
    "api.traffic.MAX_FINISHED": "how much /v1/stats remembers",
    "catalog.cache.MAX_BYTES": "a cache on disk",
    "cluster.affinity.MAX_KEYS": "of how many adapters a router remembers the traffic",
    "cluster.exchange.MAX_PENDING_BYTES": "of an answer that its reader has not taken yet",
    "cluster.ingress.MAX_NAME": "a longer name tells routers nothing; the replica answers by its own bound",
    "cluster.ingress.MAX_TRIES": "how many replicas are asked where they end",
    "cluster.ray_router.MAX_OPEN": "of how many open requests a router knows when they began",
    "cluster.replica.MAX_KEYS": "of how many adapters a replica knows what routers call them",
    "cluster.replica.MAX_PLACES": "replicas on one machine",
    "cluster.replica.MAX_TOLD": "of how many adapters routers are told",
    "engine.effect.MAX_PROBED_TOKENS": "how many tokens of an adapter its effect is measured with",
    "engine.detokenizer.MAX_BYTES": "of one character in UTF-8",
    "engine.detokenizer.MAX_PENDING": "tokens that wait for the end of a character",
    "grammars.compiler.MAX_REFUSED": "how many refusals are remembered",
    "grammars.masks.MAX_LOOK_S": "how far ahead of a draft a grammar is looked along",
    "images.reading.MAX_MESSAGE": "of Pillow's words in a refusal",
    "kernels.torch_lora.MAX_BATCHED_ROWS": "a choice between kernels",
    "kernels.torch_lora.MAX_GROUP": "a choice between kernels",
    "kernels.torch_lora.MAX_GROUPED_BYTES": "a choice between kernels",
    "kernels.torch_lora.MAX_GROUP_ROWS": "a choice between kernels",
    "models.positions.MAX_STARTS": "how many places of a sequence the start-up check tries",
    "models.refusals.MAX_QUOTED": "of an error of the model's own code, at the start",
    "kernels.weights.MAX_GROUP_SIZE": "the layout of a matmul's scales",
    "tenants.quotas.MAX_IDLE_ACCOUNTS": "a cache of rows of the database",
}
# The command line's own tools work on their user's machine, for nobody else.
OFFLINE = ("lifecycle",)
# Settings that bound what callers send or hold although their names do not begin with `max_`.
BOUNDING = {
    "adapter_memory",
    "body_timeout_s",
    "header_timeout_s",
    "host_tier_memory",
    "idle_timeout_s",
    "import_allow",
    "write_timeout_s",
}


@dataclass(frozen=True)
class Row:
    """One row of the page."""

    bound: str
    name: str
    value: str
    beyond: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 4 and cells[0] not in ("bound", "---"):
            found.append(Row(cells[0], cells[1].strip("`"), cells[2], cells[3]))
    return found


@functools.cache
def constants() -> dict[str, str]:
    """Name on the page (without a leading underscore) to the name in its module, of every `MAX_…` of the server."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.split(".")[0] not in OFFLINE:
            for name in names_assigned(ast.parse(path.read_text(encoding="utf-8"))):
                if re.fullmatch(r"_?MAX_[A-Z0-9_]+", name):
                    found[f"{module}.{name.lstrip('_')}"] = name
    return found


def names_assigned(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def value_of(name: str) -> Any:
    if name in Settings.model_fields:
        return Settings.model_fields[name].get_default(call_default_factory=True, validated_data={})
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"manylora.{module}"), constants()[f"{module}.{attribute}"])


def is_shown_by(value: Any, cell: str) -> bool:
    """Whether the cell begins with the value: `16 MiB`, `1,024`, `30 s`, `10 %`, `unset: …`, `none`."""
    if value is None:
        return cell.startswith("unset")
    if value == () or value == []:
        return cell == "none"
    match = re.match(r"([\d,]+(?:\.\d+)?)\s*(\S*)", cell)
    if match is None:
        return False
    number = float(match[1].replace(",", "")) * UNITS.get(match[2], 1)
    return number == pytest.approx(float(value), rel=1e-12)


ROWS = rows()


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 20
    assert len({row.name for row in ROWS}) == len(ROWS), "a bound stands once"


def test_every_constant_that_bounds_a_caller_is_on_the_page() -> None:
    assert set(constants()) - {row.name for row in ROWS} - set(NO_BOUNDS) == set()


def test_every_setting_that_bounds_a_caller_is_on_the_page() -> None:
    bounding = {name for name in Settings.model_fields if name.startswith("max_")} | BOUNDING

    assert bounding - {row.name for row in ROWS} == set()
    assert bounding <= set(Settings.model_fields)


def test_what_bounds_nothing_exists_and_is_not_on_the_page() -> None:
    assert set(NO_BOUNDS) <= set(constants())
    assert not {row.name for row in ROWS} & set(NO_BOUNDS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_names_something_that_exists_with_its_value(row: Row) -> None:
    assert row.name in constants() or row.name in Settings.model_fields, "neither a constant nor a setting"
    assert is_shown_by(value_of(row.name), row.value), f"the value is {value_of(row.name)}"
    assert row.bound
    assert row.beyond


@pytest.mark.parametrize(
    ("value", "cell", "is_shown"),
    [
        (2**24, "16 MiB", True),
        (2**24, "16 MB", False),
        (1024, "1,024", True),
        (30.0, "30 s", True),
        (0.1, "10 %", True),
        (None, "unset: the model's own", True),
        (None, "0", False),
        ((), "none", True),
        (5, "6", False),
    ],
)
def test_the_guard_reads_values(value: Any, cell: str, is_shown: bool) -> None:
    assert is_shown_by(value, cell) == is_shown
