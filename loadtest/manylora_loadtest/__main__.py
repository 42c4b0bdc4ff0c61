"""`python -m manylora_loadtest`, and `manylora-loadtest`."""

import importlib
import sys

from manylora.packages import install_command, package_of

_NEEDED = ("aiohttp",)


def main() -> None:
    """The command, or, where it cannot run at all, what to install."""
    for module in _NEEDED:
        try:
            importlib.import_module(module)
        except ImportError:
            sys.exit(f"The load test needs {package_of(module)}. Install it with: {install_command(module)}")
    from manylora_loadtest.cli import main as run

    run()


if __name__ == "__main__":
    main()
