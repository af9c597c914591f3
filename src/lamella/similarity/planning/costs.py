"""FLOPs of the steps of a study, a multiplication with an addition counted as two."""

import math

from lamella.similarity.alignment.fitting import IDENTITY_SCALES
from lamella.similarity.alignment.sources import STOP_SHARE
from lamella.similarity.alignment.training import CHECK_EVERY
from lamella.similarity.planning.census import LayerSize


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
