"""docs/what-runs-where.md, made from the rows of docs/results/families.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import transformers
from tests.families.catalogue import FAMILIES, GROUPS
from tests.families.checks import CHECKS, METHODS

DOCS = Path(__file__).parents[2] / "docs"
KEPT = DOCS / "results" / "families.json"
PAGE = DOCS / "what-runs-where.md"
ROWS = Path("runs/families")
EXPERTS = DOCS / "results" / "experts.json"
EXPERTS_ROWS = Path("runs/experts")
Answers = dict[str, dict[str, dict[str, Any]]]

INTRODUCTION = """# What runs where

Not listed? It is tried all the same, and what cannot be had is refused by a sentence:
[your own model family](how-to/own-model.md).

`make families` builds a tiny random model of each family of transformers {transformers}, puts PEFT's LoRA (peft
{peft}), MoLA, MoLEx and MOLE on it, and asks eight questions. **y** is yes. A number is *no*: the error or warning that
says so is below. **·** is not asked, because the base model itself does not keep it, which is found by running the
base. **!** is a fault that is still to be mended: a difference, or an error that does not say what to do.

- **start**: a fresh adapter is the base: MoLA; MoLEx at alpha=1; MOLE at weights 0, and at one-hot it is that LoRA. An
  adapter that is not fresh changes the output.
- **backward**: all parameters of the adapter (experts, routers) get a gradient, finite and not zero, wherever the
  adapted module's own weight has one.
- **saved**: saved, and loaded on another copy of the base, every tensor is equal to the last bit, and so the output.
- **generation**: greedy generation with the model's cache has the logits of that without, also where padded.
- **padding**: sequences padded on the left or on the right are what they are alone.
- **batch-mates**: each sequence of a batch is what it is alone.
- **causality**: outputs before a token are the same whatever follows, with labels and without.
- **checkpointing**: gradients with gradient checkpointing are those without.

Equal means by less than 1e-4 of the largest value, in float32.
"""


EXPERTS_INTRODUCTION = """## Mixtures of experts

Which of transformers' mixtures lamella reads, and what is beside a layer's experts in it. `lamella.moe_layers` finds
what follows transformers' contract for experts, by no name; {read} of {all} folders are read, the others refused.

- **recombined**: the experts, weighted by the router, are what the model's own experts put out.
- **routed**: the router asked by hand decides as it did in the model.
- **traced**: k selections of each real token and no others, padded on either side too.
- **cached**: with a cache, selections are those of one forward over the whole text.
- **replaced**: experts in their own places change nothing, others do; afterwards all is as before, to the last bit.
- **masked**: the expert most used gets no token any more; afterwards all is as before.
- **swapped**: two experts in each other's places change the logits; afterwards all is as before.
"""


def keep_and_write() -> None:
    """Gathers the rows of `make families`, keeps them and writes the page.

    Raises:
        SystemExit: there are none, or they are of different code.
    """
    rows = {path.stem: json.loads(path.read_text()) for path in ROWS.glob("*.json")}
    if len({row["code"] for row in rows.values()}) != 1:
        raise SystemExit(f"The rows in {ROWS} are not of one state of the code: run `make families` to its end.")
    kept = {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "families": {family.name: rows[family.name]["answers"] for family in FAMILIES if family.name in rows},
    }
    KEPT.write_text(json.dumps(kept, indent=0) + "\n")
    keep_experts()
    PAGE.write_text(page(kept, json.loads(EXPERTS.read_text())))


def keep_experts() -> None:
    """Gathers the rows of mixtures of experts, as far as there are any, and keeps them."""
    rows = {path.stem: json.loads(path.read_text()) for path in EXPERTS_ROWS.glob("*.json")}
    if len({row.pop("code") for row in rows.values()}) > 1:
        raise SystemExit(
            f"The rows in {EXPERTS_ROWS} are not of one state of the code: run `make families` to its end."
        )
    if rows:
        kept = {"transformers": transformers.__version__, "families": dict(sorted(rows.items()))}
        EXPERTS.write_text(json.dumps(kept, indent=0) + "\n")


def page(kept: dict[str, Any], experts: dict[str, Any]) -> str:
    """The whole page."""
    reasons: dict[str, int] = {}
    families: dict[str, Answers] = kept["families"]
    parts = [INTRODUCTION.format(**kept), "\n".join(_counts(families))]
    for title, members in GROUPS.items():
        header = f"| {title} | " + " | ".join(METHODS) + " |"
        lines = [
            f"| {family.name} | {' | '.join(_cell(families[family.name][method], reasons) for method in METHODS)} |"
            for family in members
            if family.name in families
        ]
        parts.append(
            "\n".join([f"## {title}", "", f"In each cell: {', '.join(CHECKS)}.", "", header, "|---" * 5 + "|", *lines])
        )
    parts.append("\n".join(_experts(experts["families"], reasons)))
    parts.append("\n".join(["## Why not", "", *(f"{number}. {reason}" for reason, number in reasons.items())]))
    parts.append("\n".join(["## Faults", "", *(list(_faults(families)) or ["None."])]))
    parts.append("\n".join(["## Not asked", "", *_not_asked(families)]))
    return "\n\n".join(parts) + "\n"


def _cell(answers: dict[str, dict[str, Any]], reasons: dict[str, int]) -> str:
    """One sign for each check."""
    signs = []
    for check in CHECKS:
        answer = answers[check]
        if answer["said"] == "fault":
            signs.append("**!**")
        elif answer["said"] == "no":
            signs.append(str(reasons.setdefault(answer["reason"], len(reasons) + 1)))
        else:
            signs.append({"yes": "y", "not asked": "·"}[answer["said"]])
    return " ".join(signs)


def _experts(rows: dict[str, dict[str, Any]], reasons: dict[str, int]) -> Iterator[str]:
    """The table of mixtures of experts."""
    refused = {row["folder"] for row in rows.values() if "refused" in row}
    folders = {row["folder"] for row in rows.values()}
    yield EXPERTS_INTRODUCTION.format(read=len(folders - refused), all=len(folders))
    checks = next(list(row["answers"]) for row in rows.values() if len(row.get("answers", {})) == 7)
    yield f"In each last cell: {', '.join(checks)}."
    yield ""
    yield "| folder | class | experts, k | beside them | answers |"
    yield "|---|---|---|---|---|"
    for row in rows.values():
        if "refused" in row:
            number = reasons.setdefault(row["refused"], len(reasons) + 1)
            yield f"| {row['folder']} | | | | {number} |"
            continue
        signs = " ".join(
            "·"
            if (answer := row["answers"].get(check)) is None
            else {"yes": "y", "fault": "**!**"}.get(answer["said"])
            or str(reasons.setdefault(answer["reason"], len(reasons) + 1))
            for check in checks
        )
        beside = ", ".join(row["beside"])
        yield f"| {row['folder']} | {row['block']} | {row['experts']}, {row['top_k']} | {beside} | {signs} |"


def _counts(families: dict[str, Answers]) -> Iterator[str]:
    if missing := [family.name for family in FAMILIES if family.name not in families]:
        yield f"Not asked yet: {', '.join(missing)}."
        yield ""
    yield f"{len(families)} families. Families with every question that is asked answered yes, and answers in all:"
    yield ""
    yield "| method | families all yes | yes | no | not asked | faults (**!**) |"
    yield "|---|---|---|---|---|---|"
    for method in METHODS:
        of_family = [[answer["said"] for answer in answers[method].values()] for answers in families.values()]
        said = [answer for answers in of_family for answer in answers]
        whole = sum(all(answer in ("yes", "not asked") for answer in answers) for answers in of_family)
        counts = f"| {method} | {whole} | {said.count('yes')} | {said.count('no')} | {said.count('not asked')} "
        yield f"{counts}| {said.count('fault')} |"


def _faults(families: dict[str, Answers]) -> Iterator[str]:
    for name, answers in families.items():
        for method in METHODS:
            for check, answer in answers[method].items():
                if answer["said"] == "fault":
                    yield f"- {name}, {method}, {check}: {answer['reason']}"


def _not_asked(families: dict[str, Answers]) -> Iterator[str]:
    """Why, by check and reason, with the families; numbers are left out so that alike ones stand together."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, answers in families.items():
        for check, answer in answers["LoRA"].items():
            if answer["said"] == "not asked":
                by_reason.setdefault((check, answer["reason"]), []).append(name)
    for (check, reason), names in sorted(by_reason.items()):
        yield f"- {check}, {', '.join(names)}: {reason}"
