"""Trained LoRAs on disk and compositions of them, the same for the same names."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import lamella
from lamella import MoleConfig, compose
from lamella.tuners.mole import MoleLinear
from lamella.tuners.mole.router import MoleRouter

# Three LoRAs of different ranks, scalings and targets for each family.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["query", "dense"], "use_rslora": True},
        {"r": 1, "lora_alpha": 2, "target_modules": ["value", "intermediate.dense"]},
    ],
    "distilbert": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_lin", "v_lin"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["k_lin", "lin1", "lin2"]},
        {"r": 1, "lora_alpha": 2, "target_modules": ["q_lin"]},
    ],
    "llama": [
        {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 3, "target_modules": ["v_proj", "down_proj"]},
        {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]},
    ],
    "gpt2": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "mlp.c_proj"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn"]},
        {"r": 1, "lora_alpha": 2, "target_modules": ["c_fc"]},
    ],
    "t5": [
        {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["k", "wi_0", "wo"]},
        {"r": 1, "lora_alpha": 2, "target_modules": ["q", "o"]},
    ],
}
NAMES = ("news", "code", "law")


def lora(kind: str, folder: Path, index: int, layers: int = 2, **settings: Any) -> Path:
    """A LoRA that does something, saved by PEFT; made once."""
    path = folder / f"{kind}-{NAMES[index]}"
    if not path.exists():
        torch.manual_seed(100 + index)
        config = {**SETTINGS[kind][index], **settings}
        model = tiny.build(kind, layers=layers)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, fan_in_fan_out=kind == "gpt2", **config))
        adapted.save_pretrained(path)
    return path


def loras(kind: str, folder: Path, count: int = 3, layers: int = 2) -> dict[str, Path]:
    """Several by name."""
    return {NAMES[i]: lora(kind, folder, i, layers) for i in range(count)}


@functools.cache
def _random(rank: int) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=["query", "value"])
    return get_peft_model(tiny.bert(), config)


def random_lora(folder: Path, index: int, rank: int = 4) -> Path:
    """One of many LoRAs of one kind for BERT, each another, written without training."""
    path, adapted = folder / f"random-{index}", _random(rank)
    generator = torch.Generator().manual_seed(1000 + index)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(path)
    return path


def composition(
    kind: str, folder: Path, layers: int = 2, double: bool = True, sharp: bool = True, **config: Any
) -> PeftModel:
    """Three LoRAs composed, routers off zero unless told otherwise, ready to be asked."""
    model = tiny.build(kind, layers=layers)
    return composed(model.double() if double else model, kind, folder, layers, sharp, **config)


def composed(
    base: PreTrainedModel, kind: str, folder: Path, layers: int = 2, sharp: bool = True, **config: Any
) -> PeftModel:
    """The same on a base of that kind."""
    torch.manual_seed(17)
    model = compose(base, loras(kind, folder, layers=layers), MoleConfig(**{"balance": "none", **config}))
    if sharp:
        sharpen(model)
    return model.eval()


def sharpen(model: nn.Module, scale: float = 1.0) -> None:
    """Routers that weigh different inputs differently."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for router in [module for module in model.modules() if isinstance(module, MoleRouter)]:
            for name, parameter in router.named_parameters():
                numbers = parameter[0].numel() if name == "e" else 1
                size = scale * numbers / router.scale if name == "e" else 0.5
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(size * drawn / numbers**0.5)


def alone(kind: str, path: Path, layers: int = 2, double: bool = True) -> PeftModel:
    """One LoRA by itself, as PEFT runs it."""
    model = tiny.build(kind, layers=layers)
    return PeftModel.from_pretrained(model.double() if double else model, path).eval()


def layers_of(model: nn.Module) -> dict[str, MoleLinear]:
    """The composed modules by name."""
    return {module.name: module for module in model.modules() if isinstance(module, MoleLinear)}


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers by the name of their unit."""
    units = {layer.groups["default"] for layer in layers_of(model).values()}
    return {unit.name: unit.router for unit in units}


def one_hot(model: nn.Module, index: int, count: int = 3) -> None:
    """Routers that give everything to one LoRA, by their bias alone."""
    with torch.no_grad():
        for router in routers_of(model).values():
            router.e.zero_() if router.e is not None else None
            router.bias.copy_(torch.full((count,), -1e5).index_fill(0, torch.tensor(index), 1e5))


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits, on a decoder of a sequence that is given as a whole."""
    ids = given.get("decoder_input_ids")
    lengths = given["attention_mask"].sum(dim=1) if ids is None else torch.full((len(ids),), ids.shape[1])
    with torch.no_grad(), lamella.prompt(lengths):
        return model(**given).logits


def deltas(
    model: nn.Module, kind: str, folder: Path, layers: int = 2
) -> dict[str, list[tuple[Tensor, Tensor, float] | None]]:
    """The LoRAs of every module as PEFT has them: A, B and scaling, in float64."""
    actual: dict[str, list[tuple[Tensor, Tensor, float] | None]] = {}
    for index, path in enumerate(loras(kind, folder, layers=layers).values()):
        adapted = alone(kind, path, layers)
        for name, module in adapted.get_base_model().named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                entry = actual.setdefault(name, [None, None, None])
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                entry[index] = (A.detach().double(), B.detach().double(), module.scaling["default"])
    return actual


def weights_seen(model: nn.Module, given: dict[str, Tensor]) -> dict[tuple[str, int, str], Tensor]:
    """Each unit's weights ``(rows, K)`` in one forward, in the order of the LoRAs."""
    with tiny.watch(model) as seen:
        run(model, given)
    return {(place.stack, place.layer, place.module): routing.dense_weights() for place, routing, _ in seen}


def names_in(prefix: str, modules: Sequence[str]) -> list[str]:
    """Full names."""
    return [f"{prefix}.{module}" for module in modules]
