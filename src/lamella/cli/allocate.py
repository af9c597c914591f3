"""`lamella allocate`: how many experts each layer gets."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import print as show

from lamella.cli.output import print_json


def allocate(
    num_experts: Annotated[str, typer.Argument(help="Experts: 5, 2-4-6-8, or a shape such as triangle.")],
    layers: Annotated[int, typer.Option(help="Layers of the model.")],
    budget: Annotated[float | None, typer.Option(help="Mean experts per layer to scale a shape to.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print the number of experts of each layer, and their sum.

    Example: lamella allocate 2-4-6-8 --layers 30 --budget 5
    """
    import lamella

    experts = lamella.allocate(int(num_experts) if num_experts.isdigit() else num_experts, layers, budget)
    if json:
        print_json({"experts": experts, "sum": sum(experts)})
    else:
        show(f"{'-'.join(map(str, experts))}\n{sum(experts)} experts in {layers} layers")
