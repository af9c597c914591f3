"""In every family a guest is given what the block in whose place it runs is given."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from torch import Tensor

from lamella.tuners.molex import MolexBlock

Call = tuple[MolexBlock, tuple[Any, ...], dict[str, Any], Any]


def calls_of(model: PeftModel) -> list[Call]:
    """Each wrapped block with what it was given and what it returned in one forward."""
    calls: list[Call] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((module, args, kwargs, output)), with_kwargs=True
        )
        for block in tiny.blocks(model)
    ]
    with torch.no_grad():
        model(**tiny.inputs(model.get_base_model()), use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize(
    ("name", "tau"), [*((name, 2) for name in tiny.FAMILIES), *((name, 0) for name in ("bert", "gemma2", "t5"))]
)
def test_a_guest_computes_what_it_would_in_its_hosts_place(name: str, tau: int) -> None:
    model = tiny.molex(tiny.build(name), policy="fixed", fixed_layer=tau, alpha=0.25)
    mixed = 0
    for block, args, kwargs, output in calls_of(model):
        with torch.no_grad():
            own = block.base_layer(*args, **kwargs)
            if not block.mixtures["default"].depth.mixes:
                assert torch.equal(first(output), first(own))
                continue
            if name == "t5" and block.place.layer == 0:  # (h, mask, position_bias, encoder states, their mask, bias)
                assert args[2] is None
                assert own[1].any(), "the first block makes the bias of all"
                args = (*args[:2], own[1], *args[3:5], own[2])
            guest = block.blocks[tau](*args, **kwargs)
        expected = 0.25 * first(own) + 0.75 * first(guest)
        if block.decoder:  # no prompt is known, so the first tokens run without
            expected = torch.cat([first(own)[:, :4], expected[:, 4:]], dim=1)
        torch.testing.assert_close(first(output), expected)
        assert not torch.allclose(first(own), expected)
        mixed += 1
    assert mixed == {"gemma2": 1, "gemma3": 1, "t5": 6}.get(name, 3)


@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_t5s_first_block_as_a_guest_takes_the_bias_it_is_given(stack: str) -> None:
    model = tiny.molex(tiny.t5(layers=4), policy="fixed", fixed_layer=0)
    (call,) = [call for call in calls_of(model) if call[0].name == f"{stack}.2"]
    block, args, kwargs, output = call
    without = (*args[:2], torch.zeros_like(args[2]), *args[3:])
    with torch.no_grad():
        assert not torch.allclose(first(block(*without, **kwargs)), first(output))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_sequence_has_its_own_guest(name: str) -> None:
    model = tiny.molex(tiny.build(name))
    with tiny.watch(model) as seen:
        calls = calls_of(model)
    subsets = 0
    for (block, args, kwargs, output), (place, routing, _) in zip(calls, seen, strict=True):
        assert block.place is place
        with torch.no_grad():
            own = block.base_layer(*args, **kwargs)
            if name == "t5" and place.layer == 0:
                args = (*args[:2], own[1], *args[3:5], own[2])
            guests = [first(other(*args, **kwargs)) for other in block.blocks if alike(block, other)]
        at = [index for index, other in enumerate(block.blocks) if alike(block, other)]
        for row, tau in enumerate(routing.indices[:, 0].tolist()):
            mix = 0.5 * first(own)[row] + 0.5 * guests[at.index(tau)][row]
            if block.decoder:
                mix = torch.cat([first(own)[row, :4], mix[4:]])
            torch.testing.assert_close(first(output)[row], mix, rtol=1e-4, atol=1e-5)
        subsets += len(set(routing.indices[:, 0].tolist())) > 1
    assert subsets, "all sequences chose alike"


def alike(block: MolexBlock, other: torch.nn.Module) -> bool:
    candidates = block.mixtures["default"].depth.candidates
    return any(block.blocks[index] is other for index in candidates)
