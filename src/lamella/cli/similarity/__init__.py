"""`lamella similarity`: one command per step of a study of experts, all on one folder."""

import typer

from lamella.cli.similarity.align import align
from lamella.cli.similarity.capture import capture
from lamella.cli.similarity.compress import compress
from lamella.cli.similarity.damages import damages
from lamella.cli.similarity.plan import plan
from lamella.cli.similarity.report import report
from lamella.cli.similarity.screen import screen
from lamella.cli.similarity.swap import swap

similarity = typer.Typer(
    help="Which experts of a mixture can replace which, what a swap costs, what can be merged.",
    no_args_is_help=True,
)
for command in (plan, capture, screen, align, swap, compress, damages, report):
    similarity.command()(command)
