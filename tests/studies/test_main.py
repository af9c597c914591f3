import shutil

import pytest
from tests.studies.left_studies import leave_study, write_recipe
from tests.studies.test_keep import packaged  # noqa: F401

from studies import __main__ as command
from studies import keep as keeping
from studies import probing, similarity


@pytest.fixture
def page(packaged, tmp_path, monkeypatch):  # noqa: F811
    """Where the overview over the only study lies, and nothing is kept yet."""
    monkeypatch.setattr(command, "DOCS", tmp_path)
    monkeypatch.setattr(command, "study_names", lambda: ["study"])
    monkeypatch.setattr(command, "load_study", lambda name: keeping.load_study(name, tmp_path / "kept"))
    monkeypatch.setattr(command, "keep", lambda folder: keeping.keep(folder, tmp_path / "kept"))
    monkeypatch.setattr(command, "kept_similarity", lambda: similarity.kept_similarity(tmp_path / "none"))
    monkeypatch.setattr(command, "kept_probing", lambda: probing.kept_probing(tmp_path / "none"))
    return tmp_path / "evidence.md"


def test_evidence_is_written_kept_and_checked(page, packaged, tmp_path, capsys):  # noqa: F811
    leave_study(tmp_path / "study", write_recipe(packaged), {"LoRA": 0.6, "wide": 0.6, "tall": 0.9})

    assert command.main(["--check"]) == 1
    assert not page.exists()
    assert command.main([]) == 0
    assert "0 of 9 cells run" in capsys.readouterr().out
    assert "*not run*" in page.read_text()

    assert command.main(["--add", str(tmp_path / "study")]) == 0
    assert "Kept: study" in capsys.readouterr().out
    of_study = tmp_path / "evidence" / "study.md"
    assert "better than LoRA: tall" in of_study.read_text()
    assert command.main(["--check"]) == 0

    page.write_text(page.read_text().replace("9 / 9", "8 / 9"))
    assert command.main(["--check"]) == 1
    assert "Not what the kept rows say: evidence.md" in capsys.readouterr().out
    assert "8 / 9" in page.read_text()

    assert command.main([]) == 0
    shutil.rmtree(tmp_path / "kept")
    assert command.main(["--check"]) == 1
    assert command.main([]) == 0
    assert not of_study.exists()


def test_what_cannot_be_kept_is_status_2(page, packaged, tmp_path, capsys):  # noqa: F811
    write_recipe(packaged)
    assert command.main(["--add", str(tmp_path / "other")]) == 2
    assert "'other' is not a study here" in capsys.readouterr().err
