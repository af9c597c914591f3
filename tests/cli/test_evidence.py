import json

import pytest
from tests.cli.test_commands import lamella  # noqa: F401
from tests.lab.evidence.kept_studies import leave_study, write_recipe
from tests.lab.evidence.test_evidence import packaged  # noqa: F401


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    return folder


def test_evidence_is_written_kept_and_checked(lamella, packaged, docs, tmp_path):  # noqa: F811
    leave_study(tmp_path / "study", write_recipe(packaged), {"LoRA": 0.6, "wide": 0.6, "tall": 0.9})
    page = docs / "evidence.md"

    assert lamella("evidence", "--docs", docs, "--check")[0] == 1
    assert not page.exists()

    status, _, err = lamella("evidence", "--docs", docs)
    assert (status, "0 of 9 cells run" in err) == (0, True)
    assert "*not run*" in page.read_text()

    status, out, err = lamella("evidence", "--docs", docs, "--add", tmp_path / "study", "--json")
    printed = json.loads(out)
    assert (status, printed["studies"], printed["unchanged"]) == (0, {"study": {"run": 9, "planned": 9}}, False)
    assert "Kept: study" in err
    assert "better than LoRA: tall" in page.read_text()
    assert lamella("evidence", "--docs", docs, "--check")[0] == 0

    page.write_text(page.read_text().replace("9 / 9", "8 / 9"))
    status, _, err = lamella("evidence", "--docs", docs, "--check")
    assert status == 1
    assert "is not what the data say" in " ".join(err.split())
    assert "8 / 9" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"), [([], "no folder"), (["--add", "runs/x", "--check"], "Give one of them")]
)
def test_what_cannot_be_done_is_status_2(lamella, packaged, tmp_path, docs, words, message):  # noqa: F811
    write_recipe(packaged)
    status, _, err = lamella("evidence", "--docs", docs if words else tmp_path / "nowhere", *words)

    assert status == 2
    assert message in " ".join(err.split())
