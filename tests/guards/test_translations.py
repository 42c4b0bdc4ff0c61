"""Pages in another language: the same commands in the same order as the page that they translate, which tests run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is run, with the mark that says why not; outputs and drawings too.
_BLOCK = re.compile(r"(?:^<!-- [^\n]+ -->\n)?^```\w*\n.*?^```", re.DOTALL | re.MULTILINE)
TRANSLATIONS = {
    "README.zh.md": "README.md",
    "docs/lora.zh.md": "docs/lora.md",
    "docs/tutorial.zh.md": "docs/tutorial.md",
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_every_translation_is_known() -> None:
    found = [*ROOT.glob("*.zh.md"), *(ROOT / "docs").glob("*.zh.md")]
    assert {str(path.relative_to(ROOT)) for path in found} == set(TRANSLATIONS)


@pytest.mark.parametrize(("page", "original"), TRANSLATIONS.items())
def test_a_translation_has_the_commands_of_its_original(page: str, original: str) -> None:
    assert _BLOCK.findall(text_of(page)) == _BLOCK.findall(text_of(original))
    assert f"]({Path(page).name})" in text_of(original)
    assert f"]({Path(original).name})" in text_of(page)
