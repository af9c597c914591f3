import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.reporting import Report, render, write_report

HOSTILE = (
    "\"'></title></style></script><script>alert(1)</script><img src=http://x.invalid onerror=alert(2)>&amp; \u202eعربي"
)
VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """The page as a browser reads it: tags with their attributes, the text, and that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def hostile(results, trace):
    named = results.assign(method=[f"{HOSTILE}{at}" for at in range(4)], task=HOSTILE).rename(
        columns={"seed 1": HOSTILE}
    )
    return Report(
        title=HOSTILE,
        summary=HOSTILE,
        results=named,
        cost=named[["method", "mean"]],
        routing=pd.concat([trace([2, 3], ["q", HOSTILE]), trace([2], ["q"], stack=HOSTILE)]),
        settings={HOSTILE: {HOSTILE: HOSTILE}, "list": [HOSTILE]},
        notes=[HOSTILE],
    )


def test_the_page_holds_what_the_report_says(report):
    page = Page(render(report))
    text = " ".join(" ".join(page.text).split())
    for words in (
        "MoLA reaches 0.892, LoRA 0.874, the floor 0.746.",
        "0.851 to 0.897",
        "not run",
        "2,304,112",
        "not measured",
        "12 experts in 4 modules",
        "lora.alpha",
        "Full fine-tuning was not run.",
    ):
        assert words in text
    assert re.findall(r"Verdict|Results|Cost|Routing|Settings|Notes", text)[0] == "Verdict"


def test_text_from_data_stays_text(hostile):
    page = Page(render(hostile))
    assert page.named("script") == page.named("img") == []
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    # title, heading, summary, 4 results, their task 4 times, a column, the plot's title and 4 marks, 4 costs, sentence,
    # module switch and captions, a setting's section, name and value, a list, a note
    assert "".join(page.text).count(HOSTILE) >= 27
    assert next(attrs["aria-label"] for attrs in page.named("svg") if attrs.get("role") == "img").startswith(HOSTILE)


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_nothing_is_loaded_from_elsewhere(which, request):
    source = render(request.getfixturevalue(which))
    page = Page(source)
    loading = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "style"}
    assert not [attrs for _, attrs in page.tags if loading & set(attrs)]
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL).group(1)
    assert "{" in style
    assert not re.search(r"url\(|@import|http", style)
    policy = next(attrs for attrs in page.named("meta") if "http-equiv" in attrs)
    assert policy["content"].startswith("default-src 'none'")


def test_tables_and_the_switch_can_be_read_by_a_screen_reader(report):
    page = Page(render(report))
    assert page.named("html")[0]["lang"] == "en"
    assert len(page.named("caption")) == len(page.named("table"))
    assert all("scope" in attrs for attrs in page.named("th"))
    assert all({"aria-hidden", "role"} & set(attrs) or "overflow" in attrs or not attrs for attrs in page.named("svg"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["for"] for attrs in page.named("label")} == {attrs["id"] for attrs in page.named("input")}
    assert {attrs["aria-labelledby"] for attrs in page.named("section")} <= set(ids)
    assert [index for index, attrs in enumerate(page.named("input")) if "checked" in attrs] == [0]


def test_a_page_without_routing_notes_or_rows(report, trace):
    nothing = pd.DataFrame({"method": []})
    text = "".join(Page(render(Report("t", "s", nothing, nothing, None, {}))).text)
    for words in ("Nothing was run.", "Nothing was measured.", "No routing was traced", "No settings were recorded."):
        assert words in text
    assert "Notes" not in text
    assert "No routing was traced" in render(replace(report, routing=trace([], [])))


def test_layers_of_one_expert_need_no_switch(report, trace):
    page = Page(render(replace(report, routing=trace([1, 1], ["q"]))))
    assert page.named("input") == []
    assert "one expert" in "".join(page.text)


def test_a_large_trace_stays_small(report, trace):
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    large = replace(report, routing=trace([8] * 30, [*modules, "mlp.up_proj", "mlp.down_proj"]))
    assert len(render(large).encode()) < 1_000_000


def test_the_same_report_gives_the_same_page(report):
    assert render(report) == render(report)


def test_writing_makes_the_folder_and_leaves_one_file(report, tmp_path):
    path = tmp_path / "run" / "report.html"
    assert write_report(report, path) == path
    assert path.read_text(encoding="utf-8") == render(report)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_page(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def half(self, text, encoding):
        self.open("w").write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(LamellaError, match="No space left on device"):
        write_report(report, path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_cannot_be_made_leaves_no_file(report, tmp_path):
    with pytest.raises(LamellaError, match="method"):
        write_report(replace(report, cost=pd.DataFrame({"seconds": [1.0]})), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(report, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(LamellaError, match=r"report\.html"):
        write_report(report, tmp_path / "report.html")
    assert [child.name for child in tmp_path.iterdir()] == ["report.html"]


def test_a_file_in_place_of_the_folder_is_named(report, tmp_path):
    (tmp_path / "run").write_text("not a folder", encoding="utf-8")
    with pytest.raises(LamellaError, match=r"run/report\.html"):
        write_report(report, tmp_path / "run" / "report.html")
