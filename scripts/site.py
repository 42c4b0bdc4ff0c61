"""The pages in one folder, laid out as in the repository, for MkDocs to make a site of: `make site`.

    python scripts/site.py build/site/pages

Every tracked page comes with what it links to, so that links hold as they stand. `docs/reference.md` is added, which
MkDocs fills from docstrings. Needs nothing but Python and git.
"""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
_LINK: Final = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")

# Title, what it is for, and the modules of each part of the reference.
PARTS: Final = (
    ("Settings", "What a server is told.", ("manylora.settings",)),
    ("A server in a process", "Everything but the socket.", ("manylora.serving.parts",)),
    (
        "Generating",
        "Requests, and what comes of them.",
        ("manylora.engine.interface", "manylora.engine.async_engine", "manylora.identity"),
    ),
    ("Errors", "What is raised, with the status that HTTP answers.", ("manylora.errors",)),
    (
        "Training",
        "From rows to an adapter.",
        ("manylora.lifecycle.train.config", "manylora.lifecycle.train.train", "manylora.lifecycle.progress"),
    ),
    ("Choosing the rank", "By cross-validation.", ("manylora.lifecycle.train.choose_rank",)),
    (
        "Evaluating",
        "Scores with intervals.",
        ("manylora.lifecycle.evaluate.config", "manylora.lifecycle.evaluate.command"),
    ),
    (
        "Weights",
        "Merging, extracting, compressing, inspecting.",
        (
            "manylora.lifecycle.weights.config",
            "manylora.lifecycle.weights.merge",
            "manylora.lifecycle.weights.extract",
            "manylora.lifecycle.weights.compress",
            "manylora.lifecycle.weights.inspection",
        ),
    ),
    ("Speaking to a server", "What the commands use.", ("manylora.client.server", "manylora.client.adapters")),
)


def reference() -> str:
    """The page of the API, as directives for mkdocstrings."""
    lines = ["# Reference", "", "From the docstrings. How it goes together is in [python.md](python.md).", ""]
    for title, what, modules in PARTS:
        lines += [f"## {title}", "", what, ""]
        lines += [line for module in modules for line in (f"::: {module}", "")]
    return "\n".join(lines)


def tracked_pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.splitlines()]


def linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to, from its root."""
    for target in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        found = (ROOT / page.parent / target).resolve()
        if found.is_file() and found.is_relative_to(ROOT):
            yield found.relative_to(ROOT)


def gather(out: Path) -> None:
    """Write the folder anew."""
    shutil.rmtree(out, ignore_errors=True)
    pages = tracked_pages()
    for path in {*pages, *(found for page in pages for found in linked(page))}:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, out / path)
    (out / "docs" / "reference.md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    gather(parser.parse_args().out)
