"""`lamella allocate`: how many experts each layer gets."""

from __future__ import annotations

from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing


def allocate(
    num_experts: Annotated[str | None, typer.Argument(help="Experts: 5, 2-4-6-8, or a shape such as triangle.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model, with an allocation that is given.")] = None,
    budget: Annotated[float | None, typer.Option(help="Mean experts per layer.")] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Instead: a trained run of MoLA, or a model (minilm, a hub id, a path)."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A named task or a file, for diversity; once for each of several tasks.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="redundancy or contribution, of a run; diversity (with --text) or heavy-tails, of a model."),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Validation rows, or documents of each text.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print the number of experts of each layer, and their sum: of a shape, or found from a run or a model.

    Example: lamella allocate 2-4-6-8 --layers 30 --budget 5
    Example: lamella allocate --from minilm --text trec --text movies --budget 4
    """
    import lamella

    if source is not None and num_experts is None and layers is None:
        from lamella.cli.similarity.subject import text_source
        from lamella.lab.allocation import allocate_from

        with showing("measuring"):
            found = allocate_from(
                source,
                criterion,
                texts=[text_source(one) for one in text or ()],
                budget=budget,
                rows=rows,
            )
        experts = list(found.experts)
        facts = {"criterion": found.criterion, "needs": list(found.needs)}
    elif num_experts is not None and layers is not None and source is None and criterion is None and not text:
        experts = lamella.allocate(int(num_experts) if num_experts.isdigit() else num_experts, layers, budget)
        facts = {}
    else:
        raise lamella.LamellaError(
            "Give an allocation and --layers, as in 'lamella allocate 2-4-6-8 --layers 30'; or --from, a run or a "
            "model, with --text or --criterion."
        )
    if json:
        print_json({"experts": experts, "sum": sum(experts), **facts})
        return
    typer.echo(f"{'-'.join(map(str, experts))}\n{sum(experts)} experts in {len(experts)} layers")
    if source is not None:
        lines = (f"  layer {at}: {need:.4g}" for at, need in enumerate(found.needs))
        typer.echo("\n".join([f"by {found.criterion}, in which the layers are", *lines, f"num_experts={experts}"]))
