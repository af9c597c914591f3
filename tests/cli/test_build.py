"""`lamella build` from the command line."""

import json

from tests.cli.test_commands import lamella

__all__ = ["lamella"]
SWITCH = ["vocabulary=300", "max_length=16", "layers=2", "sparse_layers=1", "hidden=16", "heads=2", "experts=2"]
FAST = ["expert_width=16", "schedule.epochs=1", "schedule.log_every=2"]


def test_build_prints_one_json_object(lamella, questions, tmp_path):
    folder = tmp_path / "model"
    status, out, _ = lamella("build", "switch-trec", f"task={questions}", *SWITCH, *FAST, "-o", folder, "--json")

    printed = json.loads(out)
    kept = json.loads((folder / "log.json").read_text())
    assert printed == {"folder": str(folder), **kept}
    assert status == (1 if kept["failed"] else 0)


def test_build_tells_people_the_figures_beside_their_floors(lamella, questions, tmp_path):
    status, out, err = lamella("build", "switch-trec", f"task={questions}", *SWITCH, *FAST, "-o", tmp_path / "model")

    assert status in (0, 1)
    assert out == ""
    assert "test accuracy of model" in err
    assert "test accuracy of floor (TF-IDF)" in err
    assert "smallest share of an expert" in err


def test_a_model_that_fails_its_promise_is_status_one(lamella, prose, tmp_path):
    small = ["vocabulary=280", "block=16", "layers=1", "hidden=16", "heads=2", "experts=2", "top_k=1"]
    sizes = ["expert_width=8", "shared_width=8", "smallest_share=0.9", f"kinds=[{prose}]"]
    status, _, err = lamella("build", "tiny-moe", *small, *sizes, "-o", tmp_path / "model")

    assert status == 1
    assert "starved" in " ".join(err.split())


def test_what_cannot_be_built_is_status_two(lamella, tmp_path):
    for words, said in ((["huge-moe"], "tiny-moe"), (["tiny-moe", "expert=2"], "experts"), (["tiny-moe"], "--force")):
        status, out, err = lamella("build", *words, "-o", tmp_path)
        assert status == 2
        assert out == ""
        assert said in err
