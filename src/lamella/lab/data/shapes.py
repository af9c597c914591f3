"""Rows from what odd files hold, where naming columns is not enough: one function for each shape, by its name.

A function takes the rows as they were read and gives rows with the columns of a task. One that is not needed here is
added by `@shape`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from lamella.texts.rows import Row

Shape: TypeAlias = Callable[[Iterable[Row]], Iterator[Row]]
SHAPES: dict[str, Shape] = {}

_BOILERPLATE = 100  # characters; what is shorter says the same of another resource ("Lists the tags of a ...")


def shape(function: Shape) -> Shape:
    """Makes a function known under its name."""
    SHAPES[function.__name__] = function
    return function


@shape
def trec(rows: Iterable[Row]) -> Iterator[Row]:
    """Lines such as `DESC:manner How did serfdom develop ...`."""
    for row in rows:
        label, text = row["line"].split(" ", 1)
        yield {"text": text.strip(), "label": label.split(":")[0]}


@shape
def vader(rows: Iterable[Row]) -> Iterator[Row]:
    """Sentences with a mean human score from -4 to 4: -0.5 or less is negative, 0.5 or more positive."""
    for row in list(rows)[1:]:
        number, score, text = row["line"].split("\t")
        side = (float(score) >= 0.5) - (float(score) <= -0.5)
        # `12_3` is the third sentence of review 12
        yield {"text": text, "label": ("negative", "neutral", "positive")[side + 1], "document": number.split("_")[0]}


@shape
def dialogue(rows: Iterable[Row]) -> Iterator[Row]:
    """A statement and its reply; a reply often returns as the next statement, so stretches of the film are numbered."""
    for index, row in enumerate(rows):
        statement = row["statement"].strip()
        yield {
            "prompt": f"{statement}\n" if statement else "",
            "completion": row["reply"].strip(),
            "stretch": index // 200,
        }


@shape
def stripped(rows: Iterable[Row]) -> Iterator[Row]:
    """Texts without the white space around them."""
    for row in rows:
        yield {"text": row["text"].strip()}


@shape
def glosses(rows: Iterable[Row]) -> Iterator[Row]:
    """A dictionary's words with their meanings; words of one stem explain each other."""
    for row in rows:
        for word, entry in row["content"].items():
            meanings = [meaning["text"].strip() for part in entry["pos"] for meaning in part["definitions"]]
            yield {"text": f"{word}: {' '.join(dict.fromkeys(meanings))}" if meanings else "", "stem": word[:4]}


@shape
def technical(rows: Iterable[Row]) -> Iterator[Row]:
    """What the operations of a service do, from a file of each service."""
    for row in rows:
        for operation in row["content"]["operations"].values():
            text = html.unescape(re.sub(r"<[^>]*>", " ", operation.get("documentation", "")))
            text = " ".join(text.split())
            if len(text) >= _BOILERPLATE:
                yield {"text": text, "service": row["file"].parts[-3]}


@shape
def healthtweets(rows: Iterable[Row]) -> Iterator[Row]:
    """Tweets whose id begins with their outlet."""
    for row in rows:
        yield {"text": row["text"], "label": row["source_id"].rsplit("-", 1)[0]}


@shape
def openbookqa(rows: Iterable[Row]) -> Iterator[Row]:
    """The hub's questions, whose options are lettered; those of a local copy have our columns."""
    for row in rows:
        if "question_stem" not in row:
            yield row
            continue
        options = row["choices"]
        label = list(options["label"]).index(row["answerKey"])
        yield {"question": row["question_stem"], "choices": list(options["text"]), "label": label}


@shape
def scienceqa(rows: Iterable[Row]) -> Iterator[Row]:
    """The questions without a picture, the hint before the question."""
    for row in rows:
        if row.get("image") is None:
            question = f"{row['hint'].strip()}\n{row['question']}".strip()
            label = row["label"] if "label" in row else row["answer"]
            yield {"question": question, "choices": row["choices"], "label": label}


@shape
def wikitext(rows: Iterable[Row]) -> Iterator[Row]:
    """Lines of WikiText as articles, each of which starts with a line `= Title =`."""
    articles: list[list[str]] = []
    for line in (row["text"].strip() for row in rows):
        title = line.startswith("= ") and line.endswith(" =") and not line.startswith("= =")
        if title or not articles:
            articles.append([])
        if line:
            articles[-1].append(line)
    for lines in articles:
        if lines:
            yield {"text": "\n".join(lines)}
