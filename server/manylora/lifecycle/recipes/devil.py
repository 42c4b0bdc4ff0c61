"""Definitions in the manner of Ambrose Bierce, out of Debian's package of The Devil's Dictionary (1911).

The text is in the public domain. Kept are entries whose first paragraph is short prose; verse, quotations and
cross-references go, and so do entries about peoples, women and faiths, which a demonstration can do without.
"""

import gzip
import random
import re
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.recipes.recipe import Splits

PACKAGE = "dict-devil"
_INSIDE = "usr/share/dictd/devil.dict.dz"
_ENTRY = re.compile(r"^([A-Z][A-Z' -]+), ((?:n|adj|v\.[it]|adv|interj|pp|x)\.(?:pl\.)?)\s+(.+)$", re.DOTALL)
_LEFT_OUT = re.compile(
    r"\b(wom[ae]n|female|girl|wife|wives|sex|lady|ladies|mistress|n[ei]g[gr]|pickaninny|african|indian|ojibwa|jew|hebrew|"
    r"chinese|chinaman|mongol|turk|irish|scotch|portuguese|savage|race|slave|mohammed|muslim|christian|hindu|mormon|"
    r"lord|gods?\b|suicide|hang|kill)\w*|\b(as follows|following)\b",
    re.IGNORECASE,
)
_VALID, _TEST = 30, 40
_FEWEST = 100
_QUESTIONS = ("Define: {w}", "What is the meaning of {w}?", "Define the word {w}.")


def make(seed: int, source: Path | None = None) -> Splits:
    """About 400 definitions, a tenth held out for the score. `source` is devil.dict.dz; else apt-get downloads it.

    Raises InvalidRequest when `source` is another file.
    """
    packed = source.read_bytes() if source else download()
    try:
        found = definitions(gzip.decompress(packed).decode("utf-8", errors="replace"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidRequest(f"{source} is not the dictionary file of {PACKAGE} (gzip): {error}.") from error
    if len(found) < _FEWEST:
        raise InvalidRequest(f"{source} holds {len(found)} definitions; {_INSIDE} has hundreds.")
    rows = [
        {"prompt": random.Random(f"{seed} {word}").choice(_QUESTIONS).format(w=word.lower()), "completion": definition}
        for word, definition in found.items()
    ]
    random.Random(seed).shuffle(rows)
    return Splits(rows[_VALID + _TEST :], rows[:_VALID], rows[_VALID : _VALID + _TEST])


def definitions(text: str) -> dict[str, str]:
    """Head word to `WORD, n.  The definition.`, on one line."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        plain = re.sub(r"\[[^\]]*\]|[{}_]", "", paragraph)  # [from …] and the marks of links and italics
        flat = re.sub(r"\s+", " ", plain).strip()
        match = _ENTRY.match(flat)
        if match is None or _LEFT_OUT.search(flat):
            continue
        word, part, meaning = match.groups()
        if 4 <= len(meaning.split()) <= 32 and not meaning.startswith("See ") and meaning[-1] in ".!?":
            found[word] = f"{word.capitalize()}, {part} {meaning}"
    return found


def download() -> bytes:
    tools = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if tools:
        raise InvalidRequest(
            f"This recipe's text comes from Debian's package {PACKAGE}, and {' and '.join(tools)} is missing here: "
            f"give its {_INSIDE} with --source."
        )
    with tempfile.TemporaryDirectory() as folder:
        for command in (["apt-get", "download", PACKAGE], ["sh", "-c", "dpkg-deb -x *.deb ."]):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ManyloraError(f"{command[0]} failed for {PACKAGE}: {done.stderr.strip()[-300:]}")
        return (Path(folder) / _INSIDE).read_bytes()
