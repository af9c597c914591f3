"""Cards of LoRAs: measured on a bounded number of training rows, in one pass of the base."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lamella.adapters import AdapterLibrary, fit
from lamella.adapters.card import Card
from lamella.backbones.block_calls import parameter_names
from lamella.errors import LamellaError
from lamella.lab.data import Collator, Task, encode, load_backbone, load_task
from lamella.lab.runs.card import public_labels, task_name
from lamella.retrieval import mean_inputs

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 256  # of a task are read at most; the mean of more is hardly another
_BATCH_SIZE = 16


def adapted_by_lora(model: nn.Module) -> list[str]:
    """The linear modules of the base that a model's adapter, a plain LoRA, adapts; none of another method's."""
    if not isinstance(model, PeftModel) or model.active_peft_config.peft_type != PeftType.LORA:
        return []
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, Linear)]


def measure_card(
    base: nn.Module,
    modules: Mapping[str, str],
    task: Task,
    rows: Dataset,
    collator: Any,
    name: str,
    say: Callable[[str], None],
) -> Card:
    """The card of a LoRA that was trained on some rows, from at most 256 of each of its tasks, always the same ones.

    Args:
        base: the LoRA's base, without the LoRA.
        modules: those that the LoRA adapts: by their names in the base, what the LoRA calls them.
        task: of the rows; one with parts has centroids of each.
        rows: encoded.
        collator: of rows.
        name: what the LoRA calls its base.
        say: told what it cost.
    """
    parts = [rows.select(np.flatnonzero(np.asarray(rows["task"]) == part.name)) for part in task.tasks]
    drawn = [part.shuffle(seed=0).select(range(min(_ROWS, len(part)))) for part in parts if len(part)]
    started, count = time.perf_counter(), sum(map(len, drawn))
    found = mean_inputs(base, list(modules), [_batches(part, collator, base) for part in drawn])
    seconds = time.perf_counter() - started
    say(f"card: one pass of the base over {count} of {len(rows)} training rows took {seconds:.1f} s")
    centroids = {modules[ours]: tensor for ours, tensor in found.centroids.items()}
    return Card(task_name(task.name), public_labels(task), name, count, centroids, found.texts)


def write_card(
    library: AdapterLibrary, name: str, task: str, max_length: int, say: Callable[[str], None] = lambda _: None
) -> None:
    """Writes the card of a library's LoRA from a task's training rows.

    Raises:
        LamellaError: the LoRA names no base or has no folder, is not for that base, or base or task cannot be loaded.
    """
    entry = library[name]
    folder = Path(entry.reference.source) / (entry.reference.subfolder or "")
    if entry.format != "PEFT" or not entry.base or not folder.is_dir():
        raise LamellaError(
            f"The LoRA {name!r} ({entry.reference.source}) has no folder with an adapter_config.json that names its "
            "base, and a card is of what the base is given. Save it as a PEFT folder."
        )
    read = load_task(task)
    backbone = load_backbone(entry.base)  # its own head: what the task asks for is not asked here
    found = fit(backbone.model, library.only([name]))
    if name in found.misfits:
        raise LamellaError(found.misfits[name])
    encoded = encode(read, backbone.tokenizer, max_length=max_length, limit={"train": _ROWS}, decoder=backbone.decoder)
    assert encoded.train is not None
    card = measure_card(
        backbone.model, found.modules[entry.layout], read, encoded.train, encoded.collator, entry.base, say
    )
    card.save(folder)


def _batches(rows: Dataset, collator: Collator, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Batches without labels, but for those of tokens, which say where a prompt ends."""
    listed = sorted(rows, key=lambda row: row["length"])  # alike in length, so that little is padding
    takes_labels = "labels" in parameter_names(type(model).forward)
    for at in range(0, len(listed), _BATCH_SIZE):
        batch = collator(listed[at : at + _BATCH_SIZE])
        is_of_tokens = takes_labels and batch["labels"].dim() == 2
        yield {name: value for name, value in batch.items() if name != "labels" or is_of_tokens}
