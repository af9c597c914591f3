import itertools
import random

import pytest
from tests.cli.conftest import lamella

from lamella.lab.probing.tasks import Sentences

__all__ = ["lamella"]
_FIRST = ["she", "they", "we", "who", "you", "he"]
_VERBS = ["baked", "sold", "found", "took", "saw", "made"]
_NOUNS = ["bread", "boats", "horses", "letters", "lamps", "stones", "coins", "trees", "maps", "boxes", "shoes", "bells"]
_LAST = ["then", "now", "once", "again"]


@pytest.fixture(scope="session")
def sentences() -> Sentences:
    """Sentences of four to seven words, 200 of them, of two classes by their subject."""
    built = random.Random(0).sample(list(itertools.product(_FIRST, _VERBS, _NOUNS)), 200)
    texts = tuple(f"{' '.join(words)} {' '.join(_LAST[: 1 + at % 4])}" for at, words in enumerate(built))
    return Sentences(texts, tuple("one" if text.startswith(("she", "who", "he")) else "many" for text in texts))
