import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from tests.lab.tiny_runs import MOLA, tiny_settings
from transformers import BertForSequenceClassification

from lamella.cli.output import show_run
from lamella.lab.data import load_backbone, load_task
from lamella.lab.pages import run_report
from lamella.lab.report.report import render
from lamella.lab.runs import floors
from lamella.lab.runs.card import model_card, public_name, task_name
from lamella.lab.runs.floors import FLOOR
from lamella.lab.runs.run import train


@pytest.fixture(scope="module")
def trained(finished_run):
    return finished_run(MOLA)


def _card(result) -> str:
    return (result.folder.path / "adapter" / "README.md").read_text()


def test_the_hub_reads_base_library_and_tags(trained, bert):
    front = yaml.safe_load(_card(trained).split("---\n")[1])

    assert front == {"base_model": Path(bert).name, "library_name": "peft", "tags": ["lamella", "mola"]}


def test_it_says_what_was_trained_on_what(trained):
    text = _card(trained)

    assert "experts per block: 2 4" in text
    assert "num_experts=[2, 4]" in text
    assert "file:questions (classification; rows: 48 train, 16 validation, 16 test)" in text
    assert "train.jsonl sha256" in text
    assert "not stated (local files)" in text
    assert f"{trained.metrics['trainable_parameters']:,} trainable parameters" in text
    assert "for 6 steps" in text
    assert "2402.08562" in text
    assert "More Information Needed" not in text


def test_scores_stand_beside_their_floor(trained):
    text = _card(trained)
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    test = dict(zip(lines[0], lines[-1], strict=True))

    assert "seed 0" in text
    assert test["split"] == "test"
    assert float(test["accuracy"]) == pytest.approx(trained.metrics["test"]["accuracy"], abs=1e-4)
    assert float(test[f"accuracy, {FLOOR}"]) == 1.0  # the first word is the label


def test_nothing_private_is_told(trained, bert, questions):
    text = _card(trained)

    for private in (str(Path(bert).parent), str(Path(questions[5:]).parent), str(Path.home())):
        assert private not in text


def test_the_code_to_load_it_names_the_classes(trained):
    text = _card(trained)

    assert "import lamella" in text
    assert "BertForSequenceClassification.from_pretrained(" in text


@pytest.fixture
def named(tmp_path) -> str:
    rows = [{"text": f"it is {at}", "label": ['say "hi"', "billing", "Übrig"][at % 3]} for at in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{tmp_path}/rows.jsonl"


@pytest.mark.parametrize("joint", [False, True])
def test_the_code_to_load_it_makes_a_base_that_knows_its_labels(trained, bert, questions, named, joint):
    task = load_task(f"joint:{named}+{questions}" if joint else named)
    backbone = load_backbone(bert, task)
    settings = tiny_settings(bert, task.name, MOLA)

    text = model_card(settings.method.build(backbone, task).model, backbone, task, settings, trained.metrics)

    call = re.search(r"base = (.+)", text)[1].replace(f'"{Path(bert).name}"', "place")
    base = eval(call, {"BertForSequenceClassification": BertForSequenceClassification, "place": bert})
    of_one = ["billing", 'say "hi"', "Übrig"]
    of_both = [*(f"file:rows.jsonl/{label}" for label in of_one), "file:questions/0", "file:questions/1"]
    assert list(base.config.id2label.values()) == (of_both if joint else of_one)
    assert base.classifier.out_features == len(task.label_names)


def test_the_record_of_a_run_names_its_labels(trained):
    assert json.loads((trained.folder.path / "metrics.json").read_text())["labels"] == ["0", "1"]


def test_lora_needs_no_lamella_to_load_and_is_not_mola(finished_run):
    text = _card(finished_run("lora"))

    assert "import lamella" not in text
    assert "2402.08562" not in text
    assert "r=8" in text


def test_a_whole_model_has_a_card_too(finished_run):
    text = (finished_run("full").folder.path / "model" / "README.md").read_text()

    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"
    assert "PeftModel" not in text


def test_prose_has_no_floor(finished_run):
    text = _card(finished_run(MOLA, decoder=True))

    assert "perplexity" in text
    assert "No linear floor was measured" in text
    assert "LlamaForCausalLM" in text


def test_a_large_task_is_spared_the_floor(bert, questions, run_folder, monkeypatch, capsys):
    monkeypatch.setattr(floors, "_MOST_ROWS", 10)
    settings = tiny_settings(bert, questions, "lora")

    result = train(settings, run_folder)
    show_run(result.metrics, run_folder)

    assert "floor" not in result.metrics
    assert "No linear floor was measured" in _card(result)
    for shown in (render(run_report(result, settings)), capsys.readouterr().err):
        assert FLOOR not in shown


def test_the_floor_is_measured_once_and_stands_wherever_scores_do(bert, questions, run_folder, monkeypatch, capsys):
    fitted = []
    fit = floors.linear_floor
    monkeypatch.setattr(floors, "linear_floor", lambda *args, **options: fitted.append(1) or fit(*args, **options))
    monkeypatch.setattr(floors, "metrics_of", lambda *_: {"accuracy": 0.4321})
    settings = tiny_settings(bert, questions, "lora")

    result = train(settings, run_folder)
    page = render(run_report(result, settings))
    show_run(result.metrics, run_folder)

    assert result.metrics["floor"] == {"validation": 0.4321, "test": 0.4321}
    shown = capsys.readouterr().err
    for text in (_card(result), page, shown):
        assert FLOOR in text
        assert text.count("0.432") == 2
    assert fitted == [1]


def test_a_demo_model_says_which_weights_it_was_trained_on(trained, bert, questions):
    from peft import PeftModel

    task = load_task(questions)
    backbone = load_backbone(bert, task)
    model = PeftModel.from_pretrained(backbone.model, trained.folder.path / "adapter")
    demo = dataclasses.replace(backbone, name="smollm2", published="a/b", source="b (Q4_1, dequantised) from a wheel")

    text = model_card(model, demo, task, tiny_settings("smollm2", questions, MOLA), trained.metrics)

    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "a/b"
    assert "Q4_1" in text
    assert 'load_backbone("smollm2"' in text


@pytest.mark.parametrize(("method", "number"), [("mola", "2402.08562"), ("molex", "2503.11144")])
def test_the_paper_is_that_of_the_method(trained, bert, questions, method, number):
    task = load_task(questions)
    backbone = load_backbone(bert, task)
    settings = tiny_settings(bert, questions, {"name": method, "r": 2})
    model = settings.method.build(backbone, task).model

    assert re.findall(r"arXiv:([\d.]+\d)", model_card(model, backbone, task, settings, trained.metrics)) == [number]


def test_what_a_source_says_is_text(trained, bert, questions):
    task = dataclasses.replace(load_task(questions), source="<script>alert(1)</script>", licence="<b>", notes=("<i>",))
    backbone = load_backbone(bert, task)

    text = model_card(backbone.model, backbone, task, tiny_settings(bert, questions, MOLA), trained.metrics)

    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<b>" not in text
    assert "<i>" not in text


def test_a_path_is_told_by_its_last_part(tmp_path):
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("/nowhere/on/this/machine") == "machine"
    assert public_name("owner/model") == "owner/model"


@pytest.mark.parametrize("how", ["joint", "mix", "learn:2", "learn:2/50"])
def test_a_task_s_files_are_told_by_their_last_part(how):
    assert task_name(f"{how}:file:/nowhere/a.jsonl+text:file:/nowhere/b.jsonl+trec") == (
        f"{how}:file:a.jsonl+text:file:b.jsonl+trec"
    )


def test_the_card_is_there_before_the_run_counts_as_finished(bert, questions, run_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamella.lab.runs.run.check_saved", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings(bert, questions, "lora"), run_folder)

    assert (run_folder / "adapter" / "README.md").is_file()
    assert not (run_folder / "metrics.json").exists()
