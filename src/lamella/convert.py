"""A mixture as plain LoRAs: one fitted in rank space, with a measured error, or each expert by itself."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor

from lamella.errors import LamellaError
from lamella.progress import counted
from lamella.tuners.model import RoutedModel
from lamella.tuners.routed import LoraMixture
from lamella.tuners.tensors import placed

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
    """Fits one plain LoRA to a MoLA or MOLE adapter on given data.

    In each module the mixture adds ``B (g(x) * A x)``. The LoRA adds ``B T A x`` with T fitted by least squares on the
    batches, in rank space; where the weights g are constant it is exact. The model given is not changed. Weights set
    by an override (``masked_experts``, ``fixed_weights``) are those that are fitted. On a decoder
    ``lamella.prompt`` around it says where prompts end; where nothing does, MOLE's first tokens have uniform weights.

    Args:
        model: a PeftModel with an active MoLA or MOLE adapter.
        batches: keyword arguments for the model, such as ``input_ids`` and ``attention_mask``.
        rank: rank of every module's LoRA, by truncated SVD; None keeps a module's own, all experts' together. Where
            modules differ, the largest is the LoRA's rank, and the others have zeros in the rest.

    Returns:
        The LoRA as a PeftModel of its own, with its measured error.

    Raises:
        LamellaError: no such adapter, blocks that are mixed as a whole, biases that are mixed, or no batches.
    """
    adapter, mixture = _active_mixture(model)
    held = [dict(batch) for batch in batches]
    if not held:
        raise LamellaError("collapse needs at least one batch to see which experts the data uses.")
    held_out = len(held) >= 4
    measured = held[3::4] if held_out else held
    fitted = [batch for i, batch in enumerate(held) if i % 4 != 3] if held_out else held
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        fit = _moments(model, mixture, fitted)
        test = _moments(model, mixture, measured) if held_out else fit
        factors, per_module = {}, {}
        for name in counted(mixture.layers, "fitting", "modules"):
            A, B = mixture.factors(name)
            T = fit[name].map()
            lost, total = test[name].lost(T, B)
            down, up = _truncate(T @ A, B, rank)
            if rank is not None:
                lost = _lost_after_truncation(test[name], A, B, down, up)
            factors[name] = (down, up)
            per_module[name] = math.sqrt(lost / total) if total > 0 else 0.0
        collapsed = _as_lora(model, adapter, factors)
        error = _output_error(model, list(mixture.layers.values()), collapsed, measured)
    finally:
        for module in training:
            module.training = True
    return Collapsed(collapsed, error, per_module, held_out)


def export_experts(model: PeftModel, folder: str | Path) -> list[Path]:
    """Saves expert e of every block that has one as a plain PEFT LoRA, ``folder/expert_e``.

    The experts' LoRAs act at full weight: their sum weighted by the routers is the mixture. Trained modules outside the
    blocks, such as a classifier, are saved with each.

    Returns:
        The adapters' folders.

    Raises:
        LamellaError: no MoLA adapter, a MOLE adapter, or the folder already holds experts.
    """
    adapter, mixture = _active_mixture(model)
    lora, experts = mixture.experts()
    folder = Path(folder)
    if any(folder.glob("expert_*")):
        raise LamellaError(f"{folder} already holds exported experts; choose another folder or remove them.")
    config = model.peft_config[adapter]
    saved = _modules_to_save(model, adapter)
    lora.task_type, lora.inference_mode, lora.modules_to_save = config.task_type, True, sorted(saved) or None
    lora.base_model_name_or_path, lora.revision = config.base_model_name_or_path, config.revision
    heads = {f"{module}.{key}": value for module, state in saved.items() for key, value in state.items()}
    paths = []
    for number, factors in enumerate(experts):
        tensors = dict(heads)
        for name, (A, B) in factors.items():
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        path = folder / f"expert_{number}"
        path.mkdir(parents=True)
        stored = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(stored, path / "adapter_model.safetensors", metadata={"format": "pt"})
        lora.target_modules = set(factors)
        lora.save_pretrained(str(path))
        paths.append(path)
    return paths


def _active_mixture(model: PeftModel) -> tuple[str, LoraMixture]:
    """The one active adapter and its mixture of LoRAs."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, RoutedModel):
        raise LamellaError(
            f"{type(model).__name__} is not a PeftModel with a MoLA or MOLE adapter; there are no experts to export."
        )
    if len(model.active_adapters) != 1:
        raise LamellaError(
            f"{len(model.active_adapters)} adapters are active ({', '.join(model.active_adapters)}); activate one with "
            "set_adapter first."
        )
    return model.active_adapters[0], tuner.lora_mixture(model.active_adapters[0])


def _modules_to_save(model: PeftModel, adapter: str) -> dict[str, dict[str, Tensor]]:
    """Trained modules outside the method, by name."""
    return {
        name: module.modules_to_save[adapter].state_dict()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def _moments(model: PeftModel, mixture: LoraMixture, batches: list[dict[str, Any]]) -> dict[str, _Moments]:
    """What each module's rank space sees on the batches."""
    moments = {name: _Moments(len(mixture.factors(name)[0])) for name in mixture.layers}
    with mixture.watched(lambda name, h, u: moments[name].add(h, u)):
        for batch in counted(batches, "reading", "batches"):
            model(**batch)
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
    # Readers differ in whether they take the rank from the config or from the tensors, so both say the same everywhere.
    rank = max(len(down) for down, _ in factors.values())
    lora = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(factors), task_type=config.task_type,
        modules_to_save=sorted(saved) or None, base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )  # fmt: skip
    with placed(base):
        collapsed: PeftModel = get_peft_model(base, lora)
    inner = collapsed.get_base_model()
    for name, (down, up) in factors.items():
        layer: Any = inner.get_submodule(name)
        if "default" in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A.zero_()[: len(down)].copy_(down.view(-1, *A.shape[1:]))
        B.zero_()[:, : len(down)].copy_(up.view(*up.shape, *B.shape[2:]))
    for name, state in saved.items():
        inner.get_submodule(name).modules_to_save["default"].load_state_dict(state)
    return collapsed.eval()


def _output_error(
    model: PeftModel, layers: list[BaseTunerLayer], collapsed: PeftModel, batches: list[dict[str, Any]]
) -> float:
    lost = effect = 0.0
    for batch in counted(batches, "measuring what is lost", "batches"):
        mixture, plain = _output(model, batch), _output(collapsed, batch)
        with _without_experts(layers):
            base = _output(model, batch)
        lost += float((plain - mixture).square().sum())
        effect += float((mixture - base).square().sum())
    return math.sqrt(lost / effect) if effect > 0 else 0.0


@contextmanager
def _without_experts(layers: list[BaseTunerLayer]) -> Iterator[None]:
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
