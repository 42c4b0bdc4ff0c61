"""Who may import whom, read from the source, and what never loads torch, tried in a fresh process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "server"
PACKAGE = SOURCE / "manylora"
GROUND = ("children", "errors", "faults", "files", "identity", "log", "metrics", "packages", "settings", "threads")
FOUNDATION = {"manylora", *(f"manylora.{name}" for name in GROUND)}

# For each part: prefixes of what else of ours it may import. `engine` here is its interface alone.
ALLOWED: dict[str, set[str]] = {
    "api": {
        "api",
        "tenants",
        "catalog",
        "usage",
        "engine.interface",
        "chat",
        "jobs",
        "sound",
        "images",
        "database.tables",
        "lifecycle.parameters",
        "lifecycle.train.config",
    },
    "jobs": {"jobs", "catalog", "client", "database", "tenants", "usage", "lifecycle", "models.offered"},
    "tenants": {"tenants", "database"},
    "catalog": {"catalog", "database", "usage", "tenants.limits", "engine.interface", "lora"},
    "usage": {"usage", "database", "lora.memory.occupancy"},
    "database": {"database"},
    "engine": {"engine", "models", "kernels", "lora", "grammars", "chat", "sound", "images"},
    "grammars": {"grammars", "lora.memory.line"},
    "models": {"models", "kernels", "lora", "chat", "sound", "images"},
    "sound": {"sound"},
    "images": {"images"},
    "chat": {"chat", "grammars.grammar"},
    "kernels": {"kernels", "lora.memory"},
    "lora": {"lora"},
    "lifecycle": {"lifecycle", "client", "lora", "models", "chat", "sound", "images"},
    "client": {"client"},
}
STANDALONE = ("errors", "faults", "files", "identity", "settings", "metric_labels", "metrics", "threads")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, path: Path) -> Iterator[str]:
    """Every module of ours that the file names, lazily imported ones and those for types included."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("manylora"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*home, *([node.module] if node.module else [])])
            if base.split(".")[0] == "manylora":
                names = [f"{base}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else base for name in names)


MODULES = modules()


def is_below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


@pytest.mark.parametrize("part", ALLOWED)
def test_each_package_imports_only_its_neighbours(part: str) -> None:
    allowed = {f"manylora.{prefix}" for prefix in ALLOWED[part]}
    inside = {name: path for name, path in MODULES.items() if is_below(name, f"manylora.{part}")}
    assert inside

    wrong = [
        f"{name} imports {imported}"
        for name, path in inside.items()
        for imported in imports(name, path)
        if imported not in FOUNDATION and not any(is_below(imported, prefix) for prefix in allowed)
    ]

    assert wrong == []


def test_packages_form_no_circle() -> None:
    parts = {name.split(".")[1] for name in MODULES if "." in name and name not in FOUNDATION} - {"__main__"}
    uses: dict[str, set[str]] = {part: set() for part in parts}
    for name, path in MODULES.items():
        part = name.split(".")[1] if "." in name else ""
        if part in parts:
            imported = {each.split(".")[1] for each in imports(name, path) if "." in each}
            uses[part] |= (imported & parts) - {part}
    while free := {part for part in uses if not uses[part] & uses.keys()}:
        uses = {part: used for part, used in uses.items() if part not in free}

    assert uses == {}


@pytest.mark.parametrize("name", STANDALONE)
def test_foundations_import_nothing_of_ours_but_errors(name: str) -> None:
    """And metrics their labels, which nobody else asks for."""
    module = f"manylora.{name}"
    allowed = {"manylora.errors", *(["manylora.metric_labels"] if name == "metrics" else [])}

    assert set(imports(module, MODULES[module])) <= allowed - {module}


def test_only_the_bridge_knows_asyncio_and_threads_inside_the_engine() -> None:
    knowing = {
        name
        for name, path in MODULES.items()
        if is_below(name, "manylora.engine")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for imported in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if imported.split(".")[0] in ("asyncio", "threading", "anyio", "concurrent")
    }

    assert knowing == {"manylora.engine.async_engine"}


def without_torch() -> list[str]:
    """Packages and modules that must work, and load, without torch."""
    bookkeeping = (
        "engine.admission", "engine.block_manager", "engine.scheduler", "engine.fairness", "engine.interface",
        "lora.memory.slots", "lora.memory.eviction", "lora.format.reader", "identity", "catalog.registry", "errors",
        "settings", "metrics", "cli.main", "serving.app",
    )  # fmt: skip
    wanted = {f"manylora.{name}" for name in bookkeeping}
    wanted |= {name for name in MODULES if is_below(name, "manylora.api") or is_below(name, "manylora.tenants")}
    return sorted(wanted & set(MODULES))


def test_http_tenants_registry_and_bookkeeping_never_load_torch() -> None:
    script = (
        "import importlib, sys\n"
        f"for name in {without_torch()!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'{name} loads torch')\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_guard_sees_relative_and_lazy_imports(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from . import ops\n"
        "from ..errors import NotFound\n"
        "def f():\n"
        "    from manylora.engine import engine\n"
        "    import manylora.serving.app\n"
    )

    assert list(imports("manylora.api.x", path)) == [
        "manylora.api.ops",
        "manylora.errors",
        "manylora.engine.engine",
        "manylora.serving.app",
    ]
