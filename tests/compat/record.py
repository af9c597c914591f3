"""docs/results/compat.json, which versions the unit tests ran with, and the table of docs/install.md made from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results" / "compat.json"
PAGE = ROOT / "docs" / "install.md"
ENVIRONMENTS = ("lowest", "newest")


def requirements(extra: str | None = None) -> list[Requirement]:
    """What pyproject.toml asks for, of the library and of pipelines of images; or what an extra asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return list(map(Requirement, extras[extra] if extra else project["dependencies"] + extras["diffusion"]))


def floor_of(wanted: Requirement) -> Requirement:
    """The same, of the lowest version alone."""
    floor = next(end.version for end in wanted.specifier if end.operator == ">=")
    lowest = Requirement(wanted.name)
    lowest.specifier = SpecifierSet(f"=={floor}")
    return lowest


def keep(result: dict[str, Any]) -> None:
    """Puts what an environment said into the record, in place of what it said before, and writes the table."""
    kept = {row["name"]: row for row in (json.loads(KEPT.read_text()) if KEPT.exists() else [])}
    kept[result["name"]] = result
    rows = list(kept.values())
    KEPT.write_text(json.dumps(rows, indent=1) + "\n")
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {KEPT.name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    PAGE.write_text(before + begin + table(rows) + end + after, encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown between the marks of the page."""
    plain = [row for row in rows if row["name"] in ENVIRONMENTS]
    lines = [f"| | range | {' | '.join(row['name'] for row in plain)} |", "|---" * (len(plain) + 2) + "|"]
    for wanted in requirements():
        ends = ", ".join(sorted(map(str, wanted.specifier), reverse=True))
        ran = " | ".join(row["versions"][wanted.name] for row in plain)
        lines.append(f"| {wanted.name} | {ends} | {ran} |")
    lines.append(f"| tests | | {' | '.join(map(count, plain))} |")
    lines.append(f"| Python | | {' | '.join(row['python'] for row in plain)} |")
    return "\n".join([*lines, *_others(rows)]) + "\n"


def count(row: dict[str, Any]) -> str:
    """How many tests passed, and how many failed if any."""
    return f"{row['passed']} passed" + (f", {len(row['failed'])} failed" if row["failed"] else "")


def _others(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each environment beside those that ends of ranges were taken from."""
    for row in rows:
        if row["name"] not in ENVIRONMENTS:
            yield ""
            why = f": {next(iter(row['failed'].values()))}" if row["failed"] else ""
            yield f"Tried beside them: {row['name']}, {count(row)}{why}"
