"""Preflight of a run from its settings, and its first step watched."""

import pytest
from tests.lab.tiny_runs import tiny_settings

from lamella import LamellaError
from lamella.diagnostics.preflight import FirstStep
from lamella.lab.runs.checks import preflight_of
from lamella.lab.runs.run import train
from lamella.tuners.mola import MolaLinear

MOLA = {"name": "mola", "r": 2, "num_experts": "2-4", "top_k": 2}


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_the_preflight_of_a_run(bert, questions, changes):
    settings = tiny_settings(bert, questions, MOLA, accumulation=2, **changes)

    found = preflight_of(settings)

    assert found.ok, str(found)
    assert found.estimate.steps == 6 * 2


def test_the_callback_in_a_real_run(bert, questions, run_folder, monkeypatch):
    seen = FirstStep()
    train(tiny_settings(bert, questions, MOLA), run_folder, callbacks=[seen])
    assert seen._done

    monkeypatch.setattr(MolaLinear, "_attach_losses", lambda self, adapter, routing, mask, frame: routing)
    with pytest.raises(LamellaError, match="No balance loss arrived"):
        train(tiny_settings(bert, questions, MOLA), run_folder.with_name("broken"), callbacks=[FirstStep()])
