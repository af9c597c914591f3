"""A training that is kept on the way and goes on from there."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lamella.errors import LamellaError
from lamella.files import atomic, read_json, read_tensors, write_atomic
from lamella.progress import working
from models.settings import Pace

Part = TypeVar("Part", bound=nn.Module)
_CURVE = 100  # steps, of whose losses a log has the mean
_FREE = ("steps", "keep_every")  # a training goes on when these change


def seeded(*facts: object) -> torch.Generator:
    """A generator that these facts decide, such as a seed, a purpose and a step."""
    return torch.Generator().manual_seed(zlib.crc32(repr(facts).encode()))


def train(
    part: Part, loss: Callable[[torch.Generator], Tensor], pace: Pace, file: Path, seed: int
) -> tuple[Part, list[float]]:
    """Train until all steps are done, those of an earlier start among them; what a step draws depends on nothing else.

    Args:
        part: trained in place, and its weights are then the running mean's.
        loss: of one step, with the generator of all that it draws.
        pace: steps, rate and mean.
        file: where the training is kept on the way; its name is what the work is called.
        seed: of all steps.

    Returns:
        The part, and the loss of each step.

    Raises:
        LamellaError: the loss is not finite, or the file cannot be read.
    """
    optimizer = torch.optim.AdamW(part.parameters(), lr=pace.lr, weight_decay=pace.weight_decay)
    average = AveragedModel(part, multi_avg_fn=get_ema_multi_avg_fn(pace.average))
    losses = _kept(file, part, average, optimizer) if file.exists() else []
    part.train()
    with working(file.stem, pace.steps, "steps", done=len(losses)) as work:
        for step in range(len(losses), pace.steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(pace, step)
            value = loss(seeded(seed, file.stem, step))
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise LamellaError(f"The loss of {file.stem} is not finite at step {step}. Lower {file.stem}.pace.lr.")
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(part)
            if (step + 1) % pace.keep_every == 0 or step + 1 == pace.steps:
                _keep(file, part, average, optimizer, losses)
            work.note = f"loss {losses[-1]:.3g}"
            work.reach(step + 1)
    part.load_state_dict(average.module.state_dict())
    return part.eval(), losses


def refuse_others(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down the settings of the trainings that a folder keeps, so that they do not go on with others.

    Raises:
        LamellaError: they were begun with others, but for the number of steps.
    """
    file, mine = folder / "settings.json", _bound(settings)
    if file.exists() and read_json(file) != mine:
        raise LamellaError(f"{folder} keeps a training with other settings. Remove it, or name another folder with -o.")
    write_atomic(file, json.dumps(mine, indent=1) + "\n")


def _bound(settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    return {key: _bound(value) for key, value in settings.items() if key not in _FREE}


def curve(losses: list[float]) -> list[dict[str, float]]:
    """Means of losses for a log."""
    parts = [losses[start : start + _CURVE] for start in range(0, len(losses), _CURVE)]
    return [{"step": at * _CURVE + len(part), "loss": sum(part) / len(part)} for at, part in enumerate(parts)]


def _rate(pace: Pace, step: int) -> float:
    """It rises over the first steps and falls along a cosine over the last."""
    falling = pace.fall * pace.steps
    left = min(1.0, (pace.steps - step) / falling) if falling else 1.0
    return pace.lr * min(1.0, (step + 1) / pace.warmup_steps) * (1 - math.cos(math.pi * left)) / 2


def _keep(
    file: Path, part: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    states = {"part": part.state_dict(), "average": average.state_dict()}
    states |= {f"optimizer.{at}": state for at, state in optimizer.state_dict()["state"].items()}
    tensors = {f"{prefix}/{name}": tensor for prefix, state in states.items() for name, tensor in state.items()}
    with atomic(file) as unfinished:
        save_file({**tensors, "losses": torch.tensor(losses, dtype=torch.float64)}, unfinished)


def _kept(file: Path, part: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    states: dict[str, dict[str, Tensor]] = {}
    tensors = read_tensors(file)
    losses = tensors.pop("losses")
    for path, tensor in tensors.items():
        prefix, name = path.split("/")
        states.setdefault(prefix, {})[name] = tensor
    part.load_state_dict(states.pop("part"))
    average.load_state_dict(states.pop("average"))
    moments = {int(prefix.removeprefix("optimizer.")): state for prefix, state in states.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return losses.tolist()
