"""The Python code of docs/similarity.md runs as it stands, on texts that are shorter."""

import re
from pathlib import Path

import pytest

from lamella.lab import data

PAGE = Path(__file__).parents[1] / "docs" / "similarity.md"
SENTENCE = "the men of the town said that a new law on prices would help them more than it costs"


@pytest.mark.heavy
def test_the_tutorial_from_python(tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").partition("## From Python")[2]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    words = SENTENCE.split()
    texts = [" ".join(words[(place * (1 + at) + at) % len(words)] for place in range(24)) for at in range(24)]
    monkeypatch.setattr(data, "load_task", lambda name: texts)
    monkeypatch.chdir(tmp_path)
    told = {}
    exec(code, told)
    assert set(told["table"]["kind"]) == {"pair", "self", "random-target"}
    assert told["smaller"].report.experts_left == 24
    assert (tmp_path / "smaller" / "tiny").is_dir()
