"""Which LoRAs of a library help a task that the laboratory knows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lamella.adapters import AdapterLibrary
from lamella.lab.data import encode, load_backbone, load_task
from lamella.retrieval import Shortlist, shortlist

_BATCH_SIZE = 16


def shortlist_for(
    library: AdapterLibrary,
    model: str,
    task: str,
    k: int | None,
    examples: int,
    max_length: int,
    say: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> Shortlist:
    """The LoRAs with the smallest loss on some training rows of a task.

    Args:
        library: the LoRAs.
        model: their base, by name.
        task: by name.
        k: how many are wanted; None for 8, or all where there are fewer.
        examples: how many rows.
        max_length: tokens of a row, at most.
        say: told, before it begins, what it will cost, and what a reader should know.
        seed: which rows they are, and in which order; of the random LoRA, and of a head that the model lacks.

    Raises:
        LamellaError: as `lamella.shortlist`; or the model or the task cannot be loaded.
    """
    read = load_task(task)
    torch.manual_seed(seed)
    backbone = load_backbone(model, read)
    encoded = encode(
        read, backbone.tokenizer, max_length=max_length, limit={"train": examples}, seed=seed, decoder=backbone.decoder
    )
    assert encoded.train is not None
    rows = list(encoded.train.shuffle(seed=seed))
    batches = [encoded.collator(rows[at : at + _BATCH_SIZE]) for at in range(0, len(rows), _BATCH_SIZE)]
    if backbone.drawn:
        say(f"{model} has no head for {task}: its own is random, so only LoRAs with a head for its labels can help.")
    return shortlist(backbone.model, library, batches, k, say, seed)
