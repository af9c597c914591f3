import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.lab.report import Report, TokenLayer, TokenText, render, write_report

HOSTILE = (
    "\"'></title></style></script><script>alert(1)</script><img src=http://x.invalid onerror=alert(2)>&amp; \u202eعربي"
)
VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """The page as a browser reads it: tags with their attributes, the text, and that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.scripts, self.open = [], [], [], []
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
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def hostile(results, trace, entropy, redundancy, finding):
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
        entropy=entropy.assign(run=HOSTILE),
        texts=[TokenText(HOSTILE, [HOSTILE, "\u2028\u2029"], [TokenLayer(HOSTILE, 2, [[1.0, 0.0], [0.0, 1.0]])])],
        redundancy=redundancy.assign(stack=HOSTILE, module=HOSTILE),
        findings=[SimpleNamespace(**dict.fromkeys(("severity", "what", "where", "why", "fix"), HOSTILE))],
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
    assert re.findall(r"Summary|Results|Cost|Routing|Settings|Notes", text)[0] == "Summary"


def test_text_from_data_stays_text(hostile):
    page = Page(render(hostile))
    assert page.named("script") == [{"type": "application/json", "id": "token-data"}, {}]
    assert page.named("img") == []
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    # title, heading, summary, 4 results, their task 4 times, a column, the plot's title and 4 marks, 4 costs, sentence,
    # module switch and captions, a setting's section, name and value, a list, a note, twice the name of three lines,
    # a layer, a text, the redundant layers, what a finding says in four places
    assert "".join(page.text).count(HOSTILE) >= 40
    assert next(attrs["aria-label"] for attrs in page.named("svg") if attrs.get("role") == "img").startswith(HOSTILE)


def test_the_data_of_the_script_cannot_leave_their_element(hostile):
    data, _ = Page(render(hostile)).scripts
    assert not set("<>&'\u2028\u2029") & set(data)
    assert json.loads(data)["texts"][0]["tokens"] == [HOSTILE, "\u2028\u2029"]
    assert json.loads(data)["layers"][0]["name"] == HOSTILE


@pytest.mark.parametrize("which", ["report", "full_report", "hostile"])
def test_nothing_is_loaded_from_elsewhere(which, request):
    source = render(request.getfixturevalue(which))
    page = Page(source)
    loading = {"src", "srcset", "data", "action", "poster", "xlink:href", "style"}
    assert not [attrs for _, attrs in page.tags if loading & set(attrs)]
    assert all(attrs["href"].startswith("#") for _, attrs in page.tags if "href" in attrs)
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL).group(1)
    assert "{" in style
    assert not re.search(r"url\(|@import|http", style)


def test_the_script_builds_text_only_as_text(full_report):
    _, script = Page(render(full_report)).scripts
    assert "textContent" in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|fetch|http", script)


def test_the_policy_allows_the_page_s_own_script_and_no_other(report, full_report):
    policies = []
    for each in (report, full_report):
        page = Page(render(each))
        (content,) = [attrs["content"] for attrs in page.named("meta") if "http-equiv" in attrs]
        policies.append(dict(part.strip().split(" ", 1) for part in content.split(";")))
    assert policies[0] == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": "'unsafe-inline'",
    }
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policies[1] == {**policies[0], "script-src": f"'sha256-{digest}'"}


def test_a_full_page_has_every_section_in_its_contents(full_report):
    page = Page(render(full_report))
    headings = [attrs["id"] for attrs in page.named("h2")]
    assert headings == [
        *("summary", "results", "cost", "routing", "training", "tokens", "redundancy", "findings", "settings", "notes")
    ]
    assert [attrs["href"] for attrs in page.named("a")][1:] == [f"#{name}" for name in headings[1:]]
    text = " ".join(" ".join(page.text).split())
    for words in (
        "The doctor found 1 error and 1 warning.",
        "The router gets no gradient",
        "Why it matters It costs memory. What to do Raise it.",
        "0.790 MoLA, seed 1",
        "The experts are most alike in encoder layer 0",
        "The raw distance grows with the size of the update",
        "layer 1",
    ):
        assert words in text
    assert text.index("The router gets no gradient") < text.index("Expert 1 never fires")
    assert "Not recorded" not in text


def test_what_was_not_recorded_or_examined_is_said(report):
    text = " ".join(" ".join(Page(render(report)).text).split())
    assert "Not recorded: entropy over training, texts coloured token by token, redundancy per layer." in text
    assert text.count("The doctor has not examined this run.") == 2
    assert "No finding: the doctor found nothing wrong." in render(replace(report, findings_checked=True))


def test_the_measures_of_cost_read_well(report):
    cost = pd.DataFrame(
        {
            "method": ["LoRA", "MoLA"],
            "trainable parameters": [2304112, 2301003],
            "active parameters": [2304112.0, None],
            "step-time ratio": [1.0, 1.4236],
            "kept memory MB": [182.24, 1248.1],
            "latency ms, batch 1": [7.8123, 10.934],
            "latency ms, batch 32": [88.2, 121.44],
        }
    )
    text = " ".join(" ".join(Page(render(replace(report, cost=cost))).text).split())
    assert "LoRA 2,304,112 2,304,112 1.000 182.2 7.812 88.20" in text
    assert "MoLA 2,301,003 not measured 1.424 1,248 10.93 121.4" in text


@pytest.mark.parametrize("which", ["report", "full_report"])
def test_tables_switches_and_charts_can_be_read_by_a_screen_reader(which, request):
    page = Page(render(request.getfixturevalue(which)))
    assert page.named("html")[0]["lang"] == "en"
    assert len(page.named("caption")) == len(page.named("table"))
    assert all("scope" in attrs for attrs in page.named("th"))
    assert all({"aria-hidden", "role"} & set(attrs) or "overflow" in attrs or not attrs for attrs in page.named("svg"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["for"] for attrs in page.named("label")} == {
        attrs["id"] for attrs in page.named("input") + page.named("select")
    }
    assert {attrs["aria-labelledby"] for attrs in page.named("section")} <= set(ids)
    assert [attrs["id"] for attrs in page.named("input") if "checked" in attrs and attrs["type"] == "radio"] == [
        "module-1"
    ]


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


def test_everything_at_its_largest_stays_under_six_megabytes(report, trace):
    weights = np.full((10_000, 8), 0.125)
    text = TokenText("long", ["\u2028word"] * 10_000, [TokenLayer(f"layer {at}", 8, weights) for at in range(30)])
    steps = pd.DataFrame({"run": np.repeat(list("abcdefghij"), 5000), "step": list(range(5000)) * 10, "entropy": 0.5})
    routing = trace([8] * 30, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    page = render(replace(report, texts=[text, text], entropy=steps, routing=routing))
    assert len(page.encode()) < 6_000_000


def test_the_same_report_gives_the_same_page(full_report):
    assert render(full_report) == render(full_report)


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
