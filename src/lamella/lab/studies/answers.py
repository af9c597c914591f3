"""What a trained model answers on many tests: log-probabilities of classes or options, or the loss of every text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from peft import PeftModel
from pydantic import PositiveInt
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.lab.data import Backbone, Encoded, Task, encode, load_backbone, load_task
from lamella.lab.data.splitting import sample_rows
from lamella.lab.methods import ComposingMethod
from lamella.lab.methods.compositions import as_loras, read_loras
from lamella.lab.runs.settings import RunSettings
from lamella.lab.scoring import length_batches
from lamella.lab.studies.options import option_answers, with_options
from lamella.progress import counted
from lamella.tuners.mole.overrides import masked_experts

if TYPE_CHECKING:
    from datasets import Dataset

Floats = npt.NDArray[np.float64]
Answers = Literal["classes", "options", "tokens"]
TestRows = PositiveInt | dict[str, PositiveInt] | None
# of what tests ask for: the tasks that can be asked so, and what is compared
_KINDS: Mapping[Answers, tuple[tuple[str, ...], str]] = {
    "classes": (("classification", "pair-classification"), "the probabilities of classes"),
    "options": (("seq2seq",), "the likelihood of options"),
    "tokens": (("causal-lm",), "the loss of texts"),
}


@dataclass(frozen=True)
class Questions:
    """What a study asks its models.

    Attributes:
        tasks: by name; their test rows are read as a run reads rows.
        rows: of each, or by name, always the same ones; all where None.
        answers: what tests ask for.
    """

    tasks: Mapping[str, str]
    rows: TestRows
    answers: Answers

    @property
    def compares(self) -> bool:
        """Whether tokens are compared with those of a source's LoRA at once; with classes and options it can wait."""
        return self.answers == "tokens"

    def loaded(self) -> dict[str, Task]:
        """The tasks with the test rows that are used, and those alone; the options of those that have any as labels.

        Raises:
            LamellaError: one has no test rows, or cannot be asked so.
        """
        tasks = {name: load_task(task) for name, task in self.tasks.items()}
        kinds, what = _KINDS[self.answers]
        for task in tasks.values():
            if task.kind not in kinds or "test" not in task.splits:
                raise LamellaError(
                    f"This study of composition compares {what} on test rows, and {task.name}, a {task.kind} task with "
                    f"{', '.join(task.splits)} rows, has none. Choose {' or '.join(kinds)} tasks with a test split, or "
                    "say answers: classes, options or tokens as it fits them."
                )
        if self.answers == "options":
            tasks = {name: with_options(task) for name, task in tasks.items()}
        return {name: replace(task, splits={"test": self._test(name, task)}) for name, task in tasks.items()}

    def _test(self, name: str, task: Task) -> Dataset:
        rows = self.rows[name] if isinstance(self.rows, dict) else self.rows
        return task.splits["test"] if rows is None else sample_rows(task.splits["test"], rows)


def answers(settings: RunSettings, run: Path, tests: Questions, loras: Mapping[str, str]) -> pd.DataFrame:
    """A row per test and text.

    Of classes and options: test, row, label, log_probs (natural, a list with an entry per class or option). Of texts:
    test, row, loss and, on the test of a source, kl, as `text_answers` has them.

    Args:
        settings: of the run.
        run: its folder.
        tests: what is asked.
        loras: where the LoRA of each source lies; read where tokens are compared with theirs.

    Raises:
        LamellaError: a test that cannot be asked, or a run or LoRA that cannot be loaded.
    """
    asked = tests.loaded()
    model, backbone = _trained(settings, run, asked)
    alone = LorasAlone(settings.model, next(iter(asked.values())), loras) if tests.compares else None
    return _asked(model, backbone, settings, asked, alone)


def masked_answers(settings: RunSettings, run: Path, tests: Questions) -> pd.DataFrame:
    """The same without each of the run's LoRAs in turn, not compared with any: ``dropped``, and the columns of answers.

    A composition by routers shares the dropped weight out among the others, as `lamella.masked_experts`; one that is
    not trained is put together from the others.

    Raises:
        LamellaError: as `answers`.
    """
    asked, method = tests.loaded(), settings.method
    assert isinstance(method, ComposingMethod)  # the recipe was checked
    frames = []
    if method.masked_by == "routers":
        model, backbone = _trained(settings, run, asked)
        for dropped in method.adapters:
            with masked_experts(model, [dropped]):
                frames.append(_asked(model, backbone, settings, asked, None).assign(dropped=dropped))
        return pd.concat(frames, ignore_index=True)
    for dropped in method.adapters:
        rest = {name: place for name, place in method.adapters.items() if name != dropped}
        task = next(iter(asked.values()))
        bare = load_backbone(settings.model, task)
        left = method.model_copy(update={"adapters": rest}).build(bare, task).model.eval()
        frames.append(_asked(left, bare, settings, asked, None).assign(dropped=dropped))
    return pd.concat(frames, ignore_index=True)


def _trained(settings: RunSettings, run: Path, asked: Mapping[str, Task]) -> tuple[nn.Module, Backbone]:
    first = next(iter(asked.values()))
    backbone = load_backbone(settings.model, first)
    return settings.method.load(backbone, first, run / "adapter").eval(), backbone


def _asked(
    model: nn.Module, backbone: Backbone, settings: RunSettings, asked: Mapping[str, Task], alone: LorasAlone | None
) -> pd.DataFrame:
    frames = []
    for name, task in asked.items():
        answers = _answered(model, backbone, settings, task, None if alone is None else alone.of(name))
        frames.append(answers.assign(test=name, row=range(len(answers))))
    return pd.concat(frames, ignore_index=True)


def _answered(
    model: nn.Module, backbone: Backbone, settings: RunSettings, task: Task, other: nn.Module | None
) -> pd.DataFrame:
    if task.kind in _KINDS["options"][0]:
        return option_answers(model, backbone, task, settings.max_length, settings.eval_batch_size)
    encoded = encode(task, backbone.tokenizer, max_length=settings.max_length, decoder=backbone.decoder)
    if task.kind in _KINDS["classes"][0]:
        return _classes(model, encoded, settings.eval_batch_size)
    return text_answers(model, encoded, settings.eval_batch_size, other)


def _classes(model: nn.Module, encoded: Encoded, batch_size: int) -> pd.DataFrame:
    rows = encoded.test
    assert rows is not None
    logs = log_probs(model, rows, encoded.collator, batch_size)
    return pd.DataFrame({"label": np.asarray(rows["labels"]), "log_probs": list(logs)})


def log_probs(model: nn.Module, rows: Any, collator: Any, batch_size: int) -> Floats:
    """Natural logarithms of the classes' probabilities, (rows, classes)."""
    device = next(model.parameters()).device
    parts, order = [], []
    with torch.no_grad():
        for batch in counted(length_batches(rows["length"], batch_size), "answering", "batches"):
            inputs = {name: value.to(device) for name, value in collator([rows[i] for i in batch]).items()}
            inputs.pop("labels")
            parts.append(model(**inputs).logits.double().log_softmax(-1).cpu().numpy())
            order += batch
    logs = np.empty((len(order), parts[0].shape[1]))
    logs[order] = np.concatenate(parts)
    return logs


def divergence(from_log: Floats, to_log: Floats) -> Floats:
    """KL(p || q) in nats of each row, from the log-probabilities of p and q, both (rows, classes)."""
    difference: Floats = np.exp(from_log) * (from_log - to_log)
    return difference.sum(1)


def text_answers(model: nn.Module, encoded: Encoded, batch_size: int, other: nn.Module | None) -> pd.DataFrame:
    """A row per test text, in order: its mean loss and, where there is another model, its mean divergence from that.

    ``loss`` is the mean of -log p over the tokens that carry loss, ``kl`` that of KL(other || model) over the whole
    vocabulary at each of them; both in nats. Only one batch's logits of both models are held at a time.

    Args:
        model: a decoder in evaluation mode.
        encoded: with test rows.
        batch_size: texts per forward.
        other: a decoder with the same vocabulary.
    """
    rows: Any = encoded.test
    measured: dict[str, Any] = {"loss": np.empty(len(rows)), "kl": np.full(len(rows), np.nan)}
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in counted(length_batches(rows["length"], batch_size), "answering", "batches"):
            inputs = {name: value.to(device) for name, value in encoded.collator([rows[i] for i in batch]).items()}
            labels = inputs["labels"][:, 1:]  # position t predicts the token at t + 1
            logits = _logits(model, inputs)
            others = None if other is None else _logits(other, inputs)
            for at, index in enumerate(batch):
                read = labels[at] != -100
                log_probs = logits[at][read].float().log_softmax(-1)  # (tokens, vocabulary)
                measured["loss"][index] = nn.functional.nll_loss(log_probs, labels[at][read]).item()
                if others is not None:
                    measured["kl"][index] = _divergence(others[at][read].float().log_softmax(-1), log_probs)
    return pd.DataFrame(measured)


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # with labels, since they tell routers where the prompt ends
    logits: Tensor = model(**inputs).logits[:, :-1]
    return logits


def _divergence(from_log: Tensor, to_log: Tensor) -> float:
    return nn.functional.kl_div(to_log, from_log, reduction="batchmean", log_target=True).item()


class LorasAlone:
    """Trained LoRAs as adapters of a separate model, one of them active at a time.

    Args:
        model: the backbone, as a run names it.
        task: that decides the backbone's head.
        places: where each LoRA lies.
    """

    def __init__(self, model: str, task: Task, places: Mapping[str, str]) -> None:
        self._model, self._task, self._places = model, task, places
        # PEFT wants names without dots
        self._adapters = {name: f"lora{index}" for index, name in enumerate(places)}

    def of(self, name: str) -> PeftModel | None:
        """The model with that LoRA alone, until another is asked for; None where there is none of that name.

        Raises:
            LamellaError: the LoRAs cannot be read, or do not fit the backbone.
        """
        if name not in self._adapters:
            return None
        self._loaded.set_adapter(self._adapters[name])
        return self._loaded

    @cached_property
    def _loaded(self) -> PeftModel:
        backbone = load_backbone(self._model, self._task)
        loras = read_loras(backbone, self._places)
        return as_loras(backbone, self._task, {self._adapters[name]: lora for name, lora in loras.items()}).eval()
