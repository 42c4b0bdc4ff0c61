"""Files that other tools read (workflows, pre-commit, editors) name what exists and run what `make check` runs."""

import configparser
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def check_recipe() -> list[list[str]]:
    """The command lines of `make check`, without the folder of the virtual environment."""
    recipe = MAKEFILE.partition("\ncheck: ")[2].partition("\n\n")[0]
    return [shlex.split(line.strip().removeprefix("$(BIN)/")) for line in recipe.splitlines()[1:]]


def development_packages() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {re.split(r"[\[<>=,]", requirement)[0] for requirement in extras["dev"]}


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_there_is_a_workflow_that_runs_everything() -> None:
    assert any(step.get("run") == "bash .ci/run" for path in WORKFLOWS for step in steps(path))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_the_projects_own_scripts_and_nothing_else(workflow: Path) -> None:
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            continue
        program, *words = shlex.split(step["run"])
        assert program in ("make", "bash")
        if program == "make":
            assert set(words) <= targets()
        else:
            assert [(ROOT / word).is_file() for word in words] == [True]


def test_every_program_of_make_check_is_a_development_dependency() -> None:
    programs = {words[0] for words in check_recipe()}

    assert {"ruff", "mypy", "typos", "oxlint"} <= programs <= development_packages()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hooks_run_the_checks_of_make_check(hook: dict[str, Any]) -> None:
    program, *words = shlex.split(hook["entry"].removeprefix(".venv/bin/"))
    wanted = {program, *words} - {"--force-exclude"}

    assert any(wanted <= set(line) for line in check_recipe())
    assert hook["language"] == "system"


def test_the_guide_for_contributors_names_targets_that_exist() -> None:
    named = set(re.findall(r"`make ([a-z]+)", CONTRIBUTING))

    assert "quick" in named
    assert named <= targets()


def test_coverage_has_a_floor_which_make_test_holds_unless_it_runs_a_choice_of_tests() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["slipcover"]

    recipe = MAKEFILE.partition("\ntest: ")[2].partition("\n\n")[0]
    assert (ROOT / told["source"]).is_dir()
    assert "$(if $(ARGS),$(PYTEST),$(COVERED))" in recipe
    assert "$(if $(ARGS),,$(BIN)/python scripts/check_coverage.py build/coverage.json)" in recipe


@pytest.mark.parametrize(("share", "code"), [(92.0, 0), (91.9, 1)])
def test_less_than_the_floor_of_coverage_is_an_error_that_names_the_files(
    share: float, code: int, tmp_path: Path
) -> None:
    files = {"a.py": {"summary": {"percent_covered": 12.5}}, "b.py": {"summary": {"percent_covered": 100}}}
    file = tmp_path / "coverage.json"
    file.write_text(json.dumps({"files": files, "summary": {"percent_covered": share}}))
    words = [sys.executable, str(ROOT / "scripts" / "check_coverage.py"), str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "a.py" in done.stdout
    assert "b.py" not in done.stdout


def test_text_files_are_as_editors_are_told_to_leave_them() -> None:
    config = configparser.ConfigParser()
    config.read_string("[top]\n" + (ROOT / ".editorconfig").read_text(encoding="utf-8"))
    told = {key: config["*"][key] for key in ("end_of_line", "insert_final_newline", "trim_trailing_whitespace")}
    assert list(told.values()) == ["lf", "true", "true"]

    wrong = []
    for path in tracked():
        data = path.read_bytes()
        is_text = b"\0" not in data and "vendor" not in path.parts and path.suffix not in (".svg", ".patch")
        if is_text and data and (not data.endswith(b"\n") or re.search(rb"[ \t]$|\r", data, re.MULTILINE)):
            wrong.append(str(path.relative_to(ROOT)))

    assert wrong == []


def tracked() -> list[Path]:
    """What git knows; every file of the sources where this is no checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [path for part in ("server", "loadtest", "tests", "docs") for path in (ROOT / part).rglob("*.[pm][yd]")]
