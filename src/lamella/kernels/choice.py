"""Which form is faster where."""

from typing import Literal

Form = Literal["dense", "sorted"]

# Measured on CPU (`python -m benchmarks forms`): the dense form computes all E experts in two skinny GEMMs, the sorted
# form only the k chosen ones in 2 E smaller ones; they cross where the experts' ranks together pass 165 (width 768) to
# 185 (width 2048) columns.
SORTED_ABOVE = 160


def choose_form(num_experts: int, r: int, top_k: int) -> Form:
    """The faster form for E experts of rank r with k used per token."""
    return "sorted" if num_experts * r > SORTED_ABOVE and 2 * top_k <= num_experts else "dense"
