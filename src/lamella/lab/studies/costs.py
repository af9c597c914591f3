"""What the methods of a study cost: step time as a ratio in interleaved rounds, kept memory, latency, active size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamella.files import atomic, read_table
from lamella.lab.data import encode, load_backbone
from lamella.lab.methods import trainable_parameters
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.tasks import limited, task_of
from lamella.lab.studies.measuring import clock_for, kept_megabytes, ratio, time_rounds, using_threads
from lamella.progress import counted
from lamella.tuners.routed import routed_layers

if TYPE_CHECKING:
    import pandas as pd

    from lamella.lab.studies.cells import Cell
    from lamella.lab.studies.study import Study

_ROUNDS = 5
_LATENCY_ROWS = (1, 32)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class _Model:
    """An untrained model of a method, and rows of the task to run it on."""

    model: nn.Module
    training: Batch
    latency: Mapping[int, Batch]


def method_costs(methods: Mapping[str, RunSettings], reference: str) -> pd.DataFrame:
    """Measures every method beside the reference, on real rows of its task, on the CPU with one thread.

    A column per measure: ``active parameters`` (trainable ones that a token goes through), ``step time`` (forward,
    backward and AdamW; times the reference's, median over interleaved rounds), ``kept MB`` (activations kept for the
    backward pass) and ``latency ms, batch B`` (forward without gradients).

    Args:
        methods: settings by the name that tables show, all on one backbone and task.
        reference: the method whose step time is 1.
    """
    import pandas as pd

    rows = []
    with using_threads(1):
        first = _untrained(methods[reference])
        for name, settings in counted(methods.items(), "measuring what methods cost", "methods"):
            measured = first if name == reference else _untrained(settings)
            rows.append({"method": name} | _measure(measured, first))
    return pd.DataFrame(rows)


def study_costs(study: Study) -> pd.DataFrame:
    """`method_costs` of a study's finished methods on each backbone, measured once and saved in ``costs.parquet``.

    A method is measured with the settings of its first finished cell. One that needs what other cells made is not
    measured.

    Args:
        study: whose cells lie in its folder.

    Returns:
        The measures, with a column ``backbone``; no rows for a backbone whose reference has not been run.
    """
    import pandas as pd

    cells, folder = [cell for cell in study.cells if cell.questions is None], study.folder
    if not cells:
        return pd.DataFrame(columns=["method", "backbone"])
    reference, path = study.recipe.reference_name, folder.path / "costs.parquet"
    known = (
        read_table(path, "method", "backbone", "key")
        if path.is_file()
        else pd.DataFrame(columns=["method", "backbone", "key"])
    )
    frames = []
    for backbone in dict.fromkeys(cell.backbone for cell in cells):
        firsts: dict[str, Cell] = {}
        for cell in cells:
            if cell.backbone == backbone and folder.finished(cell.key):
                firsts.setdefault(cell.method, cell)
        keys = [cell.key for cell in firsts.values()]
        costs = known[(known["backbone"] == backbone) & known["key"].isin(keys)]
        if reference in firsts and set(costs["method"]) != set(firsts):
            settings = {name: folder.placed(folder.chosen(cell)) for name, cell in firsts.items()}
            costs = method_costs(settings, reference)
            costs.insert(1, "backbone", backbone)
            costs["key"] = keys
        frames.append(costs)
    costs = pd.concat(frames, ignore_index=True)
    with atomic(path) as unfinished:
        costs.to_parquet(unfinished, index=False)
    return costs.drop(columns="key")


def _untrained(settings: RunSettings) -> _Model:
    torch.manual_seed(settings.seed)
    task = task_of(settings)
    needed = max(settings.batch_size, *_LATENCY_ROWS)
    task = limited(task, dict.fromkeys(task.splits, needed))
    backbone = load_backbone(settings.model, task)
    encoded = encode(
        task, backbone.tokenizer, max_length=settings.max_length, packing=settings.packing, decoder=backbone.decoder
    )
    assert encoded.train is not None  # a run of these settings was trained on it
    every = len(task.tasks)  # several tasks lie one after the other, and rows of all of them are taken
    rows = [encoded.train[at * every % len(encoded.train)] for at in range(needed)]
    model = settings.method.build(backbone, task).model
    latency = {count: encoded.collator(rows[:count]) for count in _LATENCY_ROWS}
    return _Model(model, encoded.collator(rows[: settings.batch_size]), latency)


def _measure(measured: _Model, reference: _Model) -> dict[str, Any]:
    clock = clock_for(threads=1, device="cpu")
    steps = {"measured": _train_step(measured), "reference": _train_step(reference)}
    time = 1.0 if measured is reference else ratio(time_rounds(steps, _ROUNDS, clock), "measured", "reference").median
    given = [*measured.model.parameters(), *measured.model.buffers(), *measured.training.values()]
    measured.model.train()
    kept = kept_megabytes(lambda: _loss(measured.model, measured.training), given)
    forwards = {str(count): _forward(measured.model, batch) for count, batch in measured.latency.items()}
    seconds = time_rounds(forwards, _ROUNDS, clock)
    return {
        "active parameters": active_parameters(measured.model),
        "step time": time,
        "kept MB": kept,
        **{f"latency ms, batch {count}": 1e3 * statistics.median(taken) for count, taken in seconds.items()},
    }


def active_parameters(model: nn.Module) -> int:
    """Trainable parameters that one token goes through: of a module's experts, only the top-k."""
    idle = 0.0
    for layer in routed_layers(model):
        # what all experts share is never idle
        size = sum(factor.numel() for factor in layer.factors if factor.requires_grad and len(factor) > 1)
        idle += size * (1 - layer.top_k / layer.num_experts)
    return trainable_parameters(model) - round(idle)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _train_step(measured: _Model) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in measured.model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        measured.model.train()
        _loss(measured.model, measured.training).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _forward(model: nn.Module, batch: Batch) -> Callable[[], None]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(**inputs)

    return forward
