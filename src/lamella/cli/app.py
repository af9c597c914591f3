"""The command's frame: which commands there are, and what an error looks like."""

from __future__ import annotations

import logging
import sys
import textwrap
from typing import NoReturn

import typer
from rich.logging import RichHandler

from lamella.cli.allocate import allocate
from lamella.cli.bench import bench
from lamella.cli.build import build
from lamella.cli.compare import compare
from lamella.cli.compose import compose
from lamella.cli.demo import demo
from lamella.cli.doctor import doctor
from lamella.cli.evaluate import evaluate
from lamella.cli.evidence import evidence
from lamella.cli.export import export
from lamella.cli.output import console
from lamella.cli.similarity import similarity
from lamella.cli.trace import trace
from lamella.cli.train import train
from lamella.errors import LamellaError
from lamella.lab.quiet import quiet_libraries

app = typer.Typer(
    help="Mixtures of experts along the depth of pretrained transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (demo, train, compose, compare, doctor, evaluate, evidence, trace, export, allocate, build):
    app.command()(command)
app.add_typer(similarity, name="similarity")
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command. Exit status: 0 done, 1 unexpected or findings, 2 something given cannot be used."""
    warnings_shown = _quiet()
    try:
        app()
    except LamellaError as error:
        _stop(str(error))
    except OSError as error:
        if error.filename is None:  # of no file, so nothing that a person could mend
            raise
        _stop(f"{error.filename} could not be read or written: {error.strerror}. What was finished before is intact.")
    finally:
        logging.getLogger().removeHandler(warnings_shown)


def _stop(sentence: str) -> NoReturn:
    print(textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    sys.exit(2)


def _quiet() -> logging.Handler:
    """People see warnings; the rest is in each run's log. Libraries' bars and reports would break up the output."""
    handler = RichHandler(logging.WARNING, console=console, show_time=False, show_path=False)
    logging.getLogger().addHandler(handler)
    quiet_libraries()
    return handler
