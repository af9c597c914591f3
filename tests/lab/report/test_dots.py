import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from lamella.lab.report.dots import dot_plots


def test_marks_carry_mean_seeds_interval_and_words(results):
    (plot,) = dot_plots(results)
    floor, lora, mola, unrun = plot.marks
    assert plot.title == "trec · accuracy"
    assert plot.floor == (floor.mean, "0.746")
    assert lora.seeds[0] < lora.mean < lora.seeds[1] < mola.seeds[1]
    assert lora.interval[0] < lora.seeds[0] < lora.seeds[1] < lora.interval[1]
    assert lora.words == "LoRA: mean 0.874, seed 0 0.870, seed 1 0.878, interval 0.851 to 0.897"
    assert (unrun.mean, unrun.seeds, unrun.interval, unrun.value) == (None, (), None, "not run")


def test_each_task_and_metric_has_its_own_axis(results):
    other = results.assign(task="movies", metric="perplexity", mean=[900.0, 30.0, 20.0, 10.0])
    assert [plot.title for plot in dot_plots(pd.concat([results, other]))] == ["trec · accuracy", "movies · perplexity"]


def test_no_mean_no_plot(results):
    assert dot_plots(results.drop(columns="mean")) == ()
    assert dot_plots(results.assign(mean=None)) == ()
    assert dot_plots(results.head(0)) == ()


def test_only_a_method_named_floor_is_the_floor(results):
    (plot,) = dot_plots(results.assign(method=["TF-IDF", "flooring", "MoLA", "full"]))
    assert plot.floor is None


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=6))
def test_places_keep_the_order_of_the_means_and_stay_inside(means):
    names = [str(number) for number in range(len(means))]
    (plot,) = dot_plots(pd.DataFrame({"method": names, "mean": means}))
    places = [mark.mean for mark in plot.marks]
    assert all(0 < place < 100 for place in places + [place for place, _ in plot.ticks])
    assert 2 <= len(plot.ticks) <= 8
    by_mean = [place for _, place in sorted(zip(means, places, strict=True))]
    assert by_mean == sorted(by_mean)
