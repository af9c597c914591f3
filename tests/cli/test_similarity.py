"""`lamella similarity` from the first command to the page, on a tiny random model of every family."""

import errno
import json
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
from tests import tiny, tiny_moe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lamella.cli import main
from lamella.cli.output import print_json
from lamella.cli.similarity.subject import open_study, placed, read_texts
from lamella.progress import listening
from lamella.similarity.activations import Capture
from lamella.similarity.alignment import sweep
from lamella.similarity.swapping import routing_shift

WORDS = [f"w{number}" for number in range(3, tiny_moe.VOCAB)]


def run(monkeypatch, *words):
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["lamella", "similarity", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def save_model(family, folder):
    tokens = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_moe.FAMILIES[family]().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of unlike length, by a rule rather than by chance."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [" ".join(WORDS[(7 * d + d * t + t * t) % len(WORDS)] for t in range(8 + d % 9)) for d in range(48)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def captured(monkeypatch, text, tmp_path, *words, name="study"):
    """A study of the tiny model: its model, its folder."""
    model, study = tmp_path / "model", tmp_path / name
    if not model.exists():
        save_model("qwen2_moe", model)
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study, "--per-expert", 48, *words) == 0
    return model, study


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A model and its study as the capture left it; both are only read."""
    with pytest.MonkeyPatch.context() as patch:
        return captured(patch, text, tmp_path_factory.mktemp("captured"))


@pytest.fixture
def study(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "study")


@pytest.mark.parametrize("family", tiny_moe.PATHS[1:])
def test_every_step_runs_on_every_kind_of_family(family, text, tmp_path, monkeypatch, capsys):
    model, study = save_model(family, tmp_path / "model"), tmp_path / "study"
    assert run(monkeypatch, "plan", model, "--per-expert", 16, "--flops", 1e9, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(
        monkeypatch, "capture", model, "--text", text, "-o", study, "--per-expert", 48, "--batch-size", 4, "--json"
    ) == 0  # fmt: skip
    captured = json.loads(capsys.readouterr().out)
    assert captured["experts"] == planned["experts"]
    assert run(monkeypatch, "screen", study) == 0
    assert run(monkeypatch, "align", study, "--seeds", 1, "--steps", 3, "--per-source", 2, "--aligner", "linear") == 0
    assert run(monkeypatch, "swap", study, "--unit", "router+experts", "--documents", 6) == 0
    quick = ("--budget", 0.75, "--documents", 6, "--criterion", "stand-in")  # tiny DeepSeek-V3 needs all its experts
    assert run(monkeypatch, "compress", study, *quick) == 0
    assert run(monkeypatch, "report", study) == 0
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "Not run" not in page
    alignment = pd.read_parquet(study / "alignment.parquet")
    screened = pd.read_parquet(study / "screen.parquet")
    both = alignment[alignment["kind"] == "pair"].merge(
        screened, on=["source_layer", "source_expert", "target_layer", "target_expert"]
    )
    assert len(both)
    assert (both["nmse"] >= both["floor"] - 1e-6).all()


def test_a_step_out_of_turn_names_the_command_that_is_missing(study, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "screen", tmp_path / "nothing") == 2
    assert "lamella similarity capture" in said(capsys)
    assert run(monkeypatch, "align", study, "--per-source", 2) == 2
    assert "lamella similarity screen" in said(capsys)


def test_a_folder_of_another_study_is_not_touched(whole, text, monkeypatch, capsys):
    model, study = whole
    before = (study / "capture" / "manifest.json").read_bytes()
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study, "--documents", 5) == 2
    assert "documents None there, 5 here" in said(capsys)
    assert (study / "capture" / "manifest.json").read_bytes() == before


def said(capsys):
    """What the command said of an error, in one line."""
    return " ".join(capsys.readouterr().err.split())


def test_another_model_under_the_same_path_is_noticed_in_every_step(text, tmp_path, monkeypatch, capsys):
    model, study = captured(monkeypatch, text, tmp_path)
    tiny_moe.FAMILIES["qwen2_moe"](seed=1).save_pretrained(model)
    before = {path.name for path in study.iterdir()}
    for step in ("screen", "align", "swap", "compress"):
        capsys.readouterr()
        assert run(monkeypatch, step, study) == 2, step
        assert "is of the model Qwen2MoeForCausalLM" in said(capsys)
        assert {path.name for path in study.iterdir()} == before


def test_batches_of_another_size_go_on_with_a_study(whole, text, monkeypatch):
    captured(monkeypatch, text, whole[1].parent, "--batch-size", 2)


def test_an_unfinished_capture_is_refused_in_every_step(whole, study, monkeypatch, capsys):
    manifest = study / "capture" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    for step in ("screen", "align", "swap", "compress", "report"):
        capsys.readouterr()
        assert run(monkeypatch, step, study) == 2, step
        sentence = f"is not finished: it has 39 documents so far. Run `lamella similarity capture {whole[0]}"
        assert sentence in said(capsys)


def test_a_table_of_another_capture_is_left_out_of_the_page(whole, study, text, monkeypatch, capsys):
    assert run(monkeypatch, "screen", study) == 0
    shutil.rmtree(study / "capture")
    assert run(monkeypatch, "capture", whole[0], "--text", text, "-o", study, "--per-expert", 48, "--seed", 1) == 0
    capsys.readouterr()
    assert run(monkeypatch, "align", study, "--per-source", 1) == 2
    assert "screen.parquet was made from another capture" in said(capsys)
    assert run(monkeypatch, "report", study) == 0
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "screen.parquet was made from another capture" in page
    assert "lamella similarity screen" in page


def test_a_dense_model_begins_no_study(text, tmp_path, monkeypatch, capsys):
    model, study = save_model("qwen2_moe", tmp_path / "model"), tmp_path / "study"
    tiny.llama().save_pretrained(model)
    assert run(monkeypatch, "capture", model, "--text", text, "-o", study) == 2
    assert "LlamaForCausalLM" in said(capsys)
    assert not study.exists()


def test_a_study_of_paths_goes_on_from_another_folder(text, tmp_path, monkeypatch, capsys):
    save_model("qwen2_moe", tmp_path / "model")
    text = Path(shutil.copy(text, tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "news").mkdir()  # named like a task
    begin = ("capture", "model", "--text", text.name, "-o", "study", "--per-expert", 48)
    assert run(monkeypatch, *begin) == 0
    study = tmp_path / "study"
    subject = json.loads((study / "study.json").read_text())
    assert (subject["model"], subject["text"]) == (str(tmp_path / "model"), str(text))
    (study / "study.json").write_text(json.dumps({**subject, "model": "model", "text": text.name}))
    assert run(monkeypatch, *begin) == 0  # one that was begun with paths as they were typed
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(monkeypatch, "screen", study) == 0
    assert placed("news") == "news"
    assert placed(f"file:../{text.name}") == f"file:{tmp_path}/elsewhere/../{text.name}"


def seeds_of(study):
    """How many rows each aligner, text and seed of the table has."""
    table = pd.read_parquet(study / "alignment.parquet")
    return table.groupby(["aligner", "scored_on", "seed"], sort=False).size().to_dict()


def test_an_alignment_keeps_other_aligners_seeds_and_texts(whole, study, text, monkeypatch):
    _, other = captured(monkeypatch, text, whole[0].parent, "--split", "all", name="other")
    quick = ("--same-layer", "--aligner", "linear")
    assert run(monkeypatch, "align", study, "--steps", 3, "--seeds", 1, "--same-layer", "--aligner", "layernorm") == 0
    assert run(monkeypatch, "align", study, "--steps", 3, "--seeds", 2, *quick) == 0
    assert run(monkeypatch, "align", study, "--steps", 3, "--seeds", 1, *quick, "--score-on", other) == 0
    elsewhere = "linear, scored on text.txt (all)"
    aligners = [("linear", "", 0), ("linear", "", 1), ("layernorm", "", 0), ("linear", "text.txt (all)", 0)]
    before = seeds_of(study)
    assert list(before) == aligners
    assert len(set(before.values())) == 1
    first = pd.read_parquet(study / "alignment.parquet")
    assert run(monkeypatch, "align", study, "--steps", 3, "--seeds", 1, *quick) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(study / "alignment.parquet"), first)
    noted = json.loads((study / "alignment.json").read_text())["aligners"]
    settings = {(one["aligner"], one["scored_on"]): one for one in noted}
    assert set(settings) == {("layernorm", ""), ("linear", ""), ("linear", "text.txt (all)")}
    assert settings["linear", ""] | {"notes": []} == {
        "aligner": "linear", "scored_on": "",
        "steps": 3, "lr": 3e-3, "pull": None, "per_source": None, "same_layer": True, "score_on": None, "notes": [],
    }  # fmt: skip
    assert "48 documents of hash" in settings["linear", "text.txt (all)"]["score_on"]
    assert run(monkeypatch, "report", study) == 0
    page = (study / "report.html").read_text(encoding="utf-8")
    assert f"Normalised error, aligner {elsewhere}" in page
    assert f"The errors of the aligner {elsewhere} are on that text" in page
    assert "linear.same_layer" in page
    # other settings: all seeds of the old ones go
    assert run(monkeypatch, "align", study, "--steps", 2, "--seeds", 1, *quick) == 0
    assert list(seeds_of(study)) == [one for one in aligners if one != ("linear", "", 1)]


def test_a_kill_between_seeds_leaves_the_table_as_it_was(study, monkeypatch):
    assert run(monkeypatch, "align", study, "--steps", 3, "--seeds", 1, "--same-layer", "--aligner", "layernorm") == 0
    before, tiles = (study / "alignment.parquet").read_bytes(), list((study / "tiles").iterdir())

    def killed(*given, seed, **settings):
        if seed == 1:
            raise KeyboardInterrupt
        return sweep(*given, seed=seed, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("lamella.similarity.steps.sweep", killed)
        assert run(patch, "align", study, "--steps", 3, "--seeds", 2, "--same-layer") != 0
    assert (study / "alignment.parquet").read_bytes() == before
    assert len(list((study / "tiles").iterdir())) > len(tiles)  # what was computed is not lost


def test_one_way_swaps_go_both_orders_and_so_do_their_shifts(study, monkeypatch):
    swap = ("swap", study, "--documents", 4, "--one-way")
    assert run(monkeypatch, *swap, "--unit", "router") == 0
    table = pd.read_parquet(study / "swap.parquet")
    real = table[table["distance"] > 0]
    assert not real["exchange"].any()
    pairs = set(zip(real["first_layer"], real["second_layer"], strict=True))
    assert pairs == {(second, first) for first, second in pairs}
    assert len(pairs) == 6
    opened = open_study(study)
    shifts = pd.read_parquet(study / "shifts.parquet")
    assert set(shifts["swap"]) == {"router 1 in the place of 0", "router 2 in the place of 0"}
    batches = list(read_texts(opened, None, "test", 4))
    expected = routing_shift(opened.model, batches, 0, 1, "router", exchange=False)
    shown = shifts[shifts["swap"] == "router 1 in the place of 0"].reset_index(drop=True)
    pd.testing.assert_frame_equal(shown[expected.columns], expected)
    assert run(monkeypatch, *swap, "--unit", "expert", "--layers", "0,1") == 0
    experts = pd.read_parquet(study / "swap.parquet").query("unit == 'expert' and distance > 0")
    assert len(experts) == 2 * 4 * 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--unit", "head"], "unit='head' is not one of expert, router"),
        (["--metric", "bleu"], "metric='bleu' is not one of nll, accuracy"),
    ],
)
def test_units_and_metrics_that_are_not_there_are_refused(words, sentence, whole, monkeypatch, capsys):
    assert run(monkeypatch, "swap", whole[1], *words) == 2
    assert sentence in said(capsys)


def test_a_plan_counts_the_tokens_that_a_capture_reads(whole, text, tmp_path, monkeypatch, capsys):
    model, _ = captured(monkeypatch, text, whole[1].parent, "--json")
    read = json.loads(capsys.readouterr().out)["tokens"]
    assert run(monkeypatch, "plan", model, "--text", text, "--flops", 1e9, "--json", "-o", tmp_path / "plan.json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["tokens"] == read
    assert json.loads((tmp_path / "plan.json").read_text()) == planned


@pytest.mark.parametrize("layers", ["0,x,2", "0", "0,1,2", "0,-1", ""])
def test_layers_that_are_not_two_are_refused(layers, whole, monkeypatch, capsys):
    assert run(monkeypatch, "swap", whole[1], "--unit", "expert", "--layers", layers) == 2
    assert f"layers={layers!r} names no two layers" in said(capsys)


def test_a_full_disk_is_said_with_the_file(study, monkeypatch, capsys):
    def full(*given, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    capsys.readouterr()
    assert run(monkeypatch, "screen", study) == 2
    assert f"{study}/screen.parquet could not be read or written: No space left on device." in said(capsys)
    assert not list(study.glob(".writing-*"))


def test_an_error_of_no_file_is_not_hidden(whole, monkeypatch):
    def odd(*given, **settings):
        raise OSError("odd")

    monkeypatch.setattr("lamella.similarity.steps.screen", odd)
    with pytest.raises(OSError, match="odd"):
        run(monkeypatch, "screen", whole[1])


def test_json_has_null_for_what_is_no_number(capsys):
    print_json({"a": [float("nan"), 1.5], "b": {"c": float("inf"), "d": (1, "x")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None, "d": [1, "x"]}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["capture", "minilm-is-dense", "--text", "no-such-file.txt"], "could not be loaded"),
        (["plan", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_is_named(words, sentence, tmp_path, monkeypatch, capsys):
    extra = ["-o", tmp_path / "study"] if words[0] == "capture" else []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, *words, *extra) == 2
    assert sentence in said(capsys)


STEPS = {
    "align": (["--steps", 2, "--seeds", 1, "--same-layer"], "alignment"),
    "swap": (["--unit", "router", "--documents", 4], "swap"),
    "compress": (["--budget", 0.75, "--criterion", "reap", "--criterion", "random", "--documents", 4], "compression"),
}
PIECES = {"align": "tiles", "swap": "swaps", "compress": "models", "capture": "documents"}


def interrupt_first(step, words, monkeypatch, capsys):
    """Ctrl-C after the first piece of a step; what is said, and how much a second start counts as done before."""

    def listen(work):
        if work.unit == PIECES[step] and work.done:
            signal.raise_signal(signal.SIGINT)

    with listening(listen):
        assert run(monkeypatch, step, *words) == 130
    out, err = capsys.readouterr()
    assert out == ""
    seen = []
    with listening(lambda work: work.unit == PIECES[step] and seen.append((work.done, work.total))):
        assert run(monkeypatch, step, *words) == 0
    return " ".join(err.split()), seen


@pytest.mark.parametrize("step", STEPS)
def test_a_step_goes_on_where_ctrl_c_stopped_it(step, study, tmp_path, monkeypatch, capsys):
    words, table = STEPS[step]
    whole = shutil.copytree(study, tmp_path / "whole")
    assert run(monkeypatch, step, whole, *words) == 0
    capsys.readouterr()
    said, seen = interrupt_first(step, [study, *words], monkeypatch, capsys)
    assert said.startswith("Interrupted: ")
    assert said.endswith("kept, and the same command goes on from there.")
    assert seen[0][0] == 2
    assert seen[-1][0] == seen[-1][1]
    of_both = [pd.read_parquet(place / f"{table}.parquet") for place in (study, whole)]
    pd.testing.assert_frame_equal(*of_both)


def test_a_capture_goes_on_where_ctrl_c_stopped_it(whole, text, tmp_path, monkeypatch, capsys):
    for name in ("SECONDS", "_SHARE"):
        monkeypatch.setattr(f"lamella.similarity.activations.checkpoints.{name}", 0.0)
    words = [whole[0], "--text", text, "-o", tmp_path / "study", "--per-expert", 48]
    said, seen = interrupt_first("capture", words, monkeypatch, capsys)
    assert said.startswith("Interrupted: the capture is kept up to its last checkpoint")
    assert seen[0][0] == 16  # the second batch of eight
    there, here = (Capture.load(place / "capture") for place in (whole[1], tmp_path / "study"))
    assert here.manifest == there.manifest


def test_another_text_is_measured_anew(study, text, tmp_path, monkeypatch):
    words = [*STEPS["compress"][0][:4], "--documents", 4]
    assert run(monkeypatch, "compress", study, *words) == 0
    seen = []
    with listening(lambda work: work.unit == "models" and seen.append(work.done)):
        assert run(monkeypatch, "compress", study, *words) == 0
        assert seen == []
        other = "\n\n".join(reversed(text.read_text().split("\n\n")))
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / text.name).write_text(f"w5 w6 w7\n\n{other}")
        assert run(monkeypatch, "compress", study, *words, "--text", tmp_path / "other" / text.name) == 0
    assert seen == [1]
