"""The recipes' sources: an excerpt of the dictionary, and the rated sentences from PyPI."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from manylora.lifecycle.recipes import RECIPES, Splits
from manylora.lifecycle.recipes.sentiment import download

EXCERPT = """
ACADEME, n.  An ancient school where morality and philosophy were
taught.

ACADEMY, n.  [from {ACADEME}]   A modern school where football is
taught.

ABDICATION, n.  An act whereby a sovereign attests his sense of the
high temperature of the throne.

    Poor Isabella's Dead, whose abdication
    Set all tongues wagging in the Spanish nation.
                                                                  G.J.

ACCORD, n.  Harmony.

BRUTE, n.  See {HUSBAND}.

ACCORDION, n.  An instrument in harmony with the sentiments of an
assassin.

KILT, n.  A costume sometimes worn by Scotchmen in America and Americans
in Scotland.

ART, n.  This word has no definition.  Its origin is related as
follows by the ingenious Father Gassalasca Jape, S.J.
"""

SplitsOf: TypeAlias = Callable[..., Splits]


@pytest.fixture(scope="session")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like Debian's, with the excerpt and a hundred entries of the same form."""
    more = "".join(f"\nWORD-{chr(65 + n // 26)}{chr(65 + n % 26)}, n.  The folly of {n} fools.\n" for n in range(110))
    path = tmp_path_factory.mktemp("devil") / "devil.dict.dz"
    path.write_bytes(gzip.compress((EXCERPT + more).encode()))
    return path


@pytest.fixture(scope="session")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vaderSentiment's source package, fetched by pip."""
    path = tmp_path_factory.mktemp("sentiment") / "vaderSentiment.tar.gz"
    path.write_bytes(download())
    return path


@pytest.fixture(scope="session")
def splits_of(dictionary: Path, request: pytest.FixtureRequest) -> SplitsOf:
    """`splits_of(name, seed)`: a recipe's data. Only `sentiment-en` needs a network."""

    def make(name: str, seed: int = 0) -> Splits:
        source = {"devil": "dictionary", "sentiment-en": "ratings"}.get(name)
        return RECIPES[name].splits(seed, request.getfixturevalue(source) if source else None)

    return make
