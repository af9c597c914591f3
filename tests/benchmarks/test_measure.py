import pytest
import torch
from torch import nn

from benchmarks.measure import count_block_runs, count_flops, peak_live_megabytes


def test_a_multiply_add_counts_as_two_operations():
    x, weight = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert count_flops(lambda: (x @ weight).sum().backward()) == 2 * (2 * 3 * 5 * 7)


def test_attention_counts_on_the_cpu_too():
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * (2 * 4) * 16 * 16 * 8

    def attend():
        return nn.functional.scaled_dot_product_attention(q, k, v)

    assert count_flops(attend) == 2 * product
    assert count_flops(lambda: attend().sum().backward()) == (2 + 5) * product  # the scores are recomputed


def test_rows_and_calls_are_counted_per_block_of_the_stack():
    blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = torch.randn(4, 2)

    def forward():
        blocks[0](x)
        blocks[1](x[:1])
        blocks[1](x[1:])

    assert count_block_runs(forward, blocks, batch=4) == (1.0, 1.5)
    assert not any(block._forward_pre_hooks for block in blocks)


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
