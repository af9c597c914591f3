"""Preflight of a run from its settings, and its first step watched."""

import json

import pytest
from tests.lab.tiny_runs import MOLA, tiny_settings

from lamella import LamellaError
from lamella.diagnostics.preflight import FirstStep
from lamella.lab.runs.checks import preflight_of
from lamella.lab.runs.run import train
from lamella.tuners.mola import MolaLinear


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_the_preflight_of_a_run(bert, questions, changes):
    settings = tiny_settings(bert, questions, MOLA, accumulation=2, **changes)

    found = preflight_of(settings)

    assert found.ok, str(found)
    assert found.estimate.steps == 6 * 2


def test_a_preflight_says_how_the_rows_were_split_and_how_much_trains(bert, run_folder, tmp_path):
    texts = [f"{'who' if n % 2 else 'where'} {'is ' * (1 + n // 2)}" for n in range(40)]
    rows = [{"text": text, "label": text.partition(" ")[0]} for text in [*texts, texts[0]]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tiny_settings(bert, f"file:{tmp_path}/rows.jsonl", MOLA, max_length=16)

    said = preflight_of(settings).checked
    trained = train(settings, run_folder).metrics

    assert "labels, in the order of their numbers: where, who" in said
    assert "1 exact duplicates dropped" in said
    assert any("longer than 16 tokens" in line or "cut" in line for line in said)
    assert [line for line in trained["notes"] if line not in said] == []
    assert f"{trained['trainable_parameters']:,} trainable parameters" in said
    assert said[0].startswith("task: file:rows.jsonl (classification; rows: ")


def test_rows_longer_than_the_model_reads_are_refused_before_a_run(bert, run_folder, tmp_path):
    rows = [{"text": f"{'who' if n % 2 else 'where'} {'is ' * (20 + n)}", "label": n % 2} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tiny_settings(bert, f"file:{tmp_path}/rows.jsonl", MOLA, max_length=64)

    for try_it in (preflight_of, lambda settings: train(settings, run_folder)):
        with pytest.raises(LamellaError, match=r"cannot read a row of 5\d tokens.*Lower max_length"):
            try_it(settings)
    assert not run_folder.exists()


def test_the_callback_in_a_real_run(bert, questions, run_folder, monkeypatch):
    seen = FirstStep()
    train(tiny_settings(bert, questions, MOLA), run_folder, callbacks=[seen])
    assert seen._done

    monkeypatch.setattr(MolaLinear, "_attach_losses", lambda self, adapter, routing, mask, frame: routing)
    with pytest.raises(LamellaError, match="No balance loss arrived"):
        train(tiny_settings(bert, questions, MOLA), run_folder.with_name("broken"), callbacks=[FirstStep()])
