import pytest

from benchmarks.tables import render


def test_every_number_of_loras_is_a_case_with_all_methods(record):
    cases = record("mole").cases
    assert [case.name for case in cases] == ["K=2", "K=5"]
    for case in cases:
        names = ["frozen", "loop, by token", "mole, by token", "loop, one weight", "mole, one weight"]
        assert [method.name for method in case.methods] == names
        assert max(case.equality.output, case.equality.gradient) < 1e-12
        assert case.equality.tensors == 4  # x and the weights, by token and one


def test_the_loop_keeps_the_input_and_lamella_the_rank_space(record):
    case = record("mole").cases[0]
    assert case.method("loop, by token").kept_mb == pytest.approx(32 * 16 * 4 / 1e6)
    assert case.method("mole, by token").kept_mb == pytest.approx(32 * 2 * 2 * 4 / 1e6)


def test_the_record_stands_as_tables(record):
    page = render(record("mole"))
    assert "one layer of 16, r=2, 32 tokens" in page
    assert "| K=5: loop / mole, by token |" in page
    assert "| K=5: peak memory, mole, one weight / the same at K=2 |" in page
