"""Programs of other people that the deployment is checked with."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[..., "subprocess.CompletedProcess[str]"]


def _tool(path: str) -> Tool:
    def run(*arguments: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        command = [path, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)

    return run


def installed(name: str) -> str:
    """The program of Debian's package `prometheus`; a test that asks for it is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: apt-get install prometheus")
    return found


def from_pip(name: str) -> str:
    """A program that the development dependencies bring."""
    return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="session")
def promtool() -> Tool:
    return _tool(installed("promtool"))


@pytest.fixture(scope="session")
def hadolint() -> Tool:
    return _tool(from_pip("hadolint"))


@pytest.fixture(scope="session")
def helm() -> Tool:
    """Helm as `make build/helm/helm` brings it, or the machine's own."""
    brought = Path(__file__).parents[2] / "build" / "helm" / "helm"
    found = str(brought) if brought.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("needs helm: make build/helm/helm")
    return _tool(found)


@pytest.fixture(scope="session")
def docker_compose() -> Tool:
    """The real one, which needs no engine to read a file and check it against its schema."""
    return _tool(from_pip("docker-compose"))
