"""Arrow: by the strongest direction alone."""

from torch import Tensor, nn

from lamella.adapters.keys.registry import Score, retrieval_key


@retrieval_key("arrow", reads="directions")
def arrow(directions: Tensor) -> Score:
    """``|cos(v_i, x)|`` with v_i the input direction that LoRA i answers to most; its sign means nothing.

    Source: Arrow (arXiv 2405.11157, section 3), where each token has a score; here a prompt's mean has.

    Args:
        directions: ``S_i V_i^T`` of n LoRAs, ``(n, r, in)``, the strongest first.
    """
    strongest = nn.functional.normalize(directions[:, 0], dim=-1)  # (n, in)

    def score(x: Tensor) -> Tensor:
        return (nn.functional.normalize(x, dim=-1) @ strongest.t()).abs()

    return score
