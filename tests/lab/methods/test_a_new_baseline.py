"""A composition baseline is one decorated function: the laboratory trains, scores, examines and masks what it makes."""

from typing import Annotated

import pytest
import torch
from pydantic import Field
from tests.lab.tiny_loras import deltas, inputs, logits_with
from tests.lab.tiny_runs import tiny_settings

from lamella import doctor
from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import composition, method_from
from lamella.lab.methods.base import _METHODS
from lamella.lab.methods.compositions import Loras, Modules
from lamella.lab.methods.sums import weighted_sum
from lamella.lab.runs.evaluating import evaluate
from lamella.lab.runs.run import train
from lamella.lab.runs.settings import settings_of


@pytest.fixture
def fading():
    """Each LoRA has a share of the weight of the one before it."""

    @composition("fading")
    def fading(loras: Loras, share: Annotated[float, Field(gt=0)] = 0.5) -> Modules:
        """The first LoRA, and less and less of the others."""
        return weighted_sum(loras, {name: share**place for place, name in enumerate(loras)})

    yield fading
    del _METHODS["fading"]


def expected(base, questions, loras, share):
    parts = [
        {module: share**place * delta for module, delta in deltas(lora).items()} for place, lora in enumerate(loras)
    ]
    return logits_with(base, questions, {module: sum(part[module] for part in parts) for module in parts[0]})


def test_its_run_is_scored_and_saved_and_examined(fading, base, questions, loras, run_folder):
    settings = tiny_settings(base, questions, {"name": "fading", "adapters": loras, "share": 0.25})
    result = train(settings, run_folder)
    assert result.metrics["trainable_parameters"] == 0
    assert evaluate(run_folder).metrics == pytest.approx(result.metrics["test"])
    assert doctor(run_folder).ok
    method = settings_of(run_folder).method
    assert method == settings.method
    task = load_task(questions)
    model = method.load(load_backbone(base, task), task, run_folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs()).logits, expected(base, questions, loras.values(), 0.25), rtol=1e-4, atol=1e-6
        )


def test_its_parameters_are_its_settings(fading):
    method = method_from({"name": "fading", "adapters": {"a": "x"}})
    assert isinstance(method, fading)
    assert method.share == 0.5
    assert method.masked_by == "rebuilding"
    assert method.__doc__ == "The first LoRA, and less and less of the others."
    with pytest.raises(LamellaError, match=r"Did you mean 'method\.share'"):
        method_from({"name": "fading", "adapters": {"a": "x"}, "shar": 1})
    with pytest.raises(LamellaError, match=r"'method\.share' cannot be 0"):
        method_from({"name": "fading", "adapters": {"a": "x"}, "share": 0})
