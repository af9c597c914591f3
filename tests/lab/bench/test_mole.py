import pytest
import torch

from lamella.lab.bench import MoleSettings, bench_mole, render_result
from lamella.lab.bench.memory import peak_live_megabytes

TINY = MoleSettings(rounds=2, tokens=32, width=16, num_loras=(2, 5), r=2)


@pytest.fixture(scope="module")
def result():
    return bench_mole(TINY)


def test_every_number_of_loras_is_a_case_with_all_arms(result):
    assert [case.name for case in result.cases] == ["K=2", "K=5"]
    for case in result.cases:
        names = ["frozen", "loop, by token", "mole, by token", "loop, one weight", "mole, one weight"]
        assert [arm.name for arm in case.arms] == names
        assert max(case.equality.output, case.equality.gradient) < 1e-12
        assert case.equality.tensors == 4  # x and the weights, by token and one


def test_the_loop_keeps_the_input_and_ours_the_rank_space(result):
    case = result.cases[0]
    assert case.arm("loop, by token").kept_mb == pytest.approx(32 * 16 * 4 / 1e6)
    assert case.arm("mole, by token").kept_mb == pytest.approx(32 * 2 * 2 * 4 / 1e6)


def test_the_record_stands_as_tables(result):
    page = render_result(result)
    assert "one layer of 16, r=2, 32 tokens" in page
    assert "| K=5: loop / mole, by token |" in page
    assert "| K=5: peak memory, mole, one weight / the same at K=2 |" in page


def test_the_peak_is_what_lives_at_once_and_was_not_there_before():
    x = torch.zeros(1000, 1000)  # 4 MB

    def step():
        once = x + 1
        twice = once + 1
        del once
        del twice
        return x + 1

    assert peak_live_megabytes(step) == pytest.approx(8.0)
    assert peak_live_megabytes(lambda: x.add_(1)) == 0
