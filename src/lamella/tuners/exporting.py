"""A mixture as plain LoRAs: one LoRA in its place with a measured error, or each expert by itself."""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor

from lamella.errors import LamellaError
from lamella.routing import Routing
from lamella.routing.context import find_tracker
from lamella.tuners.mola.layer import MolaLinear
from lamella.tuners.molex.block import MolexBlock

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Collapsed:
    """One plain LoRA in place of a mixture.

    Attributes:
        model: a PeftModel with a LoraConfig, on a copy of the base.
        error: how much of the mixture's effect on the model's output is lost: the norm of (collapsed - mixture) over
            the norm of (mixture - the same model without experts), over the real tokens of the measured batches; 0 is
            exact.
        per_module: the same for each module's own output, by module name.
        held_out: whether the error was measured on batches that were not fitted (there were at least four).
    """

    model: PeftModel
    error: float
    per_module: dict[str, float]
    held_out: bool


class _Moments:
    """Second moments of one module's rank space: u = g * h is what the mixture uses, h what a LoRA can see."""

    def __init__(self, size: int) -> None:
        self.hh = torch.zeros(size, size, dtype=torch.float64)
        self.uh = torch.zeros(size, size, dtype=torch.float64)
        self.uu = torch.zeros(size, size, dtype=torch.float64)

    def add(self, h: Tensor, u: Tensor) -> None:
        h, u = h.double().cpu(), u.double().cpu()  # (N, E*r)
        self.hh += h.t() @ h
        self.uh += u.t() @ h
        self.uu += u.t() @ u

    def map(self) -> Tensor:
        """T with ``u ~ T h`` by least squares, ``(E*r, E*r)``; the ridge only settles directions never seen."""
        ridge = 1e-9 * self.hh.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        regularised = self.hh + ridge * torch.eye(len(self.hh), dtype=torch.float64)
        return torch.linalg.solve(regularised, self.uh.t()).t()

    def lost(self, T: Tensor, B: Tensor) -> tuple[float, float]:
        """Squared norms of ``B (u - T h)`` and of ``B u``, for ``B (out, E*r)``."""
        gram = B.t() @ B
        residual = self.uu - T @ self.uh.t() - self.uh @ T.t() + T @ self.hh @ T.t()
        return float((gram * residual).sum().clamp_min(0)), float((gram * self.uu).sum())


@torch.no_grad()
def collapse(model: PeftModel, batches: Iterable[Batch], rank: int | None = None) -> Collapsed:
    """Fits one plain LoRA to a MoLA adapter on a user's own data.

    In each module the mixture adds ``B (g(x) * A x)``. The LoRA adds ``B T A x`` with T fitted by least squares on the
    batches, in rank space; where the weights g are constant it is exact. The model given is not changed.

    Args:
        model: a PeftModel with an active MoLA adapter.
        batches: keyword arguments for the model, such as ``input_ids`` and ``attention_mask``.
        rank: rank of every module's LoRA, by truncated SVD; None keeps a module's E*r.

    Returns:
        The LoRA as a PeftModel of its own, with its measured error.

    Raises:
        LamellaError: no MoLA adapter, or no batches.
    """
    adapter, layers = _mola_layers(model)
    held = [dict(batch) for batch in batches]
    if not held:
        raise LamellaError("collapse needs at least one batch to see which experts the data uses.")
    held_out = len(held) >= 4
    measured = held[3::4] if held_out else held
    fitted = [batch for i, batch in enumerate(held) if i % 4 != 3] if held_out else held
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        fit = _moments(model, adapter, layers, fitted)
        test = _moments(model, adapter, layers, measured) if held_out else fit
        factors, per_module = {}, {}
        for name, layer in layers.items():
            A, B = _stacked(layer, adapter)  # (E*r, in), (out, E*r), scaling inside B
            T = fit[name].map()
            lost, whole = test[name].lost(T, B)
            down, up = _truncate(T @ A, B, rank)
            if rank is not None:
                lost = _lost_after_truncation(test[name], A, B, down, up)
            factors[name] = (down, up)
            per_module[name] = math.sqrt(lost / whole) if whole > 0 else 0.0
        collapsed = _as_lora(model, adapter, factors)
        error = _output_error(model, list(layers.values()), collapsed, measured)
    finally:
        for module in training:
            module.training = True
    return Collapsed(collapsed, error, per_module, held_out)


def export_experts(model: PeftModel, folder: str | Path) -> list[Path]:
    """Saves expert e of every block that has one as a plain PEFT LoRA, ``folder/expert_e``.

    The experts' LoRAs act at full weight: their sum weighted by the routers is the mixture. Trained modules outside the
    blocks, such as a classifier, are saved with each.

    Raises:
        LamellaError: no MoLA adapter, or the folder already holds experts.
    """
    adapter, layers = _mola_layers(model)
    folder = Path(folder)
    if any(folder.glob("expert_*")):
        raise LamellaError(f"{folder} already holds exported experts; choose another folder or remove them.")
    config = model.peft_config[adapter]
    saved = _modules_to_save(model, adapter)
    paths = []
    for expert in range(max(layer.experts[adapter].num_experts for layer in layers.values())):
        having = {name: layer for name, layer in layers.items() if layer.experts[adapter].num_experts > expert}
        tensors = {
            f"base_model.model.{module}.{key}": value for module, state in saved.items() for key, value in state.items()
        }
        for name, layer in having.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lamella_mola_lora_A[adapter][expert]
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lamella_mola_lora_B[adapter][expert]
        lora = LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, target_modules=sorted(having),
            task_type=config.task_type, modules_to_save=sorted(saved) or None, inference_mode=True,
            base_model_name_or_path=config.base_model_name_or_path, revision=config.revision,
        )  # fmt: skip
        path = folder / f"expert_{expert}"
        path.mkdir(parents=True)
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, path / "adapter_model.safetensors", metadata={"format": "pt"})
        lora.save_pretrained(str(path))
        paths.append(path)
    return paths


def _mola_layers(model: PeftModel) -> tuple[str, dict[str, MolaLinear]]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in base.named_modules() if isinstance(module, MolaLinear)}
    if any(isinstance(module, MolexBlock) for module in base.modules()):
        raise LamellaError(
            "MoLEx lets each sequence choose the blocks it runs through, so neither one plain LoRA nor one per expert "
            "does the same: lamella.collapse and lamella.export_experts are for MoLA. Serve it with PEFT as it is, or "
            "train with policy='self', which is plain LoRA."
        )
    if not layers or not isinstance(model, PeftModel):
        raise LamellaError(
            f"{type(model).__name__} is no PeftModel with a MoLA adapter; there are no experts to export."
        )
    adapter = model.active_adapters[0] if len(model.active_adapters) == 1 else None
    if adapter is None:
        raise LamellaError(
            f"{len(model.active_adapters)} adapters are active ({', '.join(model.active_adapters)}); activate one with "
            "set_adapter first."
        )
    return adapter, {name: layer for name, layer in layers.items() if adapter in layer.experts}


def _stacked(layer: MolaLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """All experts of a module as one wide LoRA: ``(E*r, in)`` and ``(out, E*r)`` with the scaling, in float64."""
    A = layer.lamella_mola_lora_A[adapter].double().cpu().flatten(0, 1)
    B = layer.lamella_mola_lora_B[adapter].double().cpu().transpose(1, 2).flatten(0, 1).t()
    return A, layer.experts[adapter].scaling * B


def _moments(
    model: PeftModel, adapter: str, layers: dict[str, MolaLinear], batches: list[dict[str, Any]]
) -> dict[str, _Moments]:
    """What each module's rank space sees on the batches: its inputs by a hook, its weights as an observer."""
    names = {id(layer): name for name, layer in layers.items()}
    moments = {
        name: _Moments(layer.experts[adapter].num_experts * layer.experts[adapter].r) for name, layer in layers.items()
    }
    routings: dict[int, tuple[Routing, Tensor | None]] = {}

    def observe(layer: MolaLinear, observed: str, routing: Routing, mask: Tensor | None, _: torch.Size) -> None:
        if observed == adapter:
            routings[id(layer)] = (routing, mask)

    def add(layer: MolaLinear, args: tuple[Tensor, ...], _: Tensor) -> None:
        A = layer.lamella_mola_lora_A[adapter].flatten(0, 1)  # (E*r, in)
        h = args[0].reshape(-1, layer.in_features).to(A.dtype) @ A.t()  # (N, E*r)
        u = h
        if layer.routed(adapter):
            routing, mask = routings.pop(id(layer))
            r = layer.experts[adapter].r
            u = h * routing.dense_weights().to(h.dtype).repeat_interleave(r, dim=1)
            h, u = (h, u) if mask is None else (h[mask], u[mask])
        moments[names[id(layer)]].add(h, u)

    tracker = find_tracker(model)
    assert tracker is not None  # every injection sets one
    hooks = [layer.register_forward_hook(add) for layer in layers.values()]
    tracker.observers.append(observe)
    try:
        for batch in batches:
            model(**batch)
    finally:
        tracker.observers.remove(observe)
        for hook in hooks:
            hook.remove()
    return moments


def _truncate(down: Tensor, up: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """``up @ down`` at the given rank: the nearest by singular values, without forming the product."""
    if rank is None or rank >= len(down):
        return down, up
    q_up, r_up = torch.linalg.qr(up)  # (out, m), (m, m)
    q_down, r_down = torch.linalg.qr(down.t())  # (in, m), (m, m)
    u, s, v = torch.linalg.svd(r_up @ r_down.t())
    root = s[:rank].sqrt()
    return (q_down @ v.t()[:, :rank] * root).t(), q_up @ u[:, :rank] * root


def _lost_after_truncation(moments: _Moments, A: Tensor, B: Tensor, down: Tensor, up: Tensor) -> float:
    """Squared norm of ``B u - up down x`` where ``down`` lies in the row space of A: ``down = S A``."""
    S = torch.linalg.lstsq(A.t(), down.t()).solution.t()  # (rank, E*r)
    # ||B u - M h||^2 with M = up S, from the moments of u and h
    M = up @ S  # (out, E*r)
    return float(
        (B.t() @ B * moments.uu).sum() - 2 * (M.t() @ B * moments.uh.t()).sum() + (M.t() @ M * moments.hh).sum()
    )


def _as_lora(model: PeftModel, adapter: str, factors: dict[str, tuple[Tensor, Tensor]]) -> PeftModel:
    config = model.peft_config[adapter]
    saved = _modules_to_save(model, adapter)
    base = copy.deepcopy(model).unload()
    ranks = {f"^{re.escape(name)}": len(down) for name, (down, _) in factors.items()}
    lora = LoraConfig(
        r=1, lora_alpha=1, target_modules=sorted(factors), rank_pattern=ranks, alpha_pattern=dict(ranks),
        task_type=config.task_type, modules_to_save=sorted(saved) or None,
        base_model_name_or_path=config.base_model_name_or_path, revision=config.revision,
    )  # fmt: skip
    collapsed: PeftModel = get_peft_model(base, lora)
    inner = collapsed.get_base_model()
    for name, (down, up) in factors.items():
        layer = inner.get_submodule(name)
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
    for name, state in saved.items():
        inner.get_submodule(name).modules_to_save["default"].load_state_dict(state)
    return collapsed.eval()


def _modules_to_save(model: PeftModel, adapter: str) -> dict[str, dict[str, Tensor]]:
    """Trained modules outside the method, by name."""
    return {
        name: module.modules_to_save[adapter].state_dict()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def _output_error(
    model: PeftModel, layers: list[MolaLinear], collapsed: PeftModel, batches: list[dict[str, Any]]
) -> float:
    lost = effect = 0.0
    for batch in batches:
        mixture, plain = _output(model, batch), _output(collapsed, batch)
        with _without_experts(layers):
            base = _output(model, batch)
        lost += float((plain - mixture).square().sum())
        effect += float((mixture - base).square().sum())
    return math.sqrt(lost / effect) if effect > 0 else 0.0


@contextmanager
def _without_experts(layers: list[MolaLinear]) -> Iterator[None]:
    """The model with its trained head and no experts: PEFT's ``disable_adapter`` would put back an untrained head."""
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _output(model: PeftModel, batch: Batch) -> Tensor:
    """The logits, or the last hidden states of a model without a head, at real positions."""
    output = model(**batch)
    values: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    mask = batch.get("attention_mask")
    if getattr(model.config, "is_encoder_decoder", False):  # its logits are at the decoder's positions
        labels = batch.get("labels")
        mask = batch.get("decoder_attention_mask") if labels is None else labels.ne(-100)
    if mask is not None and values.dim() == 3 and values.shape[:2] == mask.shape:
        values = values[mask.bool()]
    return values.double()
