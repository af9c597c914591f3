"""A composition of K LoRAs with a shortlist of 8 for each sequence, beside one of 8 LoRAs without."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from benchmarks.equality import Equality, compare
from benchmarks.measure import Timed, measure_case
from benchmarks.record import Benchmark, BenchSettings, Case, Record, Say, Target
from lamella import AdapterLibrary, MoleConfig, compose
from lamella.lab.methods import trainable_parameters

_TARGETS = ("q_proj", "v_proj")
_BATCH = 4


class LibrarySettings(BenchSettings):
    """A Llama of a few blocks, and libraries of random LoRAs of rank r on query and value."""

    tokens: int = Field(256, ge=8)
    rounds: int = Field(15, ge=2)
    width: int = 128
    layers: int = 4
    r: int = Field(8, ge=1)
    shortlist: int = 8
    sizes: tuple[int, ...] = (8, 64, 256, 1024)
    retrieval: tuple[str, ...] = ("arrow", "spectrum")


def run(settings: LibrarySettings, say: Say) -> list[Case]:
    """Times forward and training step for every size and key, equality first.

    Raises:
        LamellaError: a shortlist of all is not the ordinary composition.
    """
    with _pool(settings, max(settings.sizes)) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        equality = _check_equality(settings)
        say(f"{max(settings.sizes):,} LoRAs")
        models = {"ordinary": _composed(settings, folder, settings.shortlist)}
        for key in settings.retrieval:
            for size in settings.sizes:
                name = f"{key}, K={size}"
                models[name] = _composed(settings, folder, size, shortlist=settings.shortlist, retrieval=key)
        pairs = [(name, "ordinary") for name in models if name != "ordinary"]
        steps: dict[str, Callable[[nn.Module, Tensor], object]] = {"forward": _forward, "training step": _step}
        cases = []
        for what, step in steps.items():
            say(what)
            timed = {
                name: Timed(
                    f"{what} of {name}",
                    partial(step, model, _ids(settings)),
                    trainable_parameters(model),
                    live_peak=True,
                )
                for name, model in models.items()
            }
            cases.append(measure_case(what, timed, pairs, equality, settings))
        return cases


def _base(settings: LibrarySettings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=settings.width, intermediate_size=8 * settings.width // 3,
        num_hidden_layers=settings.layers, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _ids(settings: LibrarySettings) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 1000, (_BATCH, settings.tokens // _BATCH), generator=generator)


@contextmanager
def _pool(settings: LibrarySettings, count: int, dtype: torch.dtype = torch.float32) -> Iterator[Path]:
    """Random LoRAs, each in a PEFT folder."""
    config = LoraConfig(r=settings.r, target_modules=list(_TARGETS), base_model_name_or_path="")
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        written = Path(folder) / "adapter_config.json"
        for number in range(count):
            place = Path(folder) / f"lora-{number:04d}"
            place.mkdir()
            shutil.copy(written, place)
            tensors = {}
            for layer in range(settings.layers):
                for target in _TARGETS:
                    module = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                    for side, shape in (("A", (settings.r, settings.width)), ("B", (settings.width, settings.r))):
                        drawn = torch.randn(shape, generator=generator) / settings.width**0.5
                        tensors[f"{module}.lora_{side}.weight"] = drawn.to(dtype)
            save_file(tensors, place / "adapter_model.safetensors")
        written.unlink()
        yield Path(folder)


def _composed(settings: LibrarySettings, folder: Path, size: int, **of_config: Any) -> nn.Module:
    library = AdapterLibrary(folder)
    model: nn.Module = compose(_base(settings), library.only(library.names[:size]), MoleConfig(**of_config))
    return model.to(settings.device)


def _check_equality(settings: LibrarySettings) -> Equality:
    """A shortlist of all is the ordinary composition of the same router."""
    found = []
    with _pool(settings, settings.shortlist, torch.float64) as folder:
        for of_config in ({"shortlist": settings.shortlist}, {"router": "shared", "balance": "none"}):
            model = _composed(settings, folder, settings.shortlist, **of_config).double()
            logits = _answer(model, _ids(settings).to(settings.device)).logits  # the loss is of float32
            logits.square().mean().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append({"output": logits.detach(), **gradients})
    return compare(*found)


def _answer(model: nn.Module, ids: Tensor) -> Any:
    """With the loss of the second half of each row; the first is the prompt."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    return model(input_ids=ids, labels=labels)


def _forward(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad(), lamella.prompt([ids.shape[1] // 2] * len(ids)):
        model(input_ids=ids)


def _step(model: nn.Module, ids: Tensor) -> None:
    _answer(model, ids).loss.backward()
    model.zero_grad(set_to_none=True)


def targets(record: Record) -> Sequence[Target]:
    """What the largest library costs beside 8 LoRAs."""
    largest = max(record.settings["sizes"])
    found = []
    for case, most in zip(record.cases, (1.15, 1.2), strict=True):
        for key in record.settings["retrieval"]:
            name = f"{key}, K={largest}"
            found.append(Target(f"{case.name}, {name} / ordinary", case.ratio(name, "ordinary"), most=most))
            peak, before = case.method(name).peak_mb, case.method("ordinary").peak_mb
            if peak is not None and before:
                found.append(Target(f"{case.name}: memory, {name} / ordinary", peak / before, most=1.3))
    return found


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"a Llama of {settings['layers']} blocks of width {settings['width']}, LoRAs of rank {settings['r']} on query "
        f"and value, {_BATCH} x {settings['tokens'] // _BATCH} tokens, half of each row the prompt; *ordinary* is "
        f"{settings['shortlist']} LoRAs with published routers, the others have a shortlist of {settings['shortlist']}"
    )


_QUICK = {"rounds": 2, "tokens": 32, "width": 16, "layers": 1, "r": 2, "shortlist": 2, "sizes": (2, 4)}
LIBRARY = Benchmark(LibrarySettings, _QUICK, run, targets, shape)
