"""From trained LoRAs on a command line to the settings of a run that composes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lamella.adapters import read_lora
from lamella.errors import LamellaError
from lamella.lab.methods.compositions import lora_folder
from lamella.lab.runs.settings import RunSettings, resolve
from lamella.lab.runs.trained import find_trained

# A router reads thousands of normalised features at once: at the rate of other methods its first steps would leave one
# LoRA in each block.
_RATE = "lr=3e-4"


def composed_settings(
    adapters: Sequence[str], task: str, overrides: Iterable[str] = (), model: str | None = None
) -> RunSettings:
    """The settings of a run that trains MOLE's routers, at a learning rate of 3e-4 unless told otherwise.

    Args:
        adapters: ``NAME=PLACE``, or ``PLACE``, which is called by its folder or file then; a place is a run, a PEFT
            folder, a LoRA file or a hub id.
        task: what the routers learn from.
        overrides: ``key=value`` words.
        model: the base; where None, that of the first LoRA.

    Raises:
        LamellaError: fewer than two LoRAs, two of one name, one that names no base, or settings that do not fit.
    """
    named: dict[str, str] = {}
    for word in adapters:
        name, place = _named(word)
        if name in named:
            raise LamellaError(
                f"Two LoRAs are called '{name}': {named[name]} and {place}. Name them: --adapters a=PLACE b=PLACE."
            )
        named[name] = place
    if len(named) < 2:
        raise LamellaError("A composition needs at least two LoRAs: --adapters PLACE PLACE, or NAME=PLACE each.")
    base = model or _base_of(next(iter(named.values())))
    return resolve(None, [_RATE, *overrides], model=base, task=task, method={"name": "mole", "adapters": named})


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """LoRAs and ``key=value`` overrides: what is before the ``=`` of an override is a setting of a run."""
    loras: list[str] = []
    overrides: list[str] = []
    for word in words:
        key = word.partition("=")[0].partition(".")[0].strip()
        (overrides if "=" in word and key in RunSettings.model_fields else loras).append(word)
    return loras, overrides


def _named(word: str) -> tuple[str, str]:
    name, equals, place = word.partition("=")
    if equals and not Path(word).exists():
        if not name or not place:
            raise LamellaError(f"'{word}' is not a LoRA; write NAME=PLACE, or the place alone.")
        return name, place
    path = Path(word)
    return (path.resolve().parent.name if path.name == "adapter" else path.stem), word


def _base_of(place: str) -> str:
    """The base model that a LoRA's run, or else its config, names."""
    run = find_trained(Path(place)).base if Path(place).is_dir() else None
    base = run or read_lora(lora_folder(place)).base
    if not base:
        raise LamellaError(f"{place} does not say which model it is for. Name the base with --model.")
    return base
