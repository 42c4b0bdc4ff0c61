"""Sizes and habits that no linter checks."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "loadtest", "benchmarks")
# Beginnings of a docstring that lean on something outside it.
LEANING: tuple[str, ...] = ("The same ", "As above", "As in ", "As there", "See above", "Ditto")
LEANING += ("It ", "Its ", "They ", "Their ", "Those ", "These ", "This ", "That ")
MAX_FUNCTION_LINES, MAX_MODULE_LINES = 60, 500


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def comments(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{where(path, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]

    assert long == []


def test_modules_stay_small() -> None:
    modules = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}

    assert {name: size for name, size in sizes.items() if size > MAX_MODULE_LINES} == {}


def test_nothing_is_left_to_do() -> None:
    marks = ("TODO", "FIXME", "XXX", "HACK")
    tests = sorted((ROOT / "tests").rglob("*.py"))

    found = [
        f"{where(path, line)} {text}"
        for path in [*sources(), *tests]
        for line, text in comments(path)
        if any(mark in text for mark in marks)
    ]

    assert found == []


def test_no_merge_is_left_half_done() -> None:
    kinds = {".md", ".py", ".toml", ".yml", ".yaml", ".js", ".css", ".html", ".cpp", ".h"}
    texts = [*ROOT.glob("*.*"), ROOT / "Makefile", *(ROOT / ".ci").iterdir()]
    texts += [path for part in ("docs", "deploy", "scripts", *PACKAGES, "tests") for path in (ROOT / part).rglob("*.*")]
    found = [
        where(path, number)
        for path in texts
        if path.is_file() and (path.suffix in kinds or not path.suffix)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if line.startswith(("<" * 7 + " ", ">" * 7 + " "))
    ]

    assert found == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_global_and_no_print_outside_the_command_line(path: Path) -> None:
    nodes = list(ast.walk(parse(path)))
    calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}

    assert not any(isinstance(node, ast.Global) for node in nodes)
    assert "print" not in calls or path.stem == "cli" or "cli" in path.parts or path.is_relative_to(ROOT / "benchmarks")


def test_every_exported_name_exists() -> None:
    missing = []
    for path in sources():
        tree = parse(path)
        assigned = [n for n in tree.body if isinstance(n, ast.Assign) and _names(n) == ["__all__"]]
        if not assigned:
            continue
        defined = {name for node in tree.body for name in _defined(node)}
        exported = ast.literal_eval(assigned[0].value)
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in exported if name not in defined]

    assert missing == []


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from _names(node)
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.If | ast.Try):
        yield from (
            name for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt) for name in _defined(child)
        )


def test_no_test_claims_a_time() -> None:
    """A machine under load would fail it. Waiting until something happens, with a generous limit, is fine."""
    clocks = {"perf_counter", "monotonic", "time", "process_time"}
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Assert):
                called = {
                    n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                }
                found += [where(path, node.lineno)] if called & clocks else []

    assert found == []


def test_docstrings_stand_alone() -> None:
    """None begins with what only its neighbour explains (STYLE.md, rule 6)."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    leaning = [
        f"{where(path, getattr(node, 'lineno', 1))} {text.splitlines()[0]}"
        for path in [*sources(), *sorted((ROOT / "scripts").rglob("*.py"))]
        for node in ast.walk(parse(path))
        if isinstance(node, documented) and (text := ast.get_docstring(node)) is not None and text.startswith(LEANING)
    ]

    assert leaning == []
