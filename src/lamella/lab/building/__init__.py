"""Models with a mixture of experts, made here from demo assets: `lamella build`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lamella.errors import LamellaError
from lamella.lab.building.making import Made, keep, refuse_existing
from lamella.lab.building.settings import SmolExpertsSettings, SwitchSettings, TinyMoeSettings
from lamella.lab.building.smollm2_experts import make_smollm2_experts
from lamella.lab.building.switch import make_switch
from lamella.lab.building.tiny_moe import make_tiny_moe
from lamella.lab.runs.settings import override, read_recipe
from lamella.lab.schema import Settings

_MODELS: dict[str, tuple[type[Settings], Callable[[Any, Sequence[TrainerCallback]], Made]]] = {
    "tiny-moe": (TinyMoeSettings, make_tiny_moe),
    "smollm2-experts": (SmolExpertsSettings, make_smollm2_experts),
    "switch-trec": (SwitchSettings, make_switch),
}
KNOWN_MODELS = tuple(_MODELS)


def build(
    name: str,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Make a model by its packaged recipe and keep it, with its tokenizer and log, in transformers' own form.

    Args:
        name: one of `KNOWN_MODELS`.
        folder: written whole or not at all.
        overrides: ``key=value`` changes to the recipe.
        force: replace what lies there.
        callbacks: told of each training.

    Returns:
        What is in `log.json`. ``failed`` says what the model should be and is not.

    Raises:
        LamellaError: unknown model, folder taken, unfit settings, or texts that cannot be had.
    """
    if name not in _MODELS:
        raise LamellaError(f"There is no recipe for a model '{name}'. The models made here are {', '.join(_MODELS)}.")
    kind, make = _MODELS[name]
    tree = read_recipe(f"models/{name}")
    override(tree, overrides)
    settings = kind.parse(tree)
    refuse_existing(folder, force=force)
    return keep(make(settings, callbacks), name, settings, folder)
