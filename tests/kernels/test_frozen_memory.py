"""What the frozen forms keep for the backward pass does not depend on the number of LoRAs, and is never x."""

import pytest
import torch
from torch import Tensor, nn

from lamella.kernels import FrozenLoras, concatenate, forward_frozen, read_outputs

WIDTH, RANKS_TOGETHER = 32, 16


def kept(
    num_loras: int, tokens: int, per: str, x_needs_gradient: bool = True
) -> tuple[dict[int, int], Tensor, FrozenLoras]:
    """Bytes of each storage saved by one layer with K LoRAs whose ranks add up to the same R."""
    torch.manual_seed(0)
    rank = RANKS_TOGETHER // num_loras
    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    pairs = [(torch.randn(rank, WIDTH), torch.randn(WIDTH, rank), 2.0) for _ in range(num_loras)]
    loras = concatenate(pairs, torch.float32)
    x = torch.randn(1, tokens, WIDTH, requires_grad=x_needs_gradient)
    lead = (1, tokens) if per == "token" else ()
    weights = torch.rand(*lead, num_loras).requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.bias, weights, *loras[:2])}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward_frozen(layer, (layer.weight, layer.bias), x, weights, loras)
    assert y.shape == (1, tokens, WIDTH)
    return seen, x, loras


@pytest.mark.parametrize("per", ["token", "call"])
def test_bytes_kept_do_not_grow_with_the_number_of_loras(per: str) -> None:
    sizes = {k: sum(kept(k, 256, per)[0].values()) for k in (1, 2, 8, 16)}
    assert len(set(sizes.values())) == 1, sizes


def test_weights_per_token_keep_the_rank_space_alone() -> None:
    seen, x, _ = kept(8, 256, "token")
    assert x.untyped_storage().data_ptr() not in seen
    assert sum(seen.values()) == 4 * 256 * RANKS_TOGETHER


def test_the_merged_form_keeps_the_rank_space_and_one_matrix() -> None:
    seen, x, _ = kept(8, 256, "call")
    assert x.untyped_storage().data_ptr() not in seen
    assert sum(seen.values()) == 4 * (256 * RANKS_TOGETHER + WIDTH * WIDTH)


def test_the_matrix_is_not_kept_where_the_input_needs_no_gradient() -> None:
    seen, _, _ = kept(8, 256, "call", x_needs_gradient=False)
    assert sum(seen.values()) == 4 * 256 * RANKS_TOGETHER


def test_no_product_of_the_backward_pass_has_an_output_per_lora() -> None:
    num_loras, tokens = 16, 64
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    pairs = [(torch.randn(1, WIDTH), torch.randn(WIDTH, 1), 2.0) for _ in range(num_loras)]
    loras = concatenate(pairs, torch.float32)
    x = torch.randn(1, tokens, WIDTH, requires_grad=True)
    weights = torch.rand(1, tokens, num_loras).requires_grad_()
    largest = _Outputs()
    with largest:
        forward_frozen(layer, (layer.weight, layer.bias), x, weights, loras).sum().backward()
    assert largest.numel == tokens * WIDTH  # y itself


def test_loras_of_unequal_ranks_do_not_each_cost_a_gradient_of_the_whole_router() -> None:
    def whole_ones(ranks: list[int]) -> int:
        pairs = [(torch.randn(rank, WIDTH), torch.randn(WIDTH, rank), 2.0) for rank in ranks]
        loras = concatenate(pairs, torch.float32)
        e = torch.zeros(len(ranks), len(ranks), WIDTH, requires_grad=True)
        outputs = _Outputs()
        with outputs:
            read_outputs([torch.randn(1, len(loras.A))], [loras], e).sum().backward()
        return outputs.sizes.count(e.numel())

    assert whole_ones([1, 2] * 8) <= whole_ones([1] * 8 + [2] * 8)


class _Outputs(torch.utils._python_dispatch.TorchDispatchMode):
    """How large every tensor is that an operation returns, forwards or backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    @property
    def numel(self) -> int:
        return max(self.sizes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.sizes.append(tensor.numel())
        return result
