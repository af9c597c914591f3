"""The page of a study of expert similarity, from frames made here."""

import re

import numpy as np
import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.lab.report.similarity import SimilarityReport, render_similarity, write_similarity
from lamella.lab.report.similarity.dendrogram import tree
from lamella.lab.report.similarity.matrices import expert_matrices, layer_matrices, pair_means
from lamella.lab.report.similarity.routing import routing_matrices
from lamella.lab.report.similarity.summary import summary
from lamella.similarity.swapping import distance_regressions

EXPERTS = [(layer, expert) for layer in (0, 2) for expert in range(3)]


def alignment(nmse=lambda source, target: 0.2 + 0.1 * abs(source[0] - target[0]), seeds=(0, 1)):
    rows = []
    for seed in seeds:
        for source in EXPERTS:
            for target in EXPERTS:
                value = 0.001 if source == target else nmse(source, target) + 0.01 * seed
                variance = 1.0 + source[1]
                rows.append({
                    "source_layer": source[0], "source_expert": source[1], "target_layer": target[0],
                    "target_expert": target[1], "kind": "self" if source == target else "pair", "aligner": "layernorm",
                    "seed": seed, "nmse": value, "mse": value * variance, "source_variance": variance,
                    "over_mean": value - 0.9, "over_identity": -1.0, "over_random": -1.0,
                })  # fmt: skip
    return pd.DataFrame(rows)


def means(frame):
    """The pairs of the one aligner that a frame has."""
    (pairs,) = pair_means(frame).values()
    return pairs


def test_pairs_are_means_over_seeds_by_aligner_and_leave_out_random_targets():
    both = pd.concat([alignment(), alignment(lambda s, t: 5.0).assign(aligner="linear")])
    random = alignment().head(1).assign(kind="random-target", nmse=9.0)
    found = pair_means(pd.concat([both, random]))
    assert list(found) == ["layernorm", "linear"]
    pairs = found["layernorm"]
    assert len(pairs) == len(EXPERTS) ** 2
    assert pairs.loc[pairs["kind"] == "pair", "nmse"].between(0.2, 0.5).all()
    one = pairs[(pairs["source_layer"] == 0) & (pairs["source_expert"] == 0) & (pairs["target_expert"] == 1)]
    assert one["nmse"].tolist() == pytest.approx([0.205, 0.405])
    assert found["linear"].loc[lambda f: f["kind"] == "pair", "nmse"].min() >= 5.0


def test_a_pair_is_marked_where_every_seed_is_beyond_its_controls():
    found = alignment(lambda s, t: 0.895 if t == (2, 1) else 0.95 if t == (2, 2) else 0.2)
    across = next(m for m in expert_matrices(means(found)) if m.name == "0 by 2")
    first = across.rows[0][1]
    assert [cell.mark for cell in first] == ["•", "", ""]  # seed 1 adds 0.01 to 0.895, and the mean has 0.9
    assert first[0].detail.endswith(", beyond its controls")
    assert first[1].detail.endswith("not beyond its controls")
    within = next(m for m in expert_matrices(means(found)) if m.name == "0 by 0")
    assert within.rows[1][1][1].mark == ""
    assert within.rows[1][1][1].detail.endswith("a control")
    best, every = layer_matrices(means(found))
    assert [cell.mark for cell in best.rows[0][1]] == ["•", "•"]
    assert [cell.mark for cell in every.rows[0][1]] == ["•", ""]
    assert every.rows[0][1][1].detail.endswith("3 of 9 pairs beyond their controls")
    assert "•</td>" in render_similarity(SimilarityReport("marked", alignment=found))


def test_every_aligner_has_its_matrices_and_its_tree():
    both = pd.concat([alignment(), alignment(lambda s, t: 0.77).assign(aligner="linear")])
    page = render_similarity(SimilarityReport("two", alignment=both))
    for group in ("layers", "experts"):
        assert re.findall(rf'id="({group}-\d)"', page) == [f"{group}-1", f"{group}-2"]
        assert f'id="{group}-2-1"' in page
    assert "layer 0 by layer 2: mean over all pairs: 0.775" in page
    assert page.count('class="tree"') == 2
    assert len(set(re.findall(r'id="([^"]+)"', page))) == len(re.findall(r'id="([^"]+)"', page))
    sentences = summary(both, None, None, None)
    assert "(layernorm)" in sentences[0]
    assert "(linear); 30 of them are better" in sentences[1]
    assert "the best leaves a median 78%" in sentences[1]


def test_the_layer_matrix_takes_the_best_stand_in_and_never_the_expert_itself():
    found = alignment(lambda s, t: 0.1 if (s, t) == ((0, 0), (2, 1)) else 0.6, seeds=(0,))
    best, every = layer_matrices(means(found))
    cells = {(row, column): cell for row, line in best.rows for column, cell in zip(best.columns, line, strict=True)}
    assert cells["0", "2"].text == f"{(0.1 + 0.6 + 0.6) / 3:.2f}"
    assert cells["0", "0"].text == "0.60"  # not the self pair's 0.001
    assert every.rows[0][1][1].text == f"{(0.1 + 8 * 0.6) / 9:.2f}"


def test_colours_follow_the_bands_and_what_is_not_measured_is_blank():
    found = alignment(lambda s, t: 1.0 if t == (2, 2) else 0.05, seeds=(0,))
    found = found[~((found["target_layer"] == 2) & (found["target_expert"] == 1) & (found["source_expert"] == 0))]
    across = next(m for m in expert_matrices(means(found)) if m.name == "0 by 2")
    first = across.rows[0][1]
    assert [cell and cell.band for cell in first] == [6, None, 0]


def test_the_tree_joins_what_is_alike_first():
    close = {(0, 0), (2, 1)}
    drawn = tree(means(alignment(lambda s, t: 0.05 if {s, t} == close else 0.8, seeds=(0,))))
    names = [name for _, name in drawn.leaves]
    assert abs(names.index("0.0") - names.index("2.1")) == 1
    assert drawn.whole
    assert len(drawn.joints) == len(EXPERTS) - 1
    left_most = min(x for joint in drawn.joints for x, _ in joint)
    assert left_most < 50  # 0.8 is far from zero, which lies at the right


def test_no_tree_of_two_experts_nor_of_gaps():
    found = means(alignment(seeds=(0,)))
    assert tree(found[(found["source_layer"] == 0) & (found["source_expert"] < 2)]) is None


def test_routing_before_and_after_a_swap():
    routing = pd.DataFrame({"layer": 0, "expert": [0, 1], "share": [0.75, 0.25], "selected": [3, 1], "dropped": 0})
    shifts = pd.DataFrame({
        "swap": "0.0 and 2.1", "layer": 0, "expert": [0, 1], "share_before": [0.75, 0.25], "share_after": [0.5, 0.5],
    })  # fmt: skip
    captured, before, after = routing_matrices(routing, shifts)
    assert [cell.text for cell in captured.rows[0][1]] == ["1.50", "0.50"]
    assert [m.name for m in (before, after)] == ["before", "after 0.0 and 2.1"]
    assert [cell.text for cell in after.rows[0][1]] == ["1.00", "1.00"]
    with pytest.raises(LamellaError, match="share_after"):
        routing_matrices(None, shifts.drop(columns="share_after"))


def test_the_summary_names_the_closest_pair_and_what_raw_error_follows():
    found = alignment(lambda s, t: 0.1 if (s, t) == ((0, 0), (2, 1)) else 0.6, seeds=(0,))
    sentences = summary(found, None, None, None)
    assert "expert 0 of layer 0 by expert 1 of layer 2 (10%)" in sentences[0]
    assert "rank correlation 0.9" in sentences[1] or "rank correlation 1.00" in sentences[1]
    assert summary(None, None, None, None) == ["Nothing was measured yet."]
    one = found[(found["source_layer"] == 0) & (found["source_expert"] == 0)]
    assert summary(one[one["target_layer"] == 2][:1], None, None, None)[1] == "Matrices show the normalised error."


def test_the_summary_tells_what_compression_does_to_every_text():
    rows = [("random", 0.9, text, ratio) for text, ratio in (("news", 1.001), ("talk", 1.077))]
    found = pd.DataFrame(rows, columns=["method", "budget", "domain", "ratio"])
    assert summary(None, None, None, found)[0].endswith("perplexity by: on news random 1.001; on talk random 1.077.")
    assert summary(None, None, None, found[:1])[0].endswith("perplexity by: random 1.001.")


@pytest.mark.parametrize(
    ("effect", "layers", "words"),
    [
        (lambda a, b: 0.1 * (b - a), 6, "grows with the distance of the layers: +0.1000 per layer [+0.1000, +0.1000]"),
        (lambda a, b: 0.1 * (a - b), 6, "shrinks with the distance"),
        (lambda a, b: 0.1 * (a + b), 6, "does not change beyond chance with the distance"),
        (lambda a, b: 0.1 * (b - a), 3, "cannot be told with 3 layers to grow or to shrink with the distance of the "
         "layers: +0.1000 per layer, rank correlation 1.00 (p 0.333)"),
    ],
)  # fmt: skip
def test_the_summary_says_whether_damage_grows_with_distance(effect, layers, words):
    found = swaps(effect, layers)
    assert f"The effect of block, nll {words}" in summary(None, distance_regressions(found), found, None)[0]


def test_a_regression_of_another_version_is_refused():
    noted = {name: {"slope": 0.1, "low": 0.0, "high": 0.2} for name in distance_regressions(swaps())}
    with pytest.raises(LamellaError, match="no intercept: another version"):
        render_similarity(whole_report(distance=noted))


def test_scores_stand_in_the_published_layout():
    page = render_similarity(whole_report(swap=swaps(lambda a, b: 0.1 * a + 0.03 * b)))
    table = page[page.index("Score after a swap of two layers: block, nll; 4.0000 without") :]
    cells = re.findall(r"<bdi>([^<]*)</bdi>", table[: table.index("</table>")])
    assert "4.19" in " ".join(cells)  # of layers 1 and 3
    assert cells.count(next(cell for cell in cells if cell.startswith("4.19"))) == 2


def swaps(effect=lambda a, b: 0.1 * (b - a), layers=4):
    rows = [(a, b, effect(a, b)) for a in range(layers) for b in range(a + 1, layers)]
    return pd.DataFrame([{
        "unit": "block", "first_layer": a, "first_expert": -1, "second_layer": b, "second_expert": -1,
        "exchange": True, "aligned": False, "seed": 0, "baseline": 4.0, "value": 4.0 + effect,
        "distance": float(b - a), "metric": "nll", "effect": effect, "low": effect - 0.05, "high": effect + 0.05,
    } for a, b, effect in rows])  # fmt: skip


def compression():
    return pd.DataFrame([{
        "method": method, "budget": budget, "domain": "news", "experts_left": 4, "parameters": 10, "perplexity": 11.0,
        "baseline": 10.0, "ratio": 1.1, "low": 1.05, "high": 1.15,
    } for method in ("similarity", "random") for budget in (1.0, 0.75, 0.5)])  # fmt: skip


def whole_report(**changes):
    parts = {
        "title": "Experts of <tiny>",
        "routing": pd.DataFrame({"layer": 0, "expert": [0, 1], "share": [0.7, 0.3], "selected": [7, 3], "dropped": 0}),
        "screen": pd.DataFrame({"floor": [0.1]}),
        "alignment": alignment(),
        "controls": {"Controls": pd.DataFrame({"control": ["self"], "nmse": [0.001]})},
        "swap": swaps(),
        "distance": distance_regressions(swaps()),
        "compression": compression(),
        "rerouting": compression().rename(columns={"method": "how"}).assign(what="dropped", reach="own layer"),
        "histogram": pd.DataFrame({"layer": [0, 0], "side": "input", "norm": [1.0, 2.0], "share": [0.4, 0.6]}),
        "plane": pd.DataFrame({"layer": [0, 1], "expert": 0, "side": "output", "x": [0.1, 0.2], "y": [0.3, 0.4]}),
        "settings": {"capture": {"seed": 0}},
        "notes": ["layer 0, expert 2 never fired"],
    }
    return SimilarityReport(**{**parts, **changes})


def test_the_page_has_every_section_loads_nothing_and_escapes(tmp_path):
    path = tmp_path / "report.html"
    write_similarity(whole_report(), path)
    page = path.read_text(encoding="utf-8")
    for name in ("layers", "experts", "controls", "clusters", "routing", "distributions", "swaps", "compression",
                 "rerouting", "settings", "notes"):  # fmt: skip
        assert f'<h2 id="{name}">' in page
    assert "Experts of &lt;tiny&gt;" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "Not run" not in page
    numbers = re.findall(r'(?:x1|x2|cx|cy|y1|y2)="(-?[\d.]+)%', page)
    assert numbers
    assert all(-1 <= float(number) <= 101 for number in numbers)


def test_steps_that_were_not_run_are_named_and_leave_no_section():
    page = render_similarity(SimilarityReport("empty", alignment=alignment()))
    assert "Not run: screen, swap, compression, rerouting." in page
    assert 'id="swaps"' not in page


def test_a_table_without_its_columns_is_named():
    with pytest.raises(LamellaError, match="nmse"):
        render_similarity(whole_report(alignment=alignment().drop(columns="nmse")))
    with pytest.raises(LamellaError, match="distance"):
        render_similarity(whole_report(swap=swaps().drop(columns="distance")))


def test_many_experts_are_shown_as_colours_alone():
    rng = np.random.default_rng(0)
    names = [(0, e) for e in range(20)]
    frame = pd.DataFrame([{
        "source_layer": 0, "source_expert": s, "target_layer": 0, "target_expert": t, "aligner": "linear",
        "kind": "self" if s == t else "pair", "seed": 0, "nmse": rng.uniform(), "mse": 1.0, "source_variance": 1.0,
        "over_mean": -1.0, "over_identity": -1.0, "over_random": -1.0,
    } for _, s in names for _, t in names])  # fmt: skip
    (matrix,) = expert_matrices(means(frame))
    assert matrix.dense
    page = render_similarity(SimilarityReport("many", alignment=frame))
    assert 'class="heat dense"' in page
