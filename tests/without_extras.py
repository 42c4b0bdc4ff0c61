"""A process in which some packages cannot be found, and that runs commands one by one; `test_extras` starts it.

Reads JSON from standard input: the `hidden` modules, and for each command its name and arguments, the first of which is
the module whose `main` it is. Prints as JSON what each printed and its exit code.
"""

import importlib
import io
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class Without(PathFinder):
    """Finds what is on the path, but for the modules that are hidden, and what is inside of them."""

    hidden: tuple[str, ...] = ()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in cls.hidden):
            return None
        return super().find_spec(fullname, path, target)


def run(module: str, words: list[str]) -> tuple[int | None, str]:
    """The exit code and what was printed; None and a traceback where an exception came out."""
    out = io.StringIO()
    sys.argv = ["manylora", *words]
    with redirect_stdout(out), redirect_stderr(out):
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            return code, out.getvalue() + (end.code if isinstance(end.code, str) else "")
        except BaseException:  # noqa: BLE001 - whatever comes out is what the test looks for
            return None, out.getvalue() + traceback.format_exc()
    return 0, out.getvalue()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    Without.hidden = tuple(asked["hidden"])
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
    found = {name: run(module, words) for name, (module, *words) in asked["commands"].items()}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
