"""What a recipe makes, and the folder that holds it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.lab.runs.folder import environment
from lamella.lab.schema import Settings
from lamella.progress import working

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Made:
    """A finished model.

    Attributes:
        model: what is saved, in transformers' form or diffusers'.
        tokenizer: saved beside it; None where the model holds its own.
        log: figures for `log.json`, and where they come from.
        failed: sentences on what the model should be and is not; none if it is what the recipe promises.
        files: further JSON files of the folder, by name.
    """

    model: PreTrainedModel | DiffusionPipeline
    tokenizer: PreTrainedTokenizerBase | None
    log: dict[str, Any]
    failed: list[str]
    files: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds of each part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside."""
        began = time.perf_counter()
        with working(name):
            yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


def refuse_existing(folder: Path, *, force: bool) -> None:
    """Raise before hours of work, and not after, if the folder's place is taken."""
    if folder.exists() and not force:
        raise LamellaError(f"{folder} exists already. Give another folder with -o, or --force to replace it.")


def keep(made: Made, name: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Write the model, its tokenizer and its log into a folder that appears when all of it is there; return the log."""
    log = {
        "recipe": name,
        "settings": settings.model_dump(mode="json"),
        "failed": made.failed,
        **made.log,
        "environment": environment(),
    }
    with atomic(folder) as unfinished:
        made.model.save_pretrained(unfinished)
        if made.tokenizer is not None:
            made.tokenizer.save_pretrained(unfinished)
        for file, content in {"log.json": log, **made.files}.items():
            (unfinished / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return log
