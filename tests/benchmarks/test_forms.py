import torch

from benchmarks.forms import Mixed
from benchmarks.tables import render


def test_each_layer_is_a_case_with_all_forms(record):
    cases = record("forms").cases
    assert [case.name for case in cases] == ["d=16, E=2", "d=16, E=4"]
    for case in cases:
        assert [method.name for method in case.methods] == ["frozen", "dense", "sorted", "lora"]
        assert max(case.equality.output, case.equality.gradient) < 1e-12
        assert case.equality.tensors == 4  # A, B, router and x
    assert "| d=16, E=4 |" in render(record("forms"))


def test_lora_has_the_rank_of_all_experts_together(record):
    case = record("forms").cases[1]
    assert case.method("lora").trainable_parameters == 4 * 8 * (16 + 16)
    assert case.method("dense").trainable_parameters == 4 * 8 * (16 + 16) + 4 * 16


def test_both_forms_of_a_layer_agree():
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 8).double()
    dense, by_token = (Mixed(base, 4, 2, 2, form).double() for form in ("dense", "sorted"))
    by_token.load_state_dict(dense.state_dict())
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(dense(x), by_token(x))
