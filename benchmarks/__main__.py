"""`python -m benchmarks [NAME]... [KEY=VALUE]...`: run benchmarks, keep their records, show them as tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.catalogue import BENCHMARKS
from benchmarks.record import Record
from benchmarks.tables import render, update_page
from lamella.errors import LamellaError
from lamella.lab.quiet import quiet_libraries
from lamella.lab.runs.settings import override
from lamella.lab.studies.measuring import clock_for, using_threads

DOCS = Path(__file__).parents[1] / "docs"


def run(name: str, changes: list[str], *, quick: bool = False) -> Record:
    """Run a benchmark; ``changes`` are KEY=VALUE words.

    Raises:
        LamellaError: there is no such setting, or two forms that should agree do not.
    """
    import torch

    benchmark = BENCHMARKS[name]
    values: dict[str, Any] = dict(benchmark.quick) if quick else {}
    override(values, changes)
    settings = benchmark.settings.parse(values)
    torch.manual_seed(0)
    with using_threads(settings.threads):
        cases = benchmark.run(settings, lambda words: print(f"{name}: {words}", file=sys.stderr))
    clock = clock_for(settings.threads, settings.device)
    return Record(bench=name, settings=settings.model_dump(mode="json"), clock=clock, cases=list(cases))


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something given cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="NAME | KEY=VALUE", help=f"any of {', '.join(BENCHMARKS)}")
    parser.add_argument("-o", "--output", type=Path, help="folder of the records, bench-NAME-DEVICE.json each")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; figures then mean nothing")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md anew from docs/results")
    given = parser.parse_args(words)
    names = [word for word in given.words if "=" not in word]
    changes = [word for word in given.words if "=" in word]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    quiet_libraries()
    try:
        for name in names or ([] if given.page else BENCHMARKS):
            record = run(name, changes, quick=given.quick)
            print(render(record))
            if given.output is not None:
                record.write(given.output / f"bench-{name}-{record.settings['device']}.json")
        if given.page:
            update_page(DOCS / "performance.md", sorted(DOCS.glob("results/bench-*.json")))
    except LamellaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
