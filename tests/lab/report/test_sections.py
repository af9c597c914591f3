"""A section of a report is one registered function."""

import re
from dataclasses import dataclass, replace

import pandas as pd
import pytest
from markupsafe import Markup

from lamella.lab.report import render, section
from lamella.lab.report.sections import REGISTERED


@dataclass
class Study:
    depths: dict[str, float]


@pytest.fixture
def toys():
    """Two sections that know a toy study: a table, and a drawing. They are gone after the test."""

    @section("Mean depth", 25, absent="mean depth")
    def mean_depth(report):
        if not isinstance(report.about, Study):
            return None
        found = {"method": list(report.about.depths), "layer": list(report.about.depths.values())}
        return {"Where experts are chosen": pd.DataFrame(found)}

    @section("Drawing", 26)
    def drawing(report):
        depths = report.about.depths if isinstance(report.about, Study) else {}
        bars = [Markup('<rect width="{}"/>{}').format(depth, name) for name, depth in depths.items()]
        return Markup("<svg>{}</svg>").format(Markup().join(bars)) if bars else None

    yield
    del REGISTERED["Mean depth"], REGISTERED["Drawing"]


def test_a_registered_section_stands_in_its_place_with_its_table(report, toys):
    page = render(replace(report, about=Study({"LoRA <b>": 5.5})))

    headings = re.findall(r"<h2 id=\"(.*?)\">(.*?)</h2>", page)
    assert headings.index(("mean-depth", "Mean depth")) == headings.index(("routing", "Routing")) + 1
    assert headings.index(("drawing", "Drawing")) == headings.index(("mean-depth", "Mean depth")) + 1
    assert '<a href="#mean-depth">Mean depth</a>' in page
    assert "<caption>Where experts are chosen</caption>" in page
    assert "5.5" in page
    assert '<svg><rect width="5.5"/>LoRA &lt;b&gt;</svg>' in page


def test_a_section_without_anything_to_show_is_absent_and_said_to_be(report, toys):
    page = render(report)

    assert "mean-depth" not in page
    assert re.search(r"Not recorded: [^.]*mean depth", page)
    assert "Drawing" not in page
