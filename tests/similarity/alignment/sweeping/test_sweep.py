import functools

import pandas as pd
import pytest
import torch
from tests.similarity.alignment.sweeping.conftest import documents
from tests.tiny_moe import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.progress import listening
from lamella.similarity.activations import capture
from lamella.similarity.alignment import align, sweep

QUICK = {"aligner": "linear", "steps": 3, "tile_pairs": 22}  # two sources of eleven targets: six tiles


def run(study, out, **changed):
    return sweep(study.capture, study.model, out, **{**QUICK, "load": study.load, **changed})


def tiles(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "tiles").iterdir()}


def test_it_is_what_align_gives_at_once(study, tmp_path):
    seen = []
    with listening(lambda work: seen.append((work.done, work.total))):
        table = run(study, tmp_path)
    model = study.load(study.model, "float32")
    whole = align(study.capture, model, aligner="linear", steps=3)
    pd.testing.assert_frame_equal(table, whole, rtol=1e-5, atol=1e-6)  # differences of errors lie near 0
    assert len(table) == 12 * 11 + 2 * 12
    assert not table.duplicated().any()
    assert seen == [(done, 6) for done in range(1, 7)]
    assert [path.name for path in tmp_path.iterdir()] == ["tiles"]  # whoever asks for several sweeps writes one table
    assert len(tiles(tmp_path)) == 6


def test_tiles_on_disk_are_not_computed_again(study, tmp_path):
    """Killed after the first two tiles, then run again."""

    def killed(work):
        if work.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(killed):
        run(study, tmp_path)
    before = tiles(tmp_path)
    assert len(before) == 2
    seen = []
    with listening(lambda work: seen.append((work.done, work.rate * work.seconds))):
        resumed = run(study, tmp_path)
    assert [done for done, _ in seen] == [3, 4, 5, 6]
    assert [of_this_start for _, of_this_start in seen] == pytest.approx([1, 2, 3, 4], rel=0.1)
    after = tiles(tmp_path)
    assert {name: after[name] for name in before} == before
    pd.testing.assert_frame_equal(resumed, run(study, tmp_path / "whole"), check_exact=True)

    def loading(name, dtype):
        raise AssertionError("nothing is left to compute")

    run(study, tmp_path, load=loading)
    assert tiles(tmp_path) == after


def test_other_settings_make_other_tiles(study, tmp_path):
    run(study, tmp_path)
    other = run(study, tmp_path, seed=1)
    assert len(tiles(tmp_path)) == 12
    assert (other["seed"] == 1).all()


def test_a_tile_that_fails_leaves_nothing(study, tmp_path):
    @functools.wraps(align)
    def failing(captured, model, pairs=None, **settings):
        if pairs[0][0] == (1, 0):
            raise LamellaError("a bad tile")
        return align(captured, model, pairs, **settings)

    with pytest.raises(LamellaError, match="a bad tile"):
        run(study, tmp_path, align=failing)
    assert len(tiles(tmp_path)) == 2
    assert all(name.endswith(".parquet") and not name.startswith(".") for name in tiles(tmp_path))


def test_chosen_pairs_and_no_controls(study, tmp_path):
    pairs = [((1, 2), (0, 0)), ((0, 3), (1, 1))]
    table = run(study, tmp_path, pairs=pairs, controls=False)
    assert table[["source_layer", "source_expert"]].values.tolist() == [[0, 3], [1, 2]]
    assert table[["target_layer", "target_expert"]].values.tolist() == [[1, 1], [0, 0]]


def test_scored_on_another_text(study, tmp_path):
    model = study.load(study.model, "float32")
    other = capture(model, documents(40, seed=5), tmp_path / "other", per_expert=64)
    table = run(study, tmp_path / "out", score_on=other)
    expected = align(study.capture, model, aligner="linear", steps=3, score_on=other)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-5, atol=1e-6)
    assert not table["nmse"].equals(run(study, tmp_path / "out")["nmse"])


def starved(tmp_path):
    """A capture in which expert 0 of layer 1 was never chosen."""
    model = build("qwen2_moe", moe_intermediate_size=8)
    with moe_layers(model)[1].mask([0]):
        taken = capture(model, documents(40), tmp_path / "capture", per_expert=64)
    model.save_pretrained(tmp_path / "model")
    return taken, tmp_path / "model"


def test_an_expert_without_samples_is_noted_even_alone_in_its_tile(study, tmp_path):
    taken, model = starved(tmp_path)
    table = sweep(taken, model, tmp_path / "out", load=study.load, **{**QUICK, "tile_pairs": 1})
    assert len(tiles(tmp_path / "out")) == 12
    assert len(table) == 11 * 11 + 2 * 11
    assert [note for note in table.attrs["notes"] if note.startswith("expert 0 of layer 1 has 0 samples")]
    assert len(table.attrs["notes"]) == 1
    assert table.dtypes["target_layer"] == "int64"


def test_only_experts_without_samples(study, tmp_path):
    taken, model = starved(tmp_path)
    with pytest.raises(LamellaError, match="No expert can be aligned: expert 0 of layer 1 has 0 samples"):
        sweep(taken, model, tmp_path / "out", [((1, 0), (0, 0))], load=study.load, **QUICK)


def test_bad_input_names_itself(study, tmp_path):
    with pytest.raises(LamellaError, match="no setting 'speed'; it has aligner, controls"):
        run(study, tmp_path, speed=3)
    with pytest.raises(LamellaError, match="There is no pair"):
        run(study, tmp_path, pairs=[])
    with pytest.raises(LamellaError, match="Expert 7 of layer 0 is in a pair"):
        run(study, tmp_path, pairs=[((0, 7), (0, 1))])
    with pytest.raises(LamellaError, match="is of the model"):
        run(study, tmp_path, load=lambda name, dtype: build("qwen2_moe", seed=1))
    assert not list(tmp_path.iterdir())


def test_a_capture_that_was_taken_further_meanwhile_is_refused(study, tmp_path):
    model = study.load(study.model, "float32")
    before = capture(model, documents(40), tmp_path / "capture", per_expert=64)
    for path in (tmp_path / "capture").iterdir():
        path.unlink()
    capture(model, documents(48), tmp_path / "capture", per_expert=64)
    with pytest.raises(LamellaError, match="not the one that this sweep began with"):
        sweep(before, study.model, tmp_path / "out", load=study.load, **QUICK)


def test_threads_are_one_while_aligning_and_restored(study, tmp_path):
    seen = []

    @functools.wraps(align)
    def watching(*given, **settings):
        seen.append(torch.get_num_threads())
        return align(*given, **settings)

    torch.set_num_threads(2)
    try:
        run(study, tmp_path, align=watching)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {1}


def test_a_model_is_opened_once(study, tmp_path):
    opened = []

    def load(name, dtype):
        opened.append(name)
        return study.load(name, dtype)

    run(study, tmp_path, load=load)
    assert opened == [str(study.model.resolve())]


def test_by_name_a_model_is_loaded_as_everywhere(study, tmp_path):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 48)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        study.model
    )
    table = sweep(study.capture, study.model, tmp_path / "by name", [((0, 0), (1, 1))], **QUICK)
    same = run(study, tmp_path / "by load", pairs=[((0, 0), (1, 1))])
    pd.testing.assert_frame_equal(table, same, check_exact=True)
