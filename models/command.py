"""`python -m models NAME [KEY=VALUE]...`: make a small model to study, and say how good it is.

tiny-moe is trained from scratch on four kinds of prose; so is deep-moe, with twice the layers and experts.
smollm2-experts is SmolLM2 with experts of which it is known what each was trained on. switch-trec classifies questions.
tiny-diffusion is a Stable Diffusion pipeline of rendered scenes, tiny-clip a CLIP model of them with its text encoder;
the training of both goes on where it was stopped.
The folder holds the model as transformers or diffusers saves it, and log.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lamella.cli.interruption import interruptible
from lamella.cli.output import console
from lamella.cli.progress import showing
from lamella.errors import LamellaError
from lamella.lab.quiet import quiet_libraries
from lamella.lab.runs.settings import override, read_recipe
from lamella.lab.schema import Settings
from models.building import Made, keep, refuse_existing
from models.settings import (
    SmolExpertsSettings,
    SwitchSettings,
    TinyClipSettings,
    TinyDiffusionSettings,
    TinyMoeSettings,
)
from models.smollm2_experts import make_smollm2_experts
from models.switch import make_switch
from models.tiny_moe import make_tiny_moe

MODELS: dict[str, tuple[type[Settings], Callable[[Any], Made]]] = {
    "tiny-moe": (TinyMoeSettings, make_tiny_moe),
    "deep-moe": (TinyMoeSettings, make_tiny_moe),
    "smollm2-experts": (SmolExpertsSettings, make_smollm2_experts),
    "switch-trec": (SwitchSettings, make_switch),
}


def _make_tiny_diffusion(settings: TinyDiffusionSettings, stages: Path) -> Made:
    from models.tiny_diffusion import make_tiny_diffusion  # diffusers, which the others need not wait for

    return make_tiny_diffusion(settings, stages)


def _make_tiny_clip(settings: TinyClipSettings, stages: Path) -> Made:
    from models.tiny_clip import make_tiny_clip

    return make_tiny_clip(settings, stages)


# What is made in stages, which are kept in a folder on the way.
STAGED: dict[str, tuple[type[Settings], Callable[[Any, Path], Made]]] = {
    "tiny-diffusion": (TinyDiffusionSettings, _make_tiny_diffusion),
    "tiny-clip": (TinyClipSettings, _make_tiny_clip),
}
RECIPES = Path(__file__).parent / "recipes"


def build(
    name: str,
    folder: Path,
    changes: Iterable[str] = (),
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Make a model by its recipe and keep it, with its tokenizer and log, in transformers' form.

    Args:
        name: one of `MODELS` or `STAGED`.
        folder: appears when it is complete.
        changes: ``key=value`` words, in place of the recipe's values.
        force: replace what lies there.

    Returns:
        What is in log.json. ``failed`` says what the model should be and is not.

    Raises:
        LamellaError: folder taken, unfit settings, or texts that cannot be had.
    """
    kind = (MODELS | STAGED)[name][0]
    tree = read_recipe(str(RECIPES / f"{name}.yaml"))
    override(tree, changes)
    settings = kind.parse(tree)
    refuse_existing(folder, force=force)
    made = STAGED[name][1](settings, _stages(folder)) if name in STAGED else MODELS[name][1](settings)
    return keep(made, name, settings, folder)


def _stages(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-stages")


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the model is not what its recipe promises, 2 something given cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*MODELS, *STAGED]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes to the settings of recipes/NAME.yaml")
    parser.add_argument("-o", "--output", type=Path, help="folder; runs/NAME if absent")
    parser.add_argument("--force", action="store_true", help="replace what lies in that folder")
    given = parser.parse_args(words)
    folder = given.output or Path("runs") / given.name
    quiet_libraries()
    try:
        anew = f"goes on from {_stages(folder)}" if given.name in STAGED else "begins anew"
        with interruptible(f"Interrupted: {folder} was not written, and the same command {anew}."), showing(given.name):
            log = build(given.name, folder, given.changes, force=given.force)
    except LamellaError as error:
        print(error, file=sys.stderr)
        return 2
    _show(log, folder)
    return 1 if log["failed"] else 0


def _show(log: dict[str, Any], folder: Path) -> None:
    """The figures of the log that are one number each, what failed, and where the model lies."""
    for figure in ("test_perplexity", "test_accuracy"):
        for name, value in log.get(figure, {}).items():
            overall = value["all"] if isinstance(value, dict) else value
            console.print(f"{figure.replace('_', ' ')} of {name}: {overall:.4g}", highlight=False)
    if "smallest_share" in log:
        console.print(f"smallest share of an expert in its layer: {log['smallest_share']:.3f}", highlight=False)
    for kinds, rates in log.get("rates", {}).items():
        shares = ", ".join(f"{objects}: {rate['right']:.1%}" for objects, rate in rates.items())
        console.print(f"pictures that are right, by the number of objects, {kinds} kinds: {shares}", highlight=False)
    for kinds, shares in log.get("chosen", {}).items():
        said = ", ".join(f"{against}: {share:.1%}" for against, share in shares.items())
        console.print(f"pictures that choose their own caption before others, {kinds} kinds: {said}", highlight=False)
    for sentence in log["failed"]:
        console.print(sentence, style="red", highlight=False)
    console.print(f"{sum(log['seconds'].values()):.0f} s. The model is in {folder}", highlight=False)
