"""Properties of sentences that a probe is asked for: labels computed from the text itself, without a parser.

After SentEval's probing tasks (Conneau et al. 2018, arXiv 1805.01070), for small texts. Each has a control task (Hewitt
& Liang 2019, arXiv 1909.03368): the same inputs with labels that mean nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError
from lamella.lab.data import Task

Ints: TypeAlias = npt.NDArray[np.int64]
Kind: TypeAlias = Literal["surface", "syntactic", "semantic"]
# a text, and the name of its class
Labelled: TypeAlias = tuple[str, str]

LEAST = 10  # rows of a class; of fewer nothing can be learned and tested
_WORDS = (4, 40)  # of a sentence, at least and at most
_PARTS = {"train": 0.5, "validation": 0.2, "test": 0.3}
_MOST = 10_000  # sentences that are looked at; they are in an order by chance
_CONTENT_WORDS = 10  # that word content tells apart
_DEALS = 20  # of the beginnings of a control
_COMMON = 0.1  # a word in more sentences than this share is no content word of mid frequency
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PLAIN = re.compile(r"[a-z]+")
CLOSED_CLASS = frozenset(
    _PLAIN.findall(
        "a about above across after again against all along also although am among an and another any anybody "
        "anyone anything are around as at away back be because been before behind being below beneath beside "
        "between beyond both but by can cannot could did do does doing done down during each either else enough "
        "even ever every everybody everyone everything few for from had has have having he hence her here hers "
        "herself him himself his how however i if in inside instead into is it its itself just least less lest "
        "like many may me might mine more most much must my myself near neither never no nobody none nor not "
        "nothing now of off often on once one only onto or other others ought our ours ourselves out outside over "
        "own per quite rather same shall she should since so some somebody someone something still such than that "
        "the their theirs them themselves then there therefore these they this those though through throughout "
        "thus till to too toward towards under unless until up upon us very was we were what whatever when "
        "whenever where whereas wherever whether which whichever while who whoever whole whom whose why will with "
        "within without would yet you your yours yourself yourselves"
    )
)


@dataclass(frozen=True)
class Sentences:
    """Unlike sentences of a task in the order of their SHA-256, so that the first ones stand for all.

    Attributes:
        texts: each with words enough to ask something of it.
        classes: of each, by name; None where the task has none.
    """

    texts: tuple[str, ...]
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Property:
    """Texts with what a probe is asked of them, as many of each class; a sentence is in one of the three parts.

    Attributes:
        name: such as "length".
        kind: which sort of property it is.
        question: what is asked, in words.
        texts: (rows,), as the model reads them.
        labels: (rows,) indices of classes.
        classes: their names.
        parts: indices of rows, by "train", "validation" and "test".
    """

    name: str
    kind: Kind
    question: str
    texts: tuple[str, ...]
    labels: Ints
    classes: tuple[str, ...]
    parts: dict[str, Ints]

    @property
    def floor(self) -> float:
        """What the commonest class of the training rows reaches on the test rows."""
        commonest = np.bincount(self.labels[self.parts["train"]]).argmax()
        return float((self.labels[self.parts["test"]] == commonest).mean())

    def control(self, seed: int) -> Ints:
        """Labels (rows,) that mean nothing: how a text begins is given a class, at random and for good.

        A beginning is as many first words as it takes for none to have more rows than a class. In a random order, each
        goes to the class with the fewest rows so far; of several such deals the most even one is taken, so that the
        control is as good as balanced. What a probe reaches on it is what it learns by heart of words.
        """
        beginnings = self._beginnings()
        counts = sorted(Counter(beginnings).items())
        generator = random.Random(seed)
        deals = [_deal(generator.sample(counts, len(counts)), len(self.classes)) for _ in range(_DEALS)]
        class_of, _ = min(deals, key=lambda deal: max(deal[1]))
        return np.asarray([class_of[one] for one in beginnings])

    def _beginnings(self) -> list[str]:
        words = [_words(text) for text in self.texts]
        for many in range(1, max(map(len, words))):
            beginnings = [" ".join(some[:many]) for some in words]
            if max(Counter(beginnings).values()) * len(self.classes) <= len(words):
                return beginnings
        return list(self.texts)


def sentences_of(task: Task) -> Sentences:
    """The sentences of a task's rows, of all its splits: a text with a class as it stands, prose cut at its full stops.

    Raises:
        LamellaError: its rows are not one text each, or none of them is a sentence.
    """
    columns = {column for rows in task.splits.values() for column in rows.column_names}
    if "text" not in columns or task.parts:
        raise LamellaError(
            f"The rows of '{task.name}' are not one text each, as a probe reads them. Choose a task of such rows, as "
            "--text trec, movies or news are, or a file with a column text."
        )
    found: dict[str, Labelled] = {}
    for row in (row for rows in task.splits.values() for row in rows):
        name = task.label_names[row["label"]] if task.label_names else ""
        for text in [row["text"]] if name else _SENTENCE_END.split(row["text"]):
            if _WORDS[0] <= len(words := _words(text)) <= _WORDS[1]:
                found.setdefault(" ".join(words), (" ".join(text.split()), name))
    if not found:
        raise LamellaError(
            f"No text of '{task.name}' has {_WORDS[0]} to {_WORDS[1]} words, as a sentence has. Choose another --text."
        )
    kept = [found[words] for words in sorted(found, key=lambda words: _hash("order", words))[:_MOST]]
    texts, classes = zip(*kept, strict=True)
    return Sentences(texts, classes if task.label_names else None)


def properties_of(sentences: Sentences, rows: int) -> tuple[list[Property], list[str]]:
    """The properties that these sentences have rows for, each of at most ``rows`` rows, and notes on what was left out.

    Raises:
        LamellaError: there are too few rows for any.
    """
    made, notes = [], []
    for name, (kind, question, label) in _PROPERTIES.items():
        labelled = list(dict(label(sentences)).items())  # two sentences may be changed into the same one
        classes, each = _classes(Counter(one for _, one in labelled), rows)
        if each < LEAST:
            if labelled:
                notes.append(f"{name}: left out, as no two classes have {LEAST} rows each")
            continue
        if left := sorted({one for _, one in labelled} - set(classes)):
            notes.append(f"{name}: left out for balance, having fewer than {each:,} rows: {', '.join(left)}")
        made.append(_property(name, kind, question, labelled, classes, each))
    if not made:
        raise LamellaError(
            f"{len(sentences.texts):,} sentences and at most {rows:,} rows are too few to probe for anything: every "
            f"property needs {LEAST} rows of each of two classes at least. Give a longer --text, or more --rows."
        )
    return made, notes


def _classes(counts: Counter[str], rows: int) -> tuple[list[str], int]:
    """The commonest classes and how many rows each has, so that there are most rows and, of equally many, classes."""
    ordered = [name for name, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]
    sizes = {many: min(counts[ordered[many - 1]], rows // many) for many in range(2, len(ordered) + 1)}
    many = max(sizes, key=lambda many: (many * sizes[many], many), default=0)
    return sorted(ordered[:many]), sizes.get(many, 0)


def _property(
    name: str,
    kind: Kind,
    question: str,
    labelled: Sequence[Labelled],
    classes: Sequence[str],
    each: int,
) -> Property:
    texts: list[str] = []
    labels: list[int] = []
    parts: dict[str, list[int]] = {part: [] for part in _PARTS}
    ends = np.cumsum([round(each * share) for share in list(_PARTS.values())[:-1]])
    for label, one in enumerate(classes):
        rows = np.arange(len(texts), len(texts) + each)
        texts += [text for text, its in labelled if its == one][:each]
        labels += [label] * each
        for part, own in zip(_PARTS, np.split(rows, ends), strict=True):
            parts[part] += own.tolist()
    split = {part: np.asarray(rows) for part, rows in parts.items()}
    return Property(name, kind, question, tuple(texts), np.asarray(labels), tuple(classes), split)


def _deal(counts: Sequence[tuple[str, int]], classes: int) -> tuple[dict[str, int], list[int]]:
    """The class of each beginning, and how many rows each class has."""
    class_of, rows = {}, [0] * classes
    for beginning, count in counts:
        class_of[beginning] = rows.index(min(rows))
        rows[class_of[beginning]] += count
    return class_of, rows


def _length(sentences: Sentences) -> Iterator[Labelled]:
    """Which quarter of the sentences a sentence belongs to by its words; equally long ones are in one."""
    lengths = np.asarray([len(_words(text)) for text in sentences.texts])
    ends = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="lower"))
    starts = [int(lengths.min()), *(int(end) + 1 for end in ends)]
    lasts = [*map(int, ends), int(lengths.max())]
    names = [f"{first:02d}-{last:02d} words" for first, last in zip(starts, lasts, strict=True)]
    for text, bin_ in zip(sentences.texts, np.searchsorted(ends, lengths), strict=True):
        yield text, names[bin_]


def _word(sentences: Sentences) -> Iterator[Labelled]:
    """Which one of the commonest content words is there; sentences with none of them or several are left out."""
    counts = _content_words(sentences.texts)
    most = _COMMON * len(sentences.texts)
    ranked = sorted((word for word in counts if counts[word] <= most), key=lambda word: (-counts[word], word))
    asked = set(ranked[:_CONTENT_WORDS])
    for text in sentences.texts:
        if len(there := asked.intersection(_words(text))) == 1:
            yield text, there.pop()


def _shift(sentences: Sentences) -> Iterator[Labelled]:
    """Whether two neighbouring words were exchanged: unlike, of small letters, so that no capital tells."""
    known = set(sentences.texts)
    for text in sentences.texts:
        words = text.split()
        places = [at for at in range(len(words) - 1) if _are_plain(*words[at : at + 2]) and words[at] != words[at + 1]]
        if not places:
            continue
        if not _hash("shift", text) % 2:
            yield text, "as written"
            continue
        at = places[_hash("place", text) % len(places)]
        changed = " ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])
        if changed not in known:
            yield changed, "two words exchanged"


def _odd(sentences: Sentences) -> Iterator[Labelled]:
    """Whether a content word of small letters was replaced by another one that is half to twice as frequent."""
    counts = _content_words(sentences.texts)
    known = set(sentences.texts)
    alike: dict[int, list[str]] = {}
    for word in sorted(word for word in counts if counts[word] > 1):
        alike.setdefault(counts[word].bit_length(), []).append(word)
    for text in sentences.texts:
        words = text.split()
        places = [at for at, word in enumerate(words) if counts.get(word, 0) > 1]
        if not places:
            continue
        if not _hash("odd", text) % 2:
            yield text, "as written"
            continue
        at = places[_hash("place", text) % len(places)]
        others = [word for word in alike[counts[words[at]].bit_length()] if word not in words]
        if others:
            changed = " ".join([*words[:at], others[_hash("word", text) % len(others)], *words[at + 1 :]])
            if changed not in known:
                yield changed, "a word replaced"


def _class(sentences: Sentences) -> Iterator[Labelled]:
    """The class that the task gives it."""
    if sentences.classes is not None:
        yield from zip(sentences.texts, sentences.classes, strict=True)


_PROPERTIES: dict[str, tuple[Kind, str, Callable[[Sentences], Iterator[Labelled]]]] = {
    "length": ("surface", "how many words it has, in quarters", _length),
    "word content": ("surface", "which of some frequent content words occurs in it", _word),
    "bigram shift": ("syntactic", "whether two neighbouring words were exchanged", _shift),
    "odd word out": ("semantic", "whether a content word was replaced by one of like frequency", _odd),
    "class": ("semantic", "its class in the task", _class),
}


def _words(text: str) -> list[str]:
    """In lower case; what has neither letter nor digit is none."""
    return [word.lower() for word in text.split() if any(map(str.isalnum, word))]


def _are_plain(*words: str) -> bool:
    return all(map(_PLAIN.fullmatch, words))


def _content_words(texts: Sequence[str]) -> Counter[str]:
    """In how many texts each word of small letters occurs that is of no closed class."""
    found = ({word for word in text.split() if _are_plain(word)} - CLOSED_CLASS for text in texts)
    return Counter(word for words in found for word in words)


def _hash(salt: str, text: str) -> int:
    """A number that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"lamella probe {salt} {text}".encode()).digest()[:8], "big")
