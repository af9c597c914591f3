import torch

from lamella.lab.bench.memory import kept_megabytes


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
