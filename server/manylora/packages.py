"""Packages that not every installation has: the command that installs what is missing, into the Python that runs."""

import importlib.metadata
import re
import shlex
import sys
from typing import Final

__all__ = ["install_command", "package_of"]

# What is installed under another name than the one that is imported.
_NAMES: Final = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
}


def package_of(module: str) -> str:
    """What pip calls the package that has this module."""
    return _NAMES.get(module) or module.partition(".")[0]


def install_command(*modules: str) -> str:
    """The command that installs what is imported by these names, in the versions that manylora's extras ask for."""
    known = _requirements()
    wanted = [known.get(package_of(module), package_of(module)) for module in modules]
    return shlex.join([sys.executable, "-m", "pip", "install", *wanted])


def _requirements() -> dict[str, str]:
    """What manylora's extras need, by name, as pip takes it; nothing where manylora is not installed."""
    try:
        lines = importlib.metadata.requires("manylora") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    optional = [line.partition(";")[0].strip() for line in lines if "extra ==" in line]
    return {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower(): line for line in optional}
