"""The dashboard's words: one table, whole in every language, and no text of the page outside it."""

import json
import re
from pathlib import Path

import pytest

from manylora.api import dashboard_routes

FOLDER = Path(dashboard_routes.__file__).parent / "dashboard"
TABLE = FOLDER / "words.js"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.js")) if path != TABLE]
PAGE = (FOLDER / "index.html").read_text(encoding="utf-8")
ROW = re.compile(r'^  "([\w.]+)": (\[.*\]),$', re.MULTILINE)
WORDS: dict[str, list[str]] = {key: json.loads(forms) for key, forms in ROW.findall(TABLE.read_text(encoding="utf-8"))}
HOLE = re.compile(r"\{(\w+)\}")
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'|`((?:[^`\\]|\\.)*)`')
# A capital and small letters, or three words in a row: what people read, and neither a class nor a key nor a path.
PROSE = re.compile(r"(?:^|[\s>(])[A-Z][a-z]+(?:[\s.…:?,<]|$)|\b[a-z]{2,} [a-z]{2,} [a-z]{2,}\b")
# Names that programs give to things, and what the snippets to copy and uPlot's fonts are made of.
NO_PROSE = re.compile(
    r"\b(?:AbortError|ArrowRight|ArrowLeft|ArrowDown|ArrowUp|Home|End|Infinity|Enter|Files|Bearer|Ctrl-Enter"
    r"|True|False|None|Python|English|String)\b|noopener noreferrer nofollow|manylora adapters history"
    r"|print\(|import os|from openai|client = OpenAI|for event in client"
)


def sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS) + TABLE.read_text(encoding="utf-8") + PAGE


def test_every_row_has_each_language_with_the_same_holes() -> None:
    assert len(WORDS) == sum(line.startswith('  "') for line in TABLE.read_text(encoding="utf-8").splitlines())
    for key, forms in WORDS.items():
        assert len(forms) == 2, key
        assert all(forms), key
        holes = [{*HOLE.findall(form)} - {"n"} for form in forms]
        assert holes[0] == holes[1], key
        assert "|" not in forms[1], "Chinese has one form for every number"
        assert re.search("[\u4e00-\u9fff]", HOLE.sub("", forms[1])) or forms[0] == forms[1] or HOLE.search(forms[0]), (
            key
        )


def test_every_key_that_is_asked_for_is_there_and_every_row_is_asked_for() -> None:
    text = sources()
    rest = ROW.sub("", text)
    asked = {*re.findall(r'\bt\("([\w.]+)"', rest), *re.findall(r'data-t(?:-[\w-]+)?="([\w.]+)"', rest)}
    assert asked - WORDS.keys() == set()
    made = re.findall(r"`([\w.]*)\$\{[^}`]*\}([\w.]*)`", rest)
    patterns = [rf"{re.escape(before)}\w+{re.escape(after)}" for before, after in made if before]
    quoted = {*re.findall(r'"([\w.]+)"', rest)}
    unused = {key for key in WORDS if key not in asked | quoted and not any(re.fullmatch(p, key) for p in patterns)}
    assert unused == set()


def prose_of(text: str) -> list[str]:
    """What people would read in a script's literals. Comments and the insides of `${…}` are left out."""
    text = re.sub(r"/\*.*?\*/|(?<![:\"'])//[^\n]*", "", text, flags=re.DOTALL)
    literals = ["".join(groups) for groups in LITERAL.findall(text)]
    bare = [NO_PROSE.sub("", re.sub(r"\$\{[^}]*\}", "", re.sub(r"<[^>]*>", " ", literal))) for literal in literals]
    return [literal for literal in bare if PROSE.search(literal)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_has_words_of_its_own(path: Path) -> None:
    assert prose_of(path.read_text(encoding="utf-8")) == []


def test_words_in_a_script_would_be_found() -> None:
    for written in ('h("p", {}, "Nothing yet.")', "html`<p>${x} are still missing here</p>`", 'toast("Done")'):
        assert len(prose_of(written)) == 1, written
    assert prose_of('h("p", { class: "card-head wrap" }, t("close"))  // Not a word.') == []


def test_the_markup_has_no_words_of_its_own() -> None:
    body = re.sub(r"<noscript>.*?</noscript>|<title>.*?</title>", "", PAGE, flags=re.DOTALL)
    texts = {text.strip() for text in re.findall(r">([^<]+)<", body)} - {""}
    assert texts == {"manylora", "…"}
    assert re.findall(r'(?:aria-label|placeholder|title)="', re.sub(r"data-t-[\w-]+=", "", body)) == []
