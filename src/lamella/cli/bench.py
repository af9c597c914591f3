"""`lamella bench`: speed and memory, as ratios."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lamella.cli.output import console, print_json

if TYPE_CHECKING:
    from lamella.lab.bench import BenchResult

bench = typer.Typer(
    help="Speed and memory as ratios of one interleaved run; nothing is timed that does not compute the same.",
    no_args_is_help=True,
)

_Rounds = Annotated[int, typer.Option(min=2, help="Rounds; every arm runs in each.")]
_Threads = Annotated[int, typer.Option(min=1, help="CPU threads. With one, process CPU time is measured.")]
_Tokens = Annotated[int, typer.Option(min=1, help="Tokens of a step, none of them padding.")]
_Hidden = Annotated[int, typer.Option(help="Features of the encoder, a multiple of 32.")]
_Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of weights and activations.")]
_Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")]
_Output = Annotated[Path | None, typer.Option("-o", "--output", help="JSON file of the record.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@bench.command()
def mola(
    rounds: _Rounds = 7,
    threads: _Threads = 1,
    tokens: _Tokens = 1024,
    hidden: _Hidden = 384,
    layers: Annotated[int, typer.Option(help="Layers of the encoder, at least 4.")] = 12,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    output: _Output = None,
    json: _Json = False,
) -> None:
    """A train step of MoLA beside PEFT's LoRA of equal size, the frozen base and the published loop over experts.

    Example: lamella bench mola --rounds 7 --threads 1 -o bench-mola.json
    """
    from lamella.lab.bench import MolaSettings, bench_mola

    given = {"rounds": rounds, "threads": threads, "tokens": tokens, "dtype": dtype, "device": device}
    settings = MolaSettings.parse({**given, "hidden": hidden, "layers": layers})
    _finish(bench_mola(settings, starting=console.print), output, json)


@bench.command()
def molex(
    rounds: _Rounds = 7,
    threads: _Threads = 1,
    tokens: _Tokens = 1024,
    hidden: _Hidden = 384,
    layers: Annotated[int, typer.Option(help="Layers of the encoder, at least 5.")] = 12,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    output: _Output = None,
    json: _Json = False,
) -> None:
    """MoLEx beside PEFT's LoRA of the same rank, for several shares of blocks that choose themselves, and inference.

    Example: lamella bench molex --rounds 7 --threads 1 -o bench-molex.json
    """
    from lamella.lab.bench import MolexSettings, bench_molex

    given = {"rounds": rounds, "threads": threads, "tokens": tokens, "dtype": dtype, "device": device}
    settings = MolexSettings.parse({**given, "hidden": hidden, "layers": layers})
    _finish(bench_molex(settings, starting=console.print), output, json)


@bench.command()
def mole(
    rounds: _Rounds = 7,
    threads: _Threads = 1,
    tokens: _Tokens = 2048,
    width: Annotated[int, typer.Option(min=1, help="Features of the layer.")] = 768,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    output: _Output = None,
    json: _Json = False,
) -> None:
    """One frozen layer with 2 to 128 frozen LoRAs of rank 8, beside PEFT's loop over them.

    Example: lamella bench mole --rounds 7 --threads 1 -o bench-mole.json
    """
    from lamella.lab.bench import MoleSettings, bench_mole

    given = {"rounds": rounds, "threads": threads, "tokens": tokens, "dtype": dtype, "device": device, "width": width}
    _finish(bench_mole(MoleSettings.parse(given), starting=console.print), output, json)


@bench.command()
def similarity(
    rounds: _Rounds = 5,
    threads: _Threads = 1,
    samples: Annotated[int, typer.Option(min=2, help="Of each expert.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Of an aligner; the published code takes 10.")] = 10,
    width: Annotated[int, typer.Option(min=8, help="Features of the model of the whole flow.")] = 128,
    layers: Annotated[int, typer.Option(min=2, help="Its layers.")] = 24,
    batches: Annotated[int, typer.Option(min=1, help="Of 8 x 128 tokens: the text of the whole flow.")] = 6,
    device: _Device = "cpu",
    output: _Output = None,
    json: _Json = False,
) -> None:
    """Aligners for many pairs of experts at once, and the flow from text to losses, beside the published way.

    Example: lamella bench similarity --rounds 5 --threads 1 -o bench-similarity.json
    """
    from lamella.lab.bench import SimilaritySettings, bench_similarity

    given = {"rounds": rounds, "threads": threads, "samples": samples, "steps": steps, "device": device}
    settings = SimilaritySettings.parse({**given, "width": width, "layers": layers, "batches": batches})
    _finish(bench_similarity(settings, starting=console.print), output, json)


@bench.command()
def forms(
    rounds: _Rounds = 7,
    threads: _Threads = 1,
    tokens: _Tokens = 2048,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
    output: _Output = None,
    json: _Json = False,
) -> None:
    """One layer with 2 to 64 experts of rank 8, dense and sorted: where does the faster form change?

    Example: lamella bench forms -o bench-forms.json
    """
    from lamella.lab.bench import FormsSettings, bench_forms

    given = {"rounds": rounds, "threads": threads, "tokens": tokens, "dtype": dtype, "device": device}
    _finish(bench_forms(FormsSettings.parse(given), starting=console.print), output, json)


@bench.command()
def table(files: Annotated[list[Path], typer.Argument(help="Records written with -o.")]) -> None:
    """Print records as Markdown, as they stand in docs/performance.md.

    Example: lamella bench table docs/results/bench-mola-cpu.json
    """
    from lamella.lab.bench import render_table

    for file in files:
        typer.echo(render_table(file))


def _finish(result: BenchResult, output: Path | None, json: bool) -> None:
    from lamella.lab.bench import render_result, write_result

    if output is not None:
        write_result(result, output)
        console.print(f"Record: {output}")
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        typer.echo(render_result(result))
