"""A model that accelerate has spread over devices, or whose weights it keeps elsewhere, says what it said before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel
from tests import tiny
from torch import Tensor, nn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"router_scope": "per-layer", "top_k": 2},
    {"router_scope": "per-layer", "router": "cosine", "router_proj": 5},
    {"alpha_mode": "learned", "alpha_scope": "per-layer"},
    {"policy": "random", "alpha_mode": "learned"},
]


def on_disk(model: PeftModel, folder: Path) -> None:
    """Two of four blocks lie on disk; that of the shared router and alpha among them."""
    stays = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places = stays | {f"model.layers.{layer}": ("disk", "cpu")[layer % 2] for layer in range(4)}
    places = {f"base_model.model.{name}": place for name, place in places.items()}
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def in_memory(model: PeftModel, folder: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def said(model: PeftModel) -> tuple[Tensor, Tensor]:
    given = tiny.inputs(tiny.llama())
    with torch.no_grad():
        return model(**given).logits, model.generate(**given, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize(
    ("offload", "options"),
    [(on_disk, OPTIONS[0]), (on_disk, OPTIONS[2]), (in_memory, OPTIONS[1]), (in_memory, OPTIONS[3])],
)
def test_offloaded_weights_come_in_for_guests_routers_and_alphas(
    offload: Callable[[PeftModel, Path], None], options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.molex(tiny.llama(layers=4), **options)
    expected = said(model)
    offload(model, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    actual = said(model)
    torch.testing.assert_close(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert all(alpha == pytest.approx(0.5) for alpha in model.base_model.alphas().values())
    assert any(p.is_meta for p in model.parameters()), "what came in went out again"


def test_a_guest_runs_with_the_hooks_of_its_own() -> None:
    model = tiny.molex(tiny.llama(layers=4), policy="fixed", fixed_layer=2)
    calls: list[str] = []

    class Counts(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            calls.append("before")
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            calls.append("after")
            return output

    add_hook_to_module(tiny.blocks(model)[2].base_layer, Counts())
    with torch.no_grad():
        model(**tiny.inputs(model.get_base_model()))
    assert calls == ["before", "after"] * 4  # once for itself, once as the guest of each other block


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_blocks_on_two_devices_mix(options: dict[str, Any]) -> None:
    model = tiny.molex(tiny.llama(layers=4), **options)
    expected = said(model)
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    places |= {f"model.layers.{layer}": (0, "cpu")[layer % 2] for layer in range(4)}
    places = {f"base_model.model.{name}": place for name, place in places.items()}
    dispatch_model(model, places, main_device=0, force_hooks=True)
    actual = said(model)
    torch.testing.assert_close(actual[0].cpu(), expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(actual[1].cpu(), expected[1])
