"""Comparing experts: many aligners at once beside one by one, and the complete flow beside the published one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from benchmarks.equality import Equality, compare, worst_of
from benchmarks.measure import Timed, measure_case
from benchmarks.naive_similarity import LR, capture_pair, train_pair
from benchmarks.record import Benchmark, BenchSettings, Case, Record, Say, Target
from lamella.aligners import aligner_class
from lamella.backbones.moe import Expert, moe_layers
from lamella.backbones.moe.expert import Gated
from lamella.similarity.activations import Capture, capture
from lamella.similarity.alignment.frozen import FrozenExpert
from lamella.similarity.alignment.stack import start_stack
from lamella.similarity.alignment.training import stack_tokens, train

# Adam divides by a gradient's size: where it vanishes, rounding decides the step, and many steps drift apart.
_STEPS_COMPARED = 3
_HIDDEN_SHARE = 0.6875  # hidden units of an expert per feature, as in Qwen1.5-MoE-A2.7B
_VOCABULARY = 512
_ACTIVE_OF = 15  # one expert of so many works for a token, likewise
_WORDS = {
    "published": "one aligner after the other, gradients to the target's weights too, as published",
    "sequential": "the same without those gradients",
    "batched": "lamella's: all sources of a target at once",
    "published flow": "the model run for every pair, one aligner after the other",
    "lamella": "lamella's: one capture of all experts on disk, all sources of a target at once",
}
# What it is measured against: times of the published way over lamella's, by the experts' width, and end to end.
_LEAST_TRAINING = {64: 3.0, 256: 1.6}
_LEAST_END_TO_END = 30.0


class SimilaritySettings(BenchSettings):
    """Aligners of pairs of experts, trained for ``steps`` on ``samples`` tokens of each source.

    ``grids`` are (features, experts on each side) of training alone; the rest is of the complete flow: a model of
    Qwen1.5-MoE's shape but narrow, of which ``side`` experts of one layer are compared with as many of the next, on so
    many ``batches`` of 8 x 128 tokens. It takes minutes a round and has other rounds.
    """

    rounds: int = Field(5, ge=2)
    tokens: int = Field(1024, ge=1)
    grids: tuple[tuple[PositiveInt, PositiveInt], ...] = ((64, 8), (256, 4))
    samples: PositiveInt = 256
    steps: PositiveInt = 10
    flow_rounds: int = Field(2, ge=2)
    width: PositiveInt = 128
    layers: int = Field(8, ge=2)
    experts: int = Field(60, ge=15)
    side: PositiveInt = 8
    batches: PositiveInt = 6


@dataclass(frozen=True)
class _Grid:
    """Sources with tokens, targets, and the start of each pair's aligner."""

    tokens: Sequence[tuple[Tensor, Tensor]]
    targets: Sequence[Expert]
    steps: int

    def generators(self, target: int) -> list[torch.Generator]:
        """One per source."""
        return [torch.Generator().manual_seed(1000 * target + source) for source in range(len(self.tokens))]

    def batched(self) -> Tensor:
        """Losses of the last step, ``(targets, sources)``."""
        batch = stack_tokens(self.tokens)
        width = batch.x.shape[-1]
        scale = batch.x.new_ones(len(self.tokens))
        losses = []
        for at, target in enumerate(self.targets):
            stack = start_stack("published", width, 1, self.generators(at), list(batch.x))
            trained = train(stack, FrozenExpert(target, batch.x.dtype), batch, scale, steps=self.steps, lr=LR)
            losses.append(trained.loss)
        return torch.stack(losses)

    def one_by_one(self, frozen: bool) -> Tensor:
        """The same by the published loop."""
        kind = aligner_class("published")
        losses = []
        for at, target in enumerate(self.targets):
            for (x, y), generator in zip(self.tokens, self.generators(at), strict=True):
                start = {name: x.new_empty(shape) for name, shape in kind.shapes(x.shape[1], 1).items()}
                kind.fill(start, generator)
                losses.append(train_pair(target, x, y, start, self.steps, frozen))
        return torch.stack(losses).view(len(self.targets), -1)


def run(settings: SimilaritySettings, say: Say) -> list[Case]:
    """Times training alone for each width, then everything from text to losses, equality of the losses first.

    Raises:
        LamellaError: batched and sequential training differ in float64.
    """
    cases = []
    for width, side in settings.grids:
        say(f"training, {width} features, {side * side} pairs")
        cases.append(_training(settings, width, side))
    say("end to end")
    return [*cases, _end_to_end(settings)]


def _training(settings: SimilaritySettings, width: int, side: int) -> Case:
    hidden = round(_HIDDEN_SHARE * width)
    experts = [_expert(width, hidden) for _ in range(2 * side)]
    tokens = []
    for source in experts[:side]:
        x = torch.randn(settings.samples, width)
        tokens.append((x, source(x)))
    grid = _on(_Grid(tokens, experts[side:], settings.steps), settings)
    exact = _Grid(
        [(x.double().cpu(), y.double().cpu()) for x, y in grid.tokens],
        [_cast(target, torch.float64, "cpu") for target in grid.targets],
        _STEPS_COMPARED,
    )
    equality = _same(exact)
    steps: dict[str, Callable[[], object]] = {
        "published": lambda: grid.one_by_one(frozen=False),
        "sequential": lambda: grid.one_by_one(frozen=True),
        "batched": grid.batched,
    }
    pairs = (("published", "batched"), ("sequential", "batched"))
    name = f"training, d={width}, {side * side} pairs"
    return measure_case(name, _timed(steps), pairs, equality, settings)


def _end_to_end(settings: SimilaritySettings) -> Case:
    model = _model(settings)
    first, second = moe_layers(model)[0].index, moe_layers(model)[1].index
    side = settings.side
    batches = [
        {"input_ids": torch.randint(3, _VOCABULARY, (8, 128), device=settings.device)} for _ in range(settings.batches)
    ]

    def published() -> None:
        layers = {layer.index: layer for layer in moe_layers(model)}
        for source in range(side):
            for at in range(side):
                x, y = capture_pair(model, batches, ((first, source), (second, at)), settings.samples)
                target = layers[second].experts[at]
                _Grid([(x, y)], [target], settings.steps).one_by_one(frozen=False)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            captured = capture(model, batches, Path(folder) / "capture", settings.samples)
            grid = _captured(model, captured, first, second, settings)
            grid.batched()

    with tempfile.TemporaryDirectory() as folder:
        exact = model.double()
        grid = _captured(exact, capture(exact, batches, folder, settings.samples), first, second, settings)
        equality = _same(_Grid(grid.tokens, grid.targets, _STEPS_COMPARED))
    model.to(settings.torch_dtype)
    steps: dict[str, Callable[[], object]] = {"published flow": published, "lamella": ours}
    name = f"end to end, d={settings.width}, {side * side} of {settings.experts**2} pairs of two layers"
    pairs = (("published flow", "lamella"),)
    return measure_case(name, _timed(steps), pairs, equality, settings, rounds=settings.flow_rounds)


def _captured(model: nn.Module, captured: Capture, first: int, second: int, settings: SimilaritySettings) -> _Grid:
    layers = {layer.index: layer for layer in moe_layers(model)}
    tokens = []
    for source in range(settings.side):
        expert = layers[first].experts[source]
        x = captured.inputs(first, source).to(expert.up)
        with torch.no_grad():
            tokens.append((x, expert(x)))
    targets = [layers[second].experts[at] for at in range(settings.side)]
    return _Grid(tokens, targets, settings.steps)


def _model(settings: SimilaritySettings) -> nn.Module:
    """Qwen1.5-MoE's shape at a smaller width: 60 experts, 4 of them for a token, and a shared one."""
    torch.manual_seed(0)
    hidden = 8 * round(_HIDDEN_SHARE * settings.width / 8)
    config = Qwen2MoeConfig(
        vocab_size=_VOCABULARY, hidden_size=settings.width, num_hidden_layers=settings.layers, num_attention_heads=4,
        num_key_value_heads=4, num_experts=settings.experts, num_experts_per_tok=settings.experts // _ACTIVE_OF,
        moe_intermediate_size=hidden, shared_expert_intermediate_size=4 * hidden, decoder_sparse_step=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(settings.device)
    for layer in moe_layers(model):
        for router in layer.router_module.parameters():
            nn.init.normal_(router, std=settings.width**-0.5)
    return model.eval()


def _expert(width: int, hidden: int) -> Expert:
    gate, up, down = torch.randn(hidden, width), torch.randn(hidden, width), torch.randn(width, hidden)
    return Expert(up * width**-0.5, down * hidden**-0.5, Gated(nn.functional.silu), gate * width**-0.5)


def _cast(expert: Expert, dtype: torch.dtype, device: str) -> Expert:
    return Expert(activation=expert.activation, **{n: one.to(device, dtype) for n, one in expert.matrices.items()})


def _on(grid: _Grid, settings: SimilaritySettings) -> _Grid:
    to = (settings.device, settings.torch_dtype)
    targets = [_cast(target, settings.torch_dtype, settings.device) for target in grid.targets]
    return _Grid([(x.to(*to), y.to(*to)) for x, y in grid.tokens], targets, grid.steps)


def _same(exact: _Grid) -> Equality:
    """Losses of the last step, batched against both loops, in float64."""
    batched = exact.batched()
    return worst_of(
        [compare({"output": batched, "losses": batched}, {"output": loop, "losses": loop})
         for loop in (exact.one_by_one(frozen=True), exact.one_by_one(frozen=False))]
    )  # fmt: skip


def _timed(steps: dict[str, Callable[[], object]]) -> dict[str, Timed]:
    return {method: Timed(_WORDS[method], step) for method, step in steps.items()}


def targets(record: Record) -> Sequence[Target]:
    """The gain over the published way, for training alone and from text to losses."""
    figures = []
    *training, flow = record.cases
    for case, (width, _) in zip(training, record.settings["grids"], strict=True):
        published, sequential = (case.ratio(method, "batched") for method in ("published", "sequential"))
        least = _LEAST_TRAINING.get(width)
        figures.append(Target(f"{case.name}: published / batched", published, least=least, digits=1))
        figures.append(Target(f"{case.name}: sequential / batched", sequential))
    gain = flow.ratio("published flow", "lamella")
    return [*figures, Target(f"{flow.name}: published flow / lamella", gain, least=_LEAST_END_TO_END, digits=0)]


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"{settings['samples']} samples of an expert, {settings['steps']} steps; end to end {settings['layers']} "
        f"layers of {settings['width']} with {settings['experts']} experts, {1024 * settings['batches']:,} tokens"
    )


_QUICK = {
    "rounds": 2, "flow_rounds": 2, "grids": ((8, 2), (16, 2)), "samples": 12, "steps": 3, "width": 16, "layers": 2,
    "experts": 15, "side": 2, "batches": 2,
}  # fmt: skip
SIMILARITY = Benchmark(SimilaritySettings, _QUICK, run, targets, shape)
