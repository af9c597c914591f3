"""What a study of expert similarity will cost, told before it begins."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from lamella.aligners import aligner_class, aligner_rank
from lamella.backbones.moe import MoELayer, moe_layers
from lamella.errors import LamellaError
from lamella.files import write_whole
from lamella.similarity.alignment.fitting import BUDGET, IDENTITY_SCALES
from lamella.similarity.alignment.run import STEPS
from lamella.similarity.alignment.sources import STOP_SHARE
from lamella.similarity.alignment.tiles import PAIRS
from lamella.similarity.alignment.training import CHECK_EVERY

if TYPE_CHECKING:
    import pandas as pd


_BYTES = {"float32": 4, "bfloat16": 2}
_INDEX_BYTES = 24  # of a sample: its key, document and position
_CERTAINTY = 0.99
_LARGEST_MATCHING = 512


@dataclass(frozen=True)
class Plan:
    """What a study will cost. FLOPs count a multiplication with an addition as two.

    Attributes:
        model: its class.
        parameters, active: of the model, and of them those that work for one token.
        layers, experts: with experts, and experts in all of them.
        pairs_all: ordered pairs of experts, of one layer or of two.
        pairs_across: of them, those across layers.
        pairs: to align.
        aligner, steps: kind, and most steps of a pair.
        per_expert, train, held_out: samples of an expert, and what of them is trained and scored on.
        tokens_uniform: of text, so that with probability 0.99 every expert gets its samples if each is chosen equally
            often, by tokens that are independent; real ones are not quite, so take more.
        tokens: the same if the rarest expert is chosen as seldom as stated or measured.
        rarest: chance that a token chooses the rarest expert.
        silent: experts that measured routing never chose; no text fills them, and they are left out of ``tokens``.
        capture_bytes: of the capture, on disk and again in memory while it is taken.
        model_bytes: of the model in float32.
        align_bytes: of the aligners that are trained at once, with tokens, gradients and optimiser.
        capture_flops, screen_flops, align_flops: of the steps; the screen is of all pairs, the alignment has two
            controls for each source beside its pairs.
        floor_flops: of the screen's floor alone.
        flops_per_second: at which hours are stated.
        measured: whether it was measured here, by a float32 product of matrices.
        capture_hours, floor_hours, screen_hours, align_hours: at that speed.
        matching_hours: of the screen's weight distances on one core here, for matching hidden units, beside its FLOPs.
        tiles: independent pieces of the alignment.
    """

    model: str
    parameters: int
    active: int
    layers: int
    experts: int
    pairs_all: int
    pairs_across: int
    pairs: int
    aligner: str
    steps: int
    per_expert: int
    train: int
    held_out: int
    tokens_uniform: int
    tokens: int
    rarest: float
    silent: int
    capture_bytes: int
    model_bytes: int
    align_bytes: int
    capture_flops: int
    floor_flops: int
    screen_flops: int
    align_flops: int
    flops_per_second: float
    measured: bool
    capture_hours: float
    floor_hours: float
    screen_hours: float
    align_hours: float
    matching_hours: float
    tiles: int

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    def __str__(self) -> str:
        silent = f"; {self.silent} experts were never chosen" if self.silent else ""
        lines = {
            "model": f"{self.model}: {self.parameters:,} parameters, {self.active:,} for one token; "
            f"{_gigabytes(self.model_bytes)} in float32",
            "experts": f"{self.experts:,} in {self.layers} layers",
            "pairs": f"{self.pairs_all:,} ordered, {self.pairs_across:,} across layers; {self.pairs:,} to align, in "
            f"{self.tiles:,} tiles",
            "text": f"{self.tokens:,} tokens for {self.per_expert} samples of each expert, the rarest chosen by 1 "
            f"token in {1 / self.rarest:,.1f} ({self.tokens_uniform:,} tokens if all are chosen alike){silent}",
            "capture": f"{self.capture_flops:.3g} FLOPs = 2 x active parameters x tokens; "
            f"{_gigabytes(self.capture_bytes)} on disk and in memory",
            "floor": f"{self.floor_flops:.3g} FLOPs = pairs x 2 m d (d - rank), {self.held_out} held-out tokens m, "
            "and a decomposition for each target",
            "screen": f"{self.screen_flops:.3g} FLOPs = floor + pairs x (m x expert + CKA + ff² x width of a "
            "hidden unit)",
            "align": f"{self.align_flops:.3g} FLOPs = pairs x steps x tokens x (aligner + 2 x expert), {self.aligner}, "
            f"at most {self.steps} steps, {self.train} tokens; {_gigabytes(self.align_bytes)} in memory",
            "time": f"capture {_hours(self.capture_hours)}, floor {_hours(self.floor_hours)}, screen "
            f"{_hours(self.screen_hours)} and {_hours(self.matching_hours)} to match hidden units, align "
            f"{_hours(self.align_hours)}, at {self.flops_per_second:.3g} FLOP/s, "
            f"{'measured here' if self.measured else 'as stated'}",
        }
        return "\n".join(f"{name:<9}{line}" for name, line in lines.items())


def plan(
    model: nn.Module | PretrainedConfig | str | Path,
    per_expert: int = 512,
    *,
    aligner: str = "layernorm",
    steps: int = STEPS,
    rank: int | None = None,
    held_out: float = 0.5,
    per_source: int | None = None,
    dtype: str = "float32",
    skew: float = 1.0,
    routing: pd.DataFrame | None = None,
    tile_pairs: int = PAIRS,
    flops_per_second: float | None = None,
) -> Plan:
    """Counts tokens, FLOPs, bytes and hours of a study; a config is enough, no weights are read.

    Args:
        model: a model, a config, or a name or path to find a config under.
        per_expert: samples of an expert.
        aligner, steps, rank: as for `align`; ``steps`` is what every pair takes if none stops early.
        held_out: share of the samples to score on.
        per_source: targets of each source that the screen lets through; None aligns all ordered pairs.
        dtype: of the samples, "float32" or "bfloat16".
        skew: how many times as often an expert is chosen on average as the rarest one.
        routing: `Capture.routing` of some text, to take the shares from instead.
        tile_pairs: pairs of a tile at most, where one source has not more.
        flops_per_second: of the machines; None measures this one.

    Raises:
        LamellaError: no config or no experts are found, or a number cannot be.
    """
    _check(per_expert, held_out, skew, dtype, per_source, flops_per_second)
    census = take_census(model)
    held = round(per_expert * held_out)
    train = per_expert - held
    experts = census.experts
    across = sum(a.experts * b.experts for a, b in product(census.layers, repeat=2) if a is not b)
    pairs_all = experts * (experts - 1)
    pairs = pairs_all if per_source is None else experts * min(per_source, experts - 1)
    uniform = [layer.top_k / layer.experts for layer in census.layers for _ in range(layer.experts)]
    chances = [chance / skew for chance in uniform] if routing is None else _measured(routing)
    chosen = [chance for chance in chances if chance > 0]
    if not chosen:
        raise LamellaError("The measured routing has no token that chose an expert; capture some text first.")
    rarest = min(chosen)
    tokens = tokens_to_fill(per_expert, rarest, experts)
    capture_flops = 2 * tokens * census.active
    floors, screening = _screen_flops(census, held)
    training, align_memory = _align_costs(census, pairs + 2 * experts, aligner, rank, steps, train, held)
    sources = max(1, tile_pairs // (pairs // experts))
    speed = _measure_speed() if flops_per_second is None else flops_per_second
    return Plan(
        model=census.name,
        parameters=census.parameters,
        active=census.active,
        layers=len(census.layers),
        experts=experts,
        pairs_all=pairs_all,
        pairs_across=across,
        pairs=pairs,
        aligner=aligner,
        steps=steps,
        per_expert=per_expert,
        train=train,
        held_out=held,
        tokens_uniform=tokens_to_fill(per_expert, min(uniform), experts),
        tokens=tokens,
        rarest=rarest,
        silent=len(chances) - len(chosen),
        capture_bytes=sum(x.experts * per_expert * (x.inputs * _BYTES[dtype] + _INDEX_BYTES) for x in census.layers),
        model_bytes=4 * census.parameters,
        align_bytes=align_memory,
        capture_flops=capture_flops,
        floor_flops=floors,
        screen_flops=screening,
        align_flops=training,
        flops_per_second=speed,
        measured=flops_per_second is None,
        capture_hours=capture_flops / speed / 3600,
        floor_hours=floors / speed / 3600,
        screen_hours=screening / speed / 3600,
        align_hours=training / speed / 3600,
        matching_hours=_matching_seconds(max(x.hidden for x in census.layers)) * pairs_all / 2 / 3600,
        tiles=sum(math.ceil(layer.experts / sources) for layer in census.layers),
    )


def tokens_to_fill(samples: int, chance: float, experts: int) -> int:
    """Tokens after which each of ``experts`` has its samples with probability 0.99, each token choosing it with
    ``chance``; counts are taken as normal with the variance of Poisson's.
    """
    z = statistics.NormalDist().inv_cdf(_CERTAINTY ** (1 / experts))
    return math.ceil((z / 2 + math.sqrt(z * z / 4 + samples)) ** 2 / chance)


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


def _measured(routing: pd.DataFrame) -> list[float]:
    return (routing["selected"] / routing["tokens"].clip(lower=1)).tolist()


def _screen_flops(census: Census, held_out: int) -> tuple[int, int]:
    """Of the floors alone, and of all measures; of all ordered pairs, whichever go on to alignment."""
    floors = total = 0
    for target in census.layers:
        pairs = target.experts * (census.experts - 1)
        of_layer = target.experts * basis_flops(target) + pairs * floor_flops(target, held_out)
        floors += of_layer
        total += of_layer + pairs * (cka_flops(target, held_out) + weights_flops(target))
    return floors, total


def _align_costs(
    census: Census, pairs: int, aligner: str, rank: int | None, steps: int, train: int, held_out: int
) -> tuple[int, int]:
    """FLOPs of so many pairs, their targets spread over all experts, and the most bytes at once."""
    kind, flops, most = aligner_class(aligner), 0.0, 0
    for layer in census.layers:
        chosen = aligner_rank(layer.inputs, rank)
        share = layer.experts / census.experts
        flops += share * pairs * align_flops(layer, aligner, chosen, steps, train, held_out)
        parameters = sum(math.prod(shape) for shape in kind.shapes(layer.inputs, chosen).values())
        most = max(most, align_bytes(layer, parameters, max(train, held_out)))
    return round(flops), max(most, BUDGET)


def _measure_speed(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of two matrices here, the fastest of a few."""
    one = torch.ones(size, size)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


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


@dataclass(frozen=True)
class LayerSize:
    """One layer's experts.

    Attributes:
        index: of its block.
        experts: E.
        top_k: experts of a token.
        inputs, outputs: features of an expert's input and output.
        hidden: units of an expert, ff.
        projections: matrices from the input to the hidden units: 2 with a gate, 1 without.
    """

    index: int
    experts: int
    top_k: int
    inputs: int
    outputs: int
    hidden: int
    projections: int

    @property
    def forward(self) -> int:
        """FLOPs of an expert for one token."""
        return 2 * self.hidden * (self.projections * self.inputs + self.outputs)


@dataclass(frozen=True)
class Census:
    """A model in numbers.

    Attributes:
        name: class, or name given.
        layers: those with experts.
        parameters: of the model.
        active: of them, those that a token is multiplied with: without embeddings that are only looked up, and of the
            experts only top-k.
    """

    name: str
    layers: tuple[LayerSize, ...]
    parameters: int
    active: int

    @property
    def experts(self) -> int:
        """Experts of all layers."""
        return sum(layer.experts for layer in self.layers)


def take_census(model: nn.Module | PretrainedConfig | str | Path) -> Census:
    """Counts a model, or what a config would build, without weights.

    Raises:
        LamellaError: there is no config under this name, or the model has no experts that lamella knows.
    """
    built = model if isinstance(model, nn.Module) else _build(model)
    layers = moe_layers(built)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    looked_up = sum(part.weight.numel() for part in built.modules() if isinstance(part, nn.Embedding))
    head = getattr(built, "get_output_embeddings", lambda: None)()
    if head is not None and any(
        part.weight is head.weight for part in built.modules() if isinstance(part, nn.Embedding)
    ):
        looked_up -= head.weight.numel()  # looked up and multiplied with
    idle = sum((layer.num_experts - layer.top_k) * layer.experts[0].parameters for layer in layers)
    return Census(
        type(built).__name__, tuple(_size(layer) for layer in layers), parameters, parameters - looked_up - idle
    )


def _size(layer: MoELayer) -> LayerSize:
    expert = layer.experts[0]
    (hidden, inputs), outputs = expert.up.shape, expert.down.shape[0]
    projections = 1 if expert.gate is None else 2
    return LayerSize(layer.index, layer.num_experts, layer.top_k, inputs, outputs, hidden, projections)


def _build(config: PretrainedConfig | str | Path) -> nn.Module:
    """The model of a config on the meta device, where tensors have shapes and no numbers."""
    if not isinstance(config, PretrainedConfig):
        try:
            config = AutoConfig.from_pretrained(config)
        except (OSError, ValueError) as error:
            raise LamellaError(
                f"No model config is found under {str(config)!r}: {error} Name a folder or file with a config.json, a "
                "hub id, or give a config."
            ) from error
    kind = next(
        (
            kind
            for kind, known in (
                (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
                (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
            )
            if type(config) in known
        ),
        AutoModel,
    )
    with torch.device("meta"):
        return kind.from_config(config)


def basis_flops(target: LayerSize) -> int:
    """Of one decomposition of a down-projection ``(d, ff)``: Householder QR with the whole orthogonal matrix.

    Source: Golub & Van Loan, Matrix Computations, 5.2.2: 2 r² (d - r/3) for the factors, 4 (d² r - d r² + r³/3) for Q.
    """
    d = target.outputs
    rank = min(target.hidden, d)
    return round(2 * rank**2 * (d - rank / 3) + 4 * (d * d * rank - d * rank**2 + rank**3 / 3))


def floor_flops(target: LayerSize, tokens: int) -> int:
    """Of the floor of one ordered pair: outputs on the directions that the target does not reach."""
    return 2 * tokens * target.outputs * (target.outputs - min(target.hidden, target.outputs))


def cka_flops(target: LayerSize, tokens: int) -> int:
    """Of the CKA of one ordered pair: the target's outputs, and products of the smaller kind."""
    d = target.outputs
    return tokens * target.forward + (4 * tokens**2 * d if tokens <= d else 6 * tokens * d**2)


def weights_flops(target: LayerSize) -> int:
    """Of the weight distance of one ordered pair, half of what it takes for both orders together."""
    return target.hidden**2 * (target.projections * target.inputs + target.outputs)


def step_flops(target: LayerSize, aligner: str, rank: int) -> int:
    """Of one training token in one step, forward and backward.

    The expert is passed through twice, its own weights get no gradient; nor does what the aligner is given.
    """
    h = target.inputs
    own = {"layernorm": 4 * h * h, "linear": 4 * h * h, "low-rank": 10 * h * rank}[aligner]
    return own + 2 * target.forward


def align_flops(
    target: LayerSize, aligner: str, rank: int, steps: int, train: int, held_out: int, stop: int | None = None
) -> int:
    """Of one pair's aligner: the choice of its start, every step, the looks at the part to stop by, and the scores.

    Args:
        target: sizes of the target.
        aligner, rank: kind.
        steps: taken.
        train: samples that are not held out.
        held_out: samples to score on, with the aligner and without.
        stop: of the training samples, those to stop by; the share that `align` takes unless given.
    """
    h = target.inputs
    scored = {"layernorm": 2 * h * h, "linear": 2 * h * h, "low-rank": 4 * h * rank, "identity": 0}[aligner]
    stop = round(STOP_SHARE * train) if stop is None else stop
    learn, look = train - stop, scored + target.forward
    training = 0 if aligner == "identity" else steps * learn * step_flops(target, aligner, rank)
    looks = 1 if aligner == "identity" else math.ceil(steps / CHECK_EVERY) + 1
    starts = len(IDENTITY_SCALES) * learn * target.forward if aligner == "linear" else 0
    return starts + training + looks * stop * look + (learn + held_out) * look + held_out * target.forward


def align_bytes(target: LayerSize, parameters: int, tokens: int) -> int:
    """Of one pair while it is trained, float32: tokens and what comes of them, six numbers for each parameter."""
    return 4 * (tokens * (7 * target.inputs + 3 * target.outputs + 8 * target.hidden) + 6 * parameters)
