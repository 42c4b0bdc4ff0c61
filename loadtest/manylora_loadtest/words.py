"""Text of a given length, from common English words that are one token each in most vocabularies.

The server's own count (`usage`) is what results and reports quote; the number of words is what is asked for.
"""

from typing import Final

import numpy as np

__all__ = ["WORDS", "random_text"]

_TEXT: Final = (
    "the of and to in is you that it he was for on are as with his they I at be this have from or one had by "
    "word but not what all were we when your can said there use an each which she do how their if will up other "
    "about out many then them these so some her would make like him into time has look two more write go see "
    "number no way could people"
)
WORDS: Final = tuple(_TEXT.split())


def random_text(num_words: int, rng: np.random.Generator) -> str:
    return " ".join([WORDS[i] for i in rng.integers(0, len(WORDS), size=num_words)])
