"""The command's frame: which commands there are, and what an error looks like."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from lamella.cli.allocate import allocate
from lamella.cli.compare import compare
from lamella.cli.compose import compose
from lamella.cli.continual import continual
from lamella.cli.demo import demo
from lamella.cli.doctor import doctor
from lamella.cli.evaluate import evaluate
from lamella.cli.export import export
from lamella.cli.info import info
from lamella.cli.interruption import interruptible
from lamella.cli.library import library
from lamella.cli.output import console
from lamella.cli.probe import probe
from lamella.cli.progress import showing
from lamella.cli.similarity import similarity
from lamella.cli.trace import trace
from lamella.cli.train import train
from lamella.errors import LamellaError

_GOES_ON = "the same command goes on from there"
_OF_A_RUN = f"a run is kept up to its last checkpoint, and {_GOES_ON}"
_OF_A_STUDY = f"finished cells are kept, others up to their last checkpoint, and {_GOES_ON}"
_NOTHING_KEPT = "nothing was written, and the same command begins anew"
_KEPT = {
    "train": _OF_A_RUN,
    "compose": _OF_A_RUN,
    "compare": _OF_A_STUDY,
    "continual": _OF_A_STUDY,
    "demo": _OF_A_STUDY,
    "library index": f"the LoRAs that were read are in the index, and {_GOES_ON}",
    "similarity capture": f"the capture is kept up to its last checkpoint, and {_GOES_ON}",
    "similarity compress": f"smaller models that were measured are kept, and {_GOES_ON}",
    "similarity align": f"finished tiles are kept, and {_GOES_ON}",
    "similarity swap": f"swaps that were measured are kept, and {_GOES_ON}",
}


class _Command(TyperCommand):
    """A command whose words are understood, and which therefore loads the library before it runs."""

    def invoke(self, ctx: Any) -> Any:
        with showing("loading the library"):
            ctx.obj()
            from lamella.lab.quiet import quiet_libraries
        group = {"library": "library ", "similarity": "similarity "}.get(ctx.parent.info_name, "")
        kept = _KEPT.get(f"{group}{self.name}", _NOTHING_KEPT)
        with interruptible(f"Interrupted: {kept}."), _warnings_shown():
            quiet_libraries()
            return super().invoke(ctx)


app = typer.Typer(
    help="Mixtures of experts along the depth of pretrained transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (demo, train, compose, compare, continual, evaluate, trace, export, doctor, allocate, probe, info):
    app.command(cls=_Command)(command)
app.add_typer(library, name="library")
app.add_typer(similarity, name="similarity")
for step in [*library.registered_commands, *similarity.registered_commands]:
    step.cls = _Command


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lamella {version('lamella')}")
        raise typer.Exit


@app.callback()
def _options(
    show: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(load_library: Callable[[], None] = lambda: None) -> None:
    """Run the command. Exit status: 0 done, 1 unexpected or findings, 2 something given cannot be used.

    Args:
        load_library: called before a command runs, but not for help, version and completion.
    """
    try:
        app(obj=load_library)
    except LamellaError as error:
        _stop(str(error))
    except OSError as error:
        if error.filename is None:  # of no file, so nothing that a person could mend
            raise
        _stop(f"{error.filename} could not be read or written: {error.strerror}. What was finished before is intact.")


def _stop(sentence: str) -> NoReturn:
    print(textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    sys.exit(2)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """People see warnings; the rest is in each run's log."""
    from rich.logging import RichHandler

    handler = RichHandler(logging.WARNING, console=console, show_time=False, show_path=False)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
