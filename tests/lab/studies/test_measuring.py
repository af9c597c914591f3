import gc

import pytest
import torch

from lamella.lab.studies.measuring import clock_for, kept_megabytes, ratio, time_rounds, using_threads


def test_every_round_runs_every_method_and_starts_with_another():
    ran = []
    steps = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    seconds = time_rounds(steps, rounds=4, clock="process CPU time")
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_what_was_frozen_before_stays_frozen():
    gc.freeze()
    before = gc.get_freeze_count()
    time_rounds({"a": list}, rounds=1, clock="process CPU time")
    assert gc.get_freeze_count() == before


def test_a_ratio_is_the_median_within_rounds():
    seconds = {"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 2.0]}
    measured = ratio(seconds, "a", "b")
    assert (measured.method, measured.over, measured.median, measured.minima) == ("a", "b", 3.0, 2.0)
    assert measured.quartiles == (2.5, 3.5)


@pytest.mark.parametrize(
    ("threads", "device", "clock"),
    [
        (1, "cpu", "process CPU time"),
        (2, "cpu", "wall time"),
        (1, "cuda", "wall time, device synchronised"),
    ],
)
def test_the_clock_fits_what_runs(threads, device, clock):
    assert clock_for(threads, device) == clock


def test_threads_are_put_back_also_after_an_error():
    before = torch.get_num_threads()
    seen = []

    def fail():
        with using_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_each_saved_storage_counts_once_and_given_ones_not_at_all():
    weight = torch.randn(50, 50, requires_grad=True)
    x = torch.randn(100, 50)

    def forward():
        h = x @ weight  # keeps x and weight, both given
        activated = h.exp()  # keeps its result
        return (activated * activated.view(50, 100).view(100, 50)).sum()  # keeps it again, twice

    assert kept_megabytes(forward, [weight, x]) == 100 * 50 * 4 / 1e6


def test_without_gradients_nothing_is_kept():
    x = torch.randn(10, 10)
    assert kept_megabytes(lambda: x.exp().sum(), [x]) == 0
