import pytest
import torch

from benchmarks.equality import compare
from lamella.errors import LamellaError


def tensors(**changes):
    values = {"output": torch.ones(3, 2, dtype=torch.float64), "A": torch.arange(4, dtype=torch.float64)}
    return {**values, **changes}


def test_differences_are_relative_to_the_largest_entry():
    off = torch.tensor([0.0, 1.0, 2.0, 3.0 + 3e-12], dtype=torch.float64)
    equality = compare(tensors(A=off), tensors())
    assert equality.output == 0
    assert equality.gradient == pytest.approx(1e-12, rel=1e-3)
    assert equality.tensors == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"A": torch.tensor([0.0, 1.0, 2.0, 3.00001], dtype=torch.float64)},
        {"A": torch.full((4,), float("nan"), dtype=torch.float64)},
        {"A": torch.arange(4, dtype=torch.float32)},
        {"A": torch.arange(5, dtype=torch.float64)},
        {"B": torch.ones(1, dtype=torch.float64)},
    ],
    ids=["a real difference", "NaN", "float32", "another shape", "another name"],
)
def test_what_differs_is_refused(changed):
    with pytest.raises(LamellaError, match="nothing was timed"):
        compare(tensors(**changed), tensors())
