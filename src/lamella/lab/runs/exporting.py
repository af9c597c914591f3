"""A trained mixture as plain LoRA folders, which load with PEFT alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.convert import Collapsed, collapse, export_experts
from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.lab.runs.card import public_name
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.trained import load_adapted, load_trained

_BATCH_SIZE = 16
ROWS = 256


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where it lies.
        adapters: the adapters' folders.
        error: what collapsing lost, as in `error.json`; None where nothing was collapsed.
    """

    folder: Path
    adapters: tuple[Path, ...]
    error: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder),
            "adapters": [str(path) for path in self.adapters],
            **({} if self.error is None else self.error),
        }


def export_as_experts(path: Path, output: Path, base: str | None = None) -> Export:
    """Write every expert of a run or an adapter as a separate LoRA, ``output/expert_e``.

    Raises:
        LamellaError: ``output`` exists, or there is no mixture to export.
    """
    _refuse_existing(output)
    model = load_adapted(path, base)
    with _new_folder(output) as folder:
        names = [made.name for made in export_experts(model, folder)]
    return Export(output, tuple(output / name for name in names))


def export_collapsed(
    path: Path,
    output: Path,
    *,
    base: str | None = None,
    task: str | None = None,
    rank: int | None = None,
    rows: int = ROWS,
) -> Export:
    """Write one LoRA in place of a mixture, fitted on training rows, with its measured error in ``error.json``.

    Args:
        path: folder of a run or an adapter.
        output: the new folder.
        base: the adapter's base model, if not the one of the run or the adapter.
        task: whose training rows are used; the run's when None.
        rank: of each module's LoRA; all that the experts have together when None, which loses least.
        rows: how many training rows; every fourth batch of 16 measures the error and is not fitted, from 4 batches on.

    Raises:
        LamellaError: ``output`` exists, there is no mixture, or the task does not fit the adapter.
    """
    _refuse_existing(output)
    trained = load_trained(path, task, base)
    chosen, encoded = trained.rows("train", rows)
    batches = [
        encoded.collator([chosen[i] for i in range(start, min(start + _BATCH_SIZE, len(chosen)))])
        for start in range(0, len(chosen), _BATCH_SIZE)
    ]
    with warnings.catch_warnings():  # PEFT finds that the base was read from a folder; its name is put back below
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        collapsed = collapse(trained.model, batches, rank)
    error = {
        "error": collapsed.error,
        "held_out": collapsed.held_out,
        "rank": rank,
        "rows": len(chosen),
        "per_module": collapsed.per_module,
    }
    config = trained.model.active_peft_config
    with _new_folder(output) as folder:
        collapsed.model.active_peft_config.base_model_name_or_path = config.base_model_name_or_path
        collapsed.model.save_pretrained(str(folder), save_embedding_layers=False)
        trained.tokenizer.save_pretrained(folder)
        RunFolder(folder).write_json("error.json", error)
        RunFolder(folder).write_text("README.md", _card(collapsed, public_name(config.base_model_name_or_path or "")))
    return Export(output, (output,), error)


def _card(collapsed: Collapsed, base: str) -> str:
    rows = "rows that were not fitted" if collapsed.held_out else "the rows that were fitted"
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- lamella\n- lora\n---\n\n# A collapsed mixture\n\n"
        "One plain LoRA in place of a mixture of LoRA experts, fitted by lamella. It loads with PEFT alone. Of the "
        f"mixture's effect on the model's output it loses {collapsed.error:.2%} (relative norm), measured on {rows}; "
        "`error.json` has the error of each module.\n"
    )


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise LamellaError(f"{output} exists already, and nothing is overwritten. Choose another folder with -o.")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block is done."""
    with atomic(output) as unfinished:
        unfinished.mkdir()
        yield unfinished
