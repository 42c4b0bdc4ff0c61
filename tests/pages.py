"""Pages whose blocks of code are run: what is on them."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ADDRESS", "DOCS", "Block", "blocks"]

DOCS = Path(__file__).parents[1] / "docs"
ADDRESS = "http://127.0.0.1:8000"  # of the server, on every page
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|make clients): (?P<what>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```"
    r"|^#+ (?P<heading>[^\n]*)$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a page below `heading`. `why_not`: why it is not run where the page is followed from top to bottom.

    `installs` is the command that installs what it needs, where it is run with other blocks of its client.
    """

    kind: str
    text: str
    heading: str = ""
    why_not: str | None = None
    installs: str | None = None


def blocks(page: str) -> list[Block]:
    """In order. What a block that is not run would print is not run either."""
    found: list[Block] = []
    heading = ""
    for match in _BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        if match["heading"] is not None:
            heading = match["heading"]
            continue
        installs = match["what"] if match["mark"] == "make clients" else None
        why_not = match["what"] if installs is None else "make clients runs it"
        if match["kind"] == "text" and found and found[-1].installs is not None:
            installs, why_not = found[-1].installs, found[-1].why_not
        found.append(Block(match["kind"], match["text"], heading, why_not, installs))
    return found
