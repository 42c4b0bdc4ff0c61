"""The Dockerfile: no complaint of a linter, and as far as it can be looked at without building it.

`scripts/check_dockerfile.py` executes it for real; it needs root and minutes, so it is not run here.
"""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import Tool
from .files import ROOT

DOCKERFILE = ROOT / "Dockerfile"
VARIANTS = ("cpu", "cuda")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dockerfile", ROOT / "scripts" / "check_dockerfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


script = load_script()


def steps(variant: str, word: str) -> list[str]:
    """What follows `word` in the stages that the variant is made of."""
    every = script.needed(script.stages(DOCKERFILE.read_text(encoding="utf-8"), VARIANT=variant))
    return [rest for stage in every for found, rest in stage.steps if found == word]


@pytest.mark.parametrize("path", [DOCKERFILE, ROOT / "deploy" / "ray" / "Dockerfile"], ids=["server", "ray"])
def test_the_linter_has_nothing_to_say(path: Path, hadolint: Tool) -> None:
    done = hadolint("--config", ROOT / ".hadolint.yaml", path)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_have_something_to_say(hadolint: Tool, tmp_path: Path) -> None:
    worse = DOCKERFILE.read_text(encoding="utf-8").replace("USER 10001:10001", "USER root")
    (tmp_path / "Dockerfile").write_text(worse)
    done = hadolint("--config", ROOT / ".hadolint.yaml", tmp_path / "Dockerfile")
    assert done.returncode != 0
    assert "DL3002" in done.stdout


def test_it_is_for_the_cpu_unless_told_otherwise() -> None:
    every = script.stages(DOCKERFILE.read_text(encoding="utf-8"))
    assert [s.name for s in script.needed(every)] == ["index-cpu", "build", "runtime-cpu", "final"]


def test_only_the_image_for_gpus_has_a_compiler_and_cuda() -> None:
    installed = {v: {p for step in steps(v, "RUN") for p in re.findall(r"\b(gcc|libc6-dev)\b", step)} for v in VARIANTS}
    assert installed == {"cpu": set(), "cuda": {"gcc", "libc6-dev"}}
    indexes = {v: next(e for e in steps(v, "ENV") if e.startswith("TORCH_INDEX")) for v in VARIANTS}
    assert indexes["cpu"].endswith("/whl/cpu")
    assert indexes["cuda"] == "TORCH_INDEX=https://pypi.org/simple"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_built_is_copied_and_the_tools_stay_behind(variant: str) -> None:
    last = script.needed(script.stages(DOCKERFILE.read_text(encoding="utf-8"), VARIANT=variant))[-1]
    assert ("COPY", "--from=build /opt/manylora /opt/manylora") in last.steps
    assert not [word for word, _ in last.steps if word == "RUN"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_run_line_is_a_script_that_a_shell_can_read(variant: str) -> None:
    lines = steps(variant, "RUN")
    assert len(lines) >= 5
    for line in lines:
        command = re.sub(r"^(--mount=\S+\s+)+", "", line)
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_everything_that_is_copied_is_there_and_sent() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for step in steps("cpu", "COPY"):
        if not step.startswith("--from="):
            for source in step.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert script.is_sent(source, ignore), source


@pytest.mark.parametrize("path", [".git/config", ".venv/bin/python", ".env", "docs/api.md", "server/manylora/_C.so"])
def test_nothing_else_is_sent(path: str) -> None:
    assert not script.is_sent(path, (ROOT / ".dockerignore").read_text(encoding="utf-8"))


def test_torch_is_the_version_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(d for d in project["dependencies"] if d.startswith("torch=="))
    assert any(f" {wanted} " in step for step in steps("cpu", "RUN"))


def test_what_a_server_may_need_is_installed() -> None:
    """All extras but those of the command line's other work, of the project itself and of the image of deploy/ray."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [extras] = [found for step in steps("cpu", "RUN") for found in re.findall(r'"\.\[([a-z0-9,]+)\]"', step)]
    others = {"lifecycle", "loadtest", "locust", "ray", "dev"}
    assert set(extras.split(",")) == {*project["optional-dependencies"]} - others


def test_models_and_data_are_volumes_of_the_images_user() -> None:
    assert steps("cpu", "VOLUME") == ['["/cache", "/data"]']
    owned = next(step for step in steps("cpu", "RUN") if "useradd" in step)
    assert "--uid 10001" in owned
    assert "install -d -o manylora -g manylora /cache /data" in owned
    env = steps("cpu", "ENV")[-1]
    assert {"XDG_CACHE_HOME=/cache", "HF_HOME=/cache/huggingface", "MANYLORA_DATA_DIR=/data"} <= set(env.split())


def test_each_line_has_the_python_that_the_project_supports() -> None:
    version = re.search(r"^ARG PYTHON=(\S+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version is not None
    assert f">={version[1]}" == project["requires-python"]
