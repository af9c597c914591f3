"""One learning rate teaches routers of every width: three LoRAs that permute symbols, put in place by hand."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tuners.mole.trained import routers_of
from torch import Tensor, nn

import lamella
from lamella import MoleConfig, compose

SYMBOLS, LORAS, LENGTH = 8, 3, 4
PERMUTATIONS = torch.stack([torch.arange(SYMBOLS).roll(k + 1) for k in range(LORAS)])
MARKER = torch.arange(LORAS) + SYMBOLS  # tells which LoRA a sequence needs


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Copying(nn.Module):
    """Says the symbol that it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.directions = torch.linalg.qr(torch.randn(width, SYMBOLS + LORAS)).Q.t().contiguous()  # orthonormal rows
        self.embed = nn.Embedding.from_pretrained(self.directions * width**0.5)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, SYMBOLS, bias=False)
        self.head.weight.data = self.directions[:SYMBOLS].clone()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def permuting(width: int, index: int, folder: Path) -> Path:
    """A LoRA that turns each symbol into its image, and its own marker into a direction of its own."""
    plain = Copying(width)
    known = plain.directions[[*range(SYMBOLS), SYMBOLS + index]]
    torch.manual_seed(index)
    wanted = torch.cat([plain.directions[PERMUTATIONS[index]], torch.randn(1, width) / width**0.5])
    adapted = get_peft_model(plain, LoraConfig(r=len(known), lora_alpha=len(known), target_modules=["layers.0.proj"]))
    layer = plain.layers[0].proj
    layer.lora_A["default"].weight.data = known
    layer.lora_B["default"].weight.data = (wanted - known).t().contiguous()
    adapted.save_pretrained(folder / str(index))
    return folder / str(index)


def composed(width: int, folder: Path, **config: object) -> nn.Module:
    return compose(Copying(width), {f"p{k}": permuting(width, k, folder) for k in range(LORAS)}, MoleConfig(**config))


def drawn(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A marker and symbols, which the routers read; the symbols again; and what is to be said of these."""
    task = torch.randint(LORAS, (rows,), generator=generator)
    symbols = torch.randint(SYMBOLS, (rows, LENGTH), generator=generator)
    return torch.cat([MARKER[task][:, None], symbols, symbols], dim=1), PERMUTATIONS[task[:, None], symbols]


def said(model: nn.Module, ids: Tensor) -> Tensor:
    """Scores of the second half, ``(rows, LENGTH, SYMBOLS)``."""
    with lamella.prompt([LENGTH + 1] * len(ids)):
        return model(ids)[:, LENGTH + 1 :]


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_one_rate_teaches_routers_of_every_width(width: int, tmp_path: Path) -> None:
    model = composed(width, tmp_path)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(50):
        ids, wanted = drawn(32, generator)
        loss = nn.functional.cross_entropy(said(model, ids).flatten(0, 1), wanted.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, wanted = drawn(200, generator)
    with torch.no_grad():
        right = (said(model, ids).argmax(dim=-1) == wanted).all(dim=1)
    assert float(right.float().mean()) >= 0.9


def test_a_step_of_adam_moves_the_weights_alike_at_every_width(tmp_path: Path) -> None:
    def largest(width: int, scale: float | None) -> float:
        model = composed(width, tmp_path / f"{width} {scale}", router_scale=scale, balance="none")
        ids, wanted = drawn(32, torch.Generator().manual_seed(0))
        nn.functional.cross_entropy(said(model, ids).flatten(0, 1), wanted.flatten()).backward()
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-4).step()
        (router,) = routers_of(model).values()
        decided: list[Tensor] = []
        hook = router.register_forward_hook(lambda _, given, logits: decided.append(logits.softmax(dim=-1)))
        with torch.no_grad():
            said(model, ids)
        hook.remove()
        return float(decided[0].max(dim=-1).values.mean())

    moved = [largest(width, 1000.0) - 1 / LORAS for width in (64, 256, 1024)]
    assert max(moved) < 1.3 * min(moved)
    published = [largest(width, None) - 1 / LORAS for width in (64, 1024)]
    assert published[1] > 3 * published[0]  # as published, a step grows with the width


def test_a_composition_that_an_earlier_version_saved_keeps_what_it_computes(tmp_path: Path) -> None:
    model = composed(64, tmp_path, router_scale=None, init_lora_weights=False)
    ids, _ = drawn(4, torch.Generator().manual_seed(0))
    expected = said(model, ids)
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    written = json.loads(path.read_text())
    del written["router_scale"]
    path.write_text(json.dumps(written | {"lamella_version": "0.2.0.dev1"}))
    again = PeftModel.from_pretrained(Copying(64), str(path.parent))
    assert torch.equal(said(again, ids), expected)
