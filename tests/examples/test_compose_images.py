"""The example in miniature, from the command line to the report."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from examples.compose_images import parse, real
from tests import tiny_pipelines as tiny

from lamella import LamellaError, load_pipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "compose_images.py"


def test_the_tiny_run_composes_trains_saves_and_reports_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "-o", str(tmp_path / "run")])
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as an interpreter does for the script that it is given
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "LoRAs by number: 0 cat, 1 dog, 2 ink" in capsys.readouterr().out
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 6
    for arm in ("cat alone", "dog alone", "ink alone", "NLA", "MOLE", "MOLE without cat"):
        assert f"<bdi>{arm}</bdi>" in page
    assert re.search(r"text alignment.*cat alignment.*dog alignment", page, re.DOTALL)
    assert "http://" not in page
    composition = load_pipeline(tiny.stable_diffusion("v_prediction"), run / "composition")
    assert any(parameter.abs().sum() > 0 for parameter in composition.parameters())


@pytest.mark.parametrize(
    "given", [["--prompt", "x"], ["--lora", "a=b", "--prompt", "x"], ["--lora", "a", "--lora", "b"]]
)
def test_a_run_without_two_loras_and_a_prompt_is_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*given, "-o", "x"])


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    arguments = parse(["--lora", "a=x/y", "--lora", "b=x/z", "--prompt", "x", "-o", "x"])
    with pytest.raises(LamellaError, match=r"pip install 'lamella\[diffusion\]'"):
        real(arguments)
