"""The pages say what the program does: settings, flags, routes, errors, commands, version."""

import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from benchmarks.workloads import standard
from manylora import __version__, errors
from manylora.cli.main import build
from manylora.errors import ManyloraError
from manylora.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "adapters").glob("*/README.md"))]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# settings


def test_the_settings_page_is_the_one_that_make_docs_writes() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")

    assert script("document_settings").with_table(page) == page, "run `make docs`"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_means_and_is_on_the_page(name: str) -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")

    assert (Settings.model_fields[name].description or "").endswith(".")
    assert f"`{ENV_PREFIX}{name.upper()}`" in page
    assert f"`{name}`" in page


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_used(name: str) -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "server" / "manylora").rglob("*.py")
        if path.name != "settings.py"
    )

    assert re.search(rf"settings\.(resolved_)?{name}\b", text), "accepted and ignored"


# models


def test_the_models_page_and_the_readme_say_what_the_table_of_types_does() -> None:
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    types = json.loads((ROOT / "tests" / "models" / "zoo.json").read_text(encoding="utf-8"))["types"]
    served = sum(each["outcome"] == "served" for each in types.values())

    assert script("document_models").with_table(page) == page, "run `make docs`"
    assert f"{served} of the {len(types)} decoder types" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_of_adapters_has_the_current_table_of_kinds() -> None:
    page = (DOCS / "adapters.md").read_text(encoding="utf-8")
    assert script("document_kinds").with_table(page) == page, "run `make docs`"


# performance


def performance_pages() -> list[Path]:
    return [DOCS / "performance.md", DOCS / "performance-history.md"]


def test_the_performance_pages_show_what_the_results_say() -> None:
    drawn = script("document_performance")

    for page in performance_pages():
        text = page.read_text(encoding="utf-8")
        assert drawn.with_tables(text) == text, "run `make docs`"
    assert drawn.PICTURE.read_text(encoding="utf-8") == drawn.picture(), "run `make docs`"


def test_every_table_that_results_are_drawn_to_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in performance_pages())

    assert sorted(re.findall(r"<!-- results: ([\w-]+)", text)) == sorted(script("document_performance").TABLES)


def test_what_compare_writes_can_take_the_place_of_the_standard_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = script("document_performance")
    workload = standard().model_dump(mode="json")
    records: list[dict[str, Any]] = [
        {"record": "setup", "commands": {"manylora": "a", "vllm": "b"}},
        *(
            {
                "record": "measurement", "server": name, "repeat": repeat, "parameters": workload, "errors": errors,
                "output_tokens_per_s": rate, "latency_s": {"tpot": {"p50": 0.05}, "ttft": {"p50": 1.25}},
            }
            for repeat, name, rate, errors in (
                (0, "manylora", 99.0, 2),
                (0, "vllm", 10.0, 0),
                (1, "manylora", 90.0, 0),
                (1, "vllm", 30.0, 0),
            )
        ),
    ]  # fmt: skip
    (tmp_path / "standard.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    monkeypatch.setattr(drawn, "RESULTS", tmp_path)

    rows = drawn.standard().splitlines()[2:]

    assert rows == ["| manylora | 90 | 3.0 | | 50 | 1.2 |", "| vllm | 10, 30 | | | 50 | 1.2 |"]


# errors


def tree() -> list[tuple[int, str, str]]:
    """(depth, name, rest) of each line of the tree in the docstring."""
    drawn = re.findall(r"^ {4}([│├└─ ]*)(\w+) {2,}(\d{3} .*)$", errors.__doc__ or "", re.MULTILINE)
    assert drawn
    return [(len(prefix) // 4, name, rest) for prefix, name, rest in drawn]


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    path: list[str] = []
    drawn = {}
    for depth, name, _ in tree():
        path[depth:] = [name]
        drawn[name] = path[depth - 1] if depth else "Exception"

    real = {
        name: kind.__bases__[0].__name__
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, ManyloraError)
    }

    assert drawn == real


def test_the_tree_gives_each_class_its_status_type_and_code() -> None:
    for _, name, rest in tree():
        kind = getattr(errors, name)
        status, error_type, *code = rest.split()

        assert (int(status), error_type) == (kind.status, kind.type), name
        assert not code or code == [kind.code], name


def test_every_error_becomes_an_answer_with_its_own_status() -> None:
    from manylora.api.errors import error_response

    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, ManyloraError):
            assert 400 <= kind.status < 600, name
            if kind is not errors.InvalidAdapter:
                response = error_response(kind("why"))
                assert response.status_code == kind.status
                assert f'"code":"{kind.code}"'.encode() in response.body


# commands


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line in a bash block that starts with a program of ours, joined over `\\`."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
                if words.startswith(("make ", "manylora ")):
                    found.append((str(page.relative_to(ROOT)), words))
    return found


def test_the_readme_has_commands() -> None:
    assert ("README.md", "make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu") in commands()


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_in_the_pages_exist(page: str, line: str) -> None:
    words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        wanted = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        assert wanted <= targets
    else:
        assert_known(words[1:])


def assert_known(words: list[str]) -> None:
    """Every subcommand and flag of a manylora command line exists."""
    command: Any = typer.main.get_command(build())
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, words[0]
        command, words = command.commands[words[0]], words[1:]
    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    assert used <= flags, used - flags


def test_nobody_is_told_to_install_a_package_by_a_name_that_is_not_published() -> None:
    told = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    told += [path for part in ("server", "loadtest") for path in (ROOT / part).rglob("*.py")]

    assert [path for path in told if re.search(r"pip install (-\S+ )*['\"]?manylora", path.read_text("utf-8"))] == []


def test_links_between_the_pages_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]

    assert broken == []


def test_every_page_has_a_place_on_the_site() -> None:
    """`make site` makes it, and complains of links and of anchors that lead nowhere."""
    site = script("site")
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"^ +- .+: (\S+\.md)$", nav, re.MULTILINE)

    assert sorted(named) == sorted([*map(str, site.tracked_pages()), "docs/reference.md"])
    missing = [module for *_, modules in site.PARTS for module in modules if importlib.util.find_spec(module) is None]
    assert missing == []


# version


def test_the_newest_version_in_the_changelog_is_the_packages() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    versions = re.findall(r"^## \[(\d[^\]]*)\]", text, re.MULTILINE)

    assert versions[0] == __version__
    assert f'version = "{__version__}"' in pyproject
