"""Public benchmarks by name, from a local mirror folder or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lamella.errors import LamellaError
from lamella.lab.data.origins import MIRROR, Raw, from_hub, from_mirror, mirror_folder
from lamella.lab.data.splitting import Splits, build_task, complete_published, split_whole
from lamella.lab.data.task import Task
from lamella.texts.rows import Row, Table, TaskKind, check_published


def _same(rows: list[Row]) -> list[Row]:
    return rows


def _renamed(**columns: str) -> Callable[[list[Row]], list[Row]]:
    """Rows with hub columns renamed; rows that already have our columns pass unchanged."""
    return lambda rows: [{columns.get(column, column): value for column, value in row.items()} for row in rows]


def _openbookqa(rows: list[Row]) -> list[Row]:
    if "question_stem" not in rows[0]:
        return rows
    return [
        {
            "question": row["question_stem"],
            "choices": list(row["choices"]["text"]),
            "label": list(row["choices"]["label"]).index(row["answerKey"]),
        }
        for row in rows
    ]


def _scienceqa(rows: list[Row]) -> list[Row]:
    """The questions without a picture, the hint before the question."""
    return [
        {
            "question": f"{row['hint'].strip()}\n{row['question']}".strip(),
            "choices": row["choices"],
            "label": row["label"] if "label" in row else row["answer"],
        }
        for row in rows
        if row.get("image") is None
    ]


def _articles(rows: list[Row]) -> list[Row]:
    """Lines of WikiText as whole articles, each of which starts with a line `= Title =`."""
    articles: list[list[str]] = []
    for line in (row["text"].strip() for row in rows):
        title = line.startswith("= ") and line.endswith(" =") and not line.startswith("= =")
        if title or not articles:
            articles.append([])
        if line:
            articles[-1].append(line)
    return [{"text": "\n".join(lines)} for lines in articles if lines]


@dataclass(frozen=True)
class PublicTask:
    """Where a public task lies and how its rows become ours.

    Attributes:
        kind: kind of the rows.
        folder: its folder in the mirror.
        mirror: files of the mirror that make each of our splits.
        licence: terms, as far as the authors state any.
        hub: (repository, config) on the hub; None where no copy loads without running its code.
        hub_splits: split of the hub that makes each of ours.
        adapt: the rows of a split with our columns.
        label_names: name of each label.
        metric: the benchmark's metric, where it is not the kind's usual one.
        subset: column that `name/SUBSET` selects by.
        few_shot: rows kept for training, all others being the test; 0 for tasks with published splits.
        watched: further rows of such a task, kept for validation.
        caution: a note for the user.
    """

    kind: TaskKind
    folder: str
    mirror: Mapping[str, tuple[str, ...]]
    licence: str
    hub: tuple[str, str | None] | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[list[Row]], list[Row]] = _same
    label_names: tuple[str, ...] = ()
    metric: str | None = None
    subset: str | None = None
    few_shot: int = 0
    watched: int = 0
    caution: str = ""


_GLUE_SPLITS = {"train": "train", "test": "validation"}
_TRAIN_DEV = {"train": ("train",), "test": ("dev",)}
_NO_HUB_TEST = "the published development rows are the test split: the benchmark's own test labels are not public"

PUBLIC_TASKS: dict[str, PublicTask] = {
    "sst2": PublicTask(
        "classification", "sst2", _TRAIN_DEV, "not stated (Stanford Sentiment Treebank)", ("nyu-mll/glue", "sst2"),
        _GLUE_SPLITS, _renamed(sentence="text"), ("negative", "positive"), caution=_NO_HUB_TEST,
    ),
    "cola": PublicTask(
        "classification", "cola", {"train": ("train",), "test": ("dev_in_domain", "dev_out_of_domain")},
        "not stated (texts from linguistics literature, fair use)", ("nyu-mll/glue", "cola"), _GLUE_SPLITS,
        _renamed(sentence="text"), ("unacceptable", "acceptable"), "matthews", caution=_NO_HUB_TEST,
    ),
    "rte": PublicTask(
        "pair-classification", "rte", _TRAIN_DEV, "not stated (GLUE)", ("nyu-mll/glue", "rte"), _GLUE_SPLITS,
        _renamed(sentence1="text1", sentence2="text2"), ("entailment", "not_entailment"), caution=_NO_HUB_TEST,
    ),
    "mnli": PublicTask(
        "pair-classification", "mnli", {"train": ("train",), "test": ("dev_matched",)}, "OANC and others, see GLUE",
        ("nyu-mll/glue", "mnli"), {"train": "train", "test": "validation_matched"},
        _renamed(premise="text1", hypothesis="text2"), ("entailment", "neutral", "contradiction"),
        caution=_NO_HUB_TEST,
    ),
    "mrpc": PublicTask(
        "pair-classification", "mrpc", _TRAIN_DEV, "not stated (Microsoft Research)", ("nyu-mll/glue", "mrpc"),
        {"train": "train", "validation": "validation", "test": "test"},
        _renamed(sentence1="text1", sentence2="text2"), ("not_equivalent", "equivalent"),
    ),
    "qnli": PublicTask(
        "pair-classification", "qnli", _TRAIN_DEV, "CC BY-SA 4.0 (SQuAD)", ("nyu-mll/glue", "qnli"), _GLUE_SPLITS,
        _renamed(question="text1", sentence="text2"), ("entailment", "not_entailment"), caution=_NO_HUB_TEST,
    ),
    "qqp": PublicTask(
        "pair-classification", "qqp", _TRAIN_DEV, "Quora's terms, non-commercial", ("nyu-mll/glue", "qqp"),
        _GLUE_SPLITS, _renamed(question1="text1", question2="text2"), ("not_duplicate", "duplicate"),
        caution=_NO_HUB_TEST,
    ),
    "stsb": PublicTask(
        "regression", "stsb", _TRAIN_DEV, "mixed, mostly CC BY-SA 4.0", ("nyu-mll/glue", "stsb"), _GLUE_SPLITS,
        _renamed(sentence1="text1", sentence2="text2"), caution=_NO_HUB_TEST,
    ),
    "openbookqa": PublicTask(
        "multiple-choice", "openbookqa", {"train": ("train",), "test": ("test",)}, "Apache-2.0",
        ("allenai/openbookqa", "main"), {"train": "train", "validation": "validation", "test": "test"}, _openbookqa,
    ),
    "scienceqa": PublicTask(
        "multiple-choice", "scienceqa_mola", {"train": ("train",), "validation": ("validation",), "test": ("test",)},
        "CC BY-NC-SA 4.0", ("derek-thomas/ScienceQA", None),
        {"train": "train", "validation": "validation", "test": "test"}, _scienceqa,
    ),
    "blitzer": PublicTask(
        "classification", "blitzer_domains", _TRAIN_DEV, "not stated (Blitzer et al. 2007; airline reviews)",
        label_names=("negative", "positive"), subset="domain",
    ),
    "e2e": PublicTask(
        "seq2seq", "e2e_nlg", {"train": ("dev",), "test": ("test",)}, "CC BY-SA 4.0",
        adapt=_renamed(mr="source", ref="target"),
    ),
    "wikitext2": PublicTask(
        "causal-lm", "wikitext2", {"train": ("valid",), "test": ("test",)}, "CC BY-SA 3.0",
        ("Salesforce/wikitext", "wikitext-2-v1"), {"train": "train", "validation": "validation", "test": "test"},
        _articles,
    ),
    "bbh": PublicTask(
        "seq2seq", "bbh", {"all": ("test",)}, "MIT", adapt=_renamed(input="source"), metric="exact_match",
        subset="task", few_shot=5,
    ),
}  # fmt: skip
# the same rows for those who learn one task to use it on another: most tasks have 250, which leaves 100 for the test
PUBLIC_TASKS["bbh-split"] = replace(PUBLIC_TASKS["bbh"], few_shot=140, watched=10)


def load_public(name: str, seed: int = 0, *, hub_only: bool = False) -> Task:
    """A public task, from the folder that `LAMELLA_DATA` names when it holds the task, otherwise from the hub.

    Args:
        name: a key of `PUBLIC_TASKS`, with `/SUBSET` where the task has subsets.
        seed: order of the training rows.
        hub_only: leave the mirror aside.

    Raises:
        LamellaError: the rows lie in neither place, or the subset is unknown.
    """
    stem, _, subset = name.partition("/")
    public = PUBLIC_TASKS[stem]
    raw = _raw(stem, public, hub_only)
    splits = _checked(stem, public, raw)
    if public.subset:
        splits = _selected(stem, public, subset, splits)
    elif subset:
        raise LamellaError(f"{stem} has no subsets, so {name!r} names nothing. Use {stem!r}.")
    done, notes = _finished(public, splits)
    notes = [*([public.caution] if public.caution else []), *raw.notes, *notes]
    return build_task(
        name,
        public.kind,
        done,
        label_names=public.label_names,
        metric=public.metric,
        source=raw.source,
        licence=raw.licence or public.licence,
        notes=notes,
        seed=seed,
    )


def _raw(stem: str, public: PublicTask, hub_only: bool) -> Raw:
    mirror = None if hub_only else mirror_folder(public.folder)
    if mirror is not None:
        return from_mirror(mirror, public.mirror)
    if public.hub is not None:
        return from_hub(*public.hub, public.hub_splits)
    files = ", ".join(f"{file}.jsonl.gz" for files in public.mirror.values() for file in files)
    raise LamellaError(
        f"{stem} has no copy on the hub that loads without running its code. Set the environment variable {MIRROR} to "
        f"a mirror that has the folder {public.folder} with {files}, or write the rows to a file and use file:PATH."
    )


def _checked(stem: str, public: PublicTask, raw: Raw) -> Splits:
    try:
        splits = {split: public.adapt(rows) for split, rows in raw.splits.items()}
    except KeyError as error:
        raise LamellaError(f"{stem}, from {raw.source}: a row has no column {error}.") from error
    for split, rows in splits.items():
        check_published(public.kind, Table(f"{stem}, {split} rows from {raw.source}", rows), public.label_names)
    return splits


def _selected(stem: str, public: PublicTask, subset: str, splits: Splits) -> Splits:
    """The rows of one subset; all of them when none is named and the task makes sense as a whole."""
    column = str(public.subset)
    known = sorted({row[column] for rows in splits.values() for row in rows})
    if subset in known:
        return {split: [row for row in rows if row[column] == subset] for split, rows in splits.items()}
    if subset or public.few_shot:
        said = f"{stem} has no {column} {subset!r}" if subset else f"{stem} is {len(known)} tasks"
        raise LamellaError(f"{said}. Choose one: {', '.join(f'{stem}/{one}' for one in known)}.")
    return splits


def _finished(public: PublicTask, splits: Splits) -> tuple[Splits, list[str]]:
    if public.few_shot:
        rows = splits["all"]
        tested = len(rows) - public.few_shot - public.watched
        return split_whole(public.kind, rows, test=tested, validation=public.watched)
    return complete_published(public.kind, splits)
