"""Roughly what a study of expert similarity will cost in time, disk and memory, told before it begins."""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from lamella.aligners import aligner_parameters, aligner_rank
from lamella.backbones import find_blocks
from lamella.backbones.moe import MoELayer, moe_layers
from lamella.errors import LamellaError
from lamella.files import write_atomic
from lamella.similarity.activations import Capture
from lamella.similarity.activations.streaming import LOOK
from lamella.similarity.alignment.fitting import BUDGET, pair_bytes
from lamella.similarity.alignment.run import STEPS
from lamella.similarity.alignment.sources import STOP_SHARE
from lamella.similarity.alignment.tiles import PAIRS
from lamella.similarity.screening import MEASURES, default_measures

_BYTES = {"float32": 4, "bfloat16": 2}
_INDEX_BYTES = 24  # of a sample: its key, document and position
_CERTAINTY = 0.99
_LARGEST_MATCHING = 512


@dataclass(frozen=True)
class Plan:
    """What a study will cost; hours are rough, for a machine is slower in small products than in large ones.

    Attributes:
        model: its class.
        parameters, active: of the model, and of them those that work for one token.
        layers, experts: with experts, and experts in all of them.
        pairs_all, pairs: ordered pairs of experts, and of them those to align.
        tiles: independent pieces of the alignment.
        aligner, steps: kind, and most steps of a pair.
        per_expert: samples of an expert.
        tokens: of text that the capture reads: ``tokens_needed``, or all that it is given where that is less.
        tokens_needed: so that with probability 0.99 every expert gets its samples, if the rarest is chosen as seldom
            as given or measured, by tokens that are independent; real ones are not quite, so take more.
        rarest: chance that a token chooses the rarest expert.
        silent: experts that measured routing never chose; no text fills them, and ``tokens_needed`` leaves them out.
        model_bytes: of the model in float32.
        block_bytes: of the largest block, with what lies outside the blocks, in float32: what is in memory at once of a
            model whose weights accelerate keeps on disk, while it is captured.
        capture_bytes: of the capture, on disk and again in memory while it is taken.
        align_bytes: of the aligners that are trained at once, with tokens, gradients and optimiser.
        flops_per_second: at which hours are told.
        measured: whether it was measured here, by a float32 product of matrices.
        capture_hours, screen_hours, align_hours: at that speed; hidden units are matched on one core here.
    """

    model: str
    parameters: int
    active: int
    layers: int
    experts: int
    pairs_all: int
    pairs: int
    tiles: int
    aligner: str
    steps: int
    per_expert: int
    tokens: int
    tokens_needed: int
    rarest: float
    silent: int
    model_bytes: int
    block_bytes: int
    capture_bytes: int
    align_bytes: int
    flops_per_second: float
    measured: bool
    capture_hours: float
    screen_hours: float
    align_hours: float

    def write(self, path: Path) -> None:
        """Writes it as JSON atomically."""
        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    def __str__(self) -> str:
        silent = f"; {self.silent} experts were never chosen" if self.silent else ""
        needed = (
            f"{self.tokens_needed:,} tokens or more fill {self.per_expert} samples of each expert, the rarest chosen "
            f"by 1 token in {1 / self.rarest:,.1f}{silent}"
        )
        reads = "as many tokens as that"
        if self.tokens < self.tokens_needed:
            needed += f"; the text has {self.tokens:,}"
            reads = f"{self.tokens:,} tokens"
        lines = {
            "model": f"{self.model}: {self.parameters:,} parameters, {self.active:,} for one token; "
            f"{_gigabytes(self.model_bytes)} in float32",
            "offload": f"where that does not fit, {_gigabytes(self.block_bytes)} at once: loaded with device_map and "
            f"offload_folder, it is captured block by block, and read from disk once for every {LOOK} documents",
            "experts": f"{self.experts:,} in {self.layers} layers",
            "pairs": f"{self.pairs_all:,} ordered; {self.pairs:,} to align, in {self.tiles:,} tiles",
            "text": f"{needed}; a capture ends there",
            "capture": f"{_hours(self.capture_hours)} for {reads}; {_gigabytes(self.capture_bytes)} on disk and in "
            "memory",
            "screen": f"{_hours(self.screen_hours)} for all pairs",
            "align": f"{_hours(self.align_hours)} with {self.aligner} aligners, at most {self.steps} steps, for each "
            f"seed; {_gigabytes(self.align_bytes)} in memory",
            "speed": f"{self.flops_per_second:.3g} FLOP/s, {'measured here' if self.measured else 'as given'}; "
            "hours are rough",
        }
        return "\n".join(f"{name:<9}{line}" for name, line in lines.items())


def plan(
    model: nn.Module | PretrainedConfig | str | Path,
    per_expert: int = 512,
    *,
    tokens: int | None = None,
    aligner: str = "linear",
    steps: int = STEPS,
    rank: int | None = None,
    held_out: float = 0.5,
    per_source: int | None = None,
    dtype: str = "float32",
    skew: float = 1.0,
    capture: Capture | None = None,
    flops_per_second: float | None = None,
) -> Plan:
    """Tokens, bytes and hours of a study; a config is enough, no weights are read.

    Args:
        model: a model, a config, or a name or path to find a config under.
        per_expert: samples of an expert.
        tokens: of the text that will be captured; None for as many as fill the samples.
        aligner: as for `align`.
        steps: as for `align`; what every pair takes if none stops early.
        rank: as for `align`.
        held_out: share of the samples to score on.
        per_source: targets of each source that the screen lets through; None aligns all ordered pairs.
        dtype: of the samples, "float32" or "bfloat16".
        skew: how many times as often an expert is chosen on average as the rarest one.
        capture: of some text by this model, to take from it instead how often experts are chosen.
        flops_per_second: of the machines; None measures this one.

    Raises:
        LamellaError: no config or no experts are found, or a number cannot be.
    """
    _check(per_expert, held_out, skew, dtype, per_source, flops_per_second)
    shape = model_shape(model)
    pairs_all = shape.experts * (shape.experts - 1)
    targets = shape.experts - 1 if per_source is None else min(per_source, shape.experts - 1)
    chances = _chances(shape, skew) if capture is None else _measured_chances(capture)
    chosen = [chance for chance in chances if chance > 0]
    if not chosen:
        raise LamellaError("The captured routing has no token that chose an expert; capture some text first.")
    needed = tokens_to_fill(per_expert, min(chosen), shape.experts)
    read = needed if tokens is None else min(tokens, needed)
    held = round(per_expert * held_out)
    speed = _measure_speed() if flops_per_second is None else flops_per_second
    # two controls for each source beside its pairs
    aligned = [
        (layer, aligner_parameters(aligner, layer.inputs, aligner_rank(layer.inputs, rank))) for layer in shape.layers
    ]
    align_flops = sum(
        layer.experts * (targets + 2) * _align_flops(layer, size, steps, per_expert - held, held)
        for layer, size in aligned
    )
    tokens_at_once = max(per_expert - held, held)
    pair = max(pair_bytes(tokens_at_once, one.inputs, one.outputs, one.hidden, size) for one, size in aligned)
    return Plan(
        model=shape.name,
        parameters=shape.parameters,
        active=shape.active,
        layers=len(shape.layers),
        experts=shape.experts,
        pairs_all=pairs_all,
        pairs=shape.experts * targets,
        tiles=sum(math.ceil(layer.experts / max(1, PAIRS // targets)) for layer in shape.layers),
        aligner=aligner,
        steps=steps,
        per_expert=per_expert,
        tokens=read,
        tokens_needed=needed,
        rarest=min(chosen),
        silent=len(chances) - len(chosen),
        model_bytes=4 * shape.parameters,
        block_bytes=4 * shape.at_once,
        capture_bytes=sum(
            layer.experts * per_expert * (layer.inputs * _BYTES[dtype] + _INDEX_BYTES) for layer in shape.layers
        ),
        align_bytes=max(pair, BUDGET),
        flops_per_second=speed,
        measured=flops_per_second is None,
        capture_hours=2 * read * shape.active / speed / 3600,
        screen_hours=_screen_seconds(shape, pairs_all, held, speed) / 3600,
        align_hours=align_flops / speed / 3600,
    )


def tokens_to_fill(samples: int, chance: float, experts: int) -> int:
    """Tokens after which each of ``experts`` has its samples with probability 0.99, each token choosing it with
    ``chance``; counts are taken as normal with the variance of Poisson's.
    """
    z = statistics.NormalDist().inv_cdf(_CERTAINTY ** (1 / experts))
    return math.ceil((z / 2 + math.sqrt(z * z / 4 + samples)) ** 2 / chance)


@dataclass(frozen=True)
class LayerShape:
    """One layer's experts.

    Attributes:
        experts: E.
        top_k: experts of a token.
        inputs, outputs: features of an expert's input and output.
        hidden: units of an expert, ff.
        readers: matrices from the input to the hidden units: 2 with a gate, 1 without.
    """

    experts: int
    top_k: int
    inputs: int
    outputs: int
    hidden: int
    readers: int

    @classmethod
    def of(cls, layer: MoELayer) -> LayerShape:
        """The shape of a layer."""
        expert = layer.experts[0]
        (hidden, inputs), outputs = expert.up.shape, expert.down.shape[0]
        return cls(layer.num_experts, layer.top_k, inputs, outputs, hidden, 1 if expert.gate is None else 2)

    @property
    def forward(self) -> int:
        """FLOPs of an expert for one token, a multiplication with an addition counted as two."""
        return 2 * self.hidden * (self.readers * self.inputs + self.outputs)


@dataclass(frozen=True)
class ModelShape:
    """A model in numbers.

    Attributes:
        name: its class.
        layers: those with experts.
        parameters: of the model.
        active: of them, those that a token is multiplied with: without embeddings that are only looked up, and of the
            experts only top-k.
        at_once: those of the largest block and outside all blocks.
    """

    name: str
    layers: tuple[LayerShape, ...]
    parameters: int
    active: int
    at_once: int

    @property
    def experts(self) -> int:
        """Experts of all layers."""
        return sum(layer.experts for layer in self.layers)


def model_shape(model: nn.Module | PretrainedConfig | str | Path) -> ModelShape:
    """The shape of a model, or of what a config would build, without weights.

    Raises:
        LamellaError: there is no config under this name, or the model has no experts that lamella knows.
    """
    built = model if isinstance(model, nn.Module) else _build(model)
    layers = moe_layers(built)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    embeddings = [part.weight for part in built.modules() if isinstance(part, nn.Embedding)]
    head = getattr(built, "get_output_embeddings", lambda: None)()
    looked_up = sum(weight.numel() for weight in embeddings)
    if head is not None and any(weight is head.weight for weight in embeddings):
        looked_up -= head.weight.numel()  # looked up and multiplied with
    idle = sum((layer.num_experts - layer.top_k) * layer.experts[0].parameters for layer in layers)
    shapes = tuple(map(LayerShape.of, layers))
    of_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(built)]
    at_once = parameters - sum(of_blocks) + max(of_blocks)
    return ModelShape(type(built).__name__, shapes, parameters, parameters - looked_up - idle, at_once)


def _build(config: PretrainedConfig | str | Path) -> nn.Module:
    """The model of a config on the meta device, where tensors have shapes and no numbers."""
    if not isinstance(config, PretrainedConfig):
        try:
            config = AutoConfig.from_pretrained(config, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise LamellaError(
                f"No model config is found under {str(config)!r}: {error} Name a folder or file with a config.json, a "
                "hub id, or give a config."
            ) from error
    kind = AutoModel
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        kind = AutoModelForSeq2SeqLM
    with torch.device("meta"):
        return kind.from_config(config)


def _check(
    per_expert: int, held_out: float, skew: float, dtype: str, per_source: int | None, speed: float | None
) -> None:
    if per_expert < 2:
        raise LamellaError(f"per_expert={per_expert}: an expert needs at least 2 samples, to train and to score on.")
    if not 0 < held_out < 1:
        raise LamellaError(f"held_out={held_out}: the share of samples to score on lies between 0 and 1.")
    if skew < 1:
        raise LamellaError(f"skew={skew}: the rarest expert is chosen at most as often as the average; give 1 or more.")
    if dtype not in _BYTES:
        raise LamellaError(f"Samples are kept as {' or '.join(_BYTES)}, not as {dtype!r}.")
    if per_source is not None and per_source < 1:
        raise LamellaError(f"per_source={per_source}: at least 1 target of each source goes on to alignment.")
    if speed is not None and not speed > 0:
        raise LamellaError(f"flops_per_second={speed}: give what the machines do in a second, such as 4e14.")


def _chances(shape: ModelShape, skew: float) -> list[float]:
    """That a token chooses the rarest expert of each layer."""
    return [layer.top_k / layer.experts / skew for layer in shape.layers]


def _measured_chances(capture: Capture) -> list[float]:
    """That a token chose an expert, of all experts."""
    return [
        chance
        for count in capture.counts.values()
        for chance in (count["selected"].double() / count["tokens"].clamp_min(1)).tolist()
    ]


def _screen_seconds(shape: ModelShape, pairs: int, tokens: int, speed: float) -> float:
    """Of the measures that a screen of so many pairs takes unasked; outputs of the target, products, matched units."""
    whole = default_measures(pairs) == list(MEASURES)
    flops = seconds = 0.0
    for layer in shape.layers:
        d = layer.outputs
        products = 4 * tokens**2 * d if tokens <= d else 6 * tokens * d**2
        floor = 2 * tokens * d * (d - min(layer.hidden, d))
        weights = predicted = 0.0
        if whole:
            weights = layer.hidden**2 * (layer.readers * layer.inputs + d)  # of both orders together
            predicted = 3 * tokens * layer.forward + 2 * tokens**2 * d + 4 * tokens * d * min(layer.hidden, d)
        of_layer = layer.experts * (shape.experts - 1)
        flops += of_layer * (tokens * layer.forward + products + floor + predicted + weights)
        seconds += of_layer / 2 * _matching_seconds(layer.hidden) if whole else 0.0
    return flops / speed + seconds


def _align_flops(layer: LayerShape, parameters: int, steps: int, train: int, held_out: int) -> int:
    """Of one pair: each step passes tokens through aligner and expert, forth and back; at last all are scored.

    The expert's weights get no gradient, nor does what the aligner is given.
    """
    learn = round((1 - STOP_SHARE) * train) * steps if parameters else 0
    scored = (train + held_out) * (2 * parameters + layer.forward)
    return learn * (4 * parameters + 2 * layer.forward) + scored + held_out * layer.forward


def _measure_speed(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of two matrices here, the fastest of a few."""
    one = torch.ones(size, size)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@functools.cache
def _matching_seconds(hidden: int) -> float:
    """Seconds to match the hidden units of two experts here, taken as cubic beyond 512."""
    from scipy.optimize import linear_sum_assignment

    size = min(hidden, _LARGEST_MATCHING)
    gains = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).numpy()
    start = time.perf_counter()
    linear_sum_assignment(gains, maximize=True)
    return (time.perf_counter() - start) * (hidden / size) ** 3


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"
