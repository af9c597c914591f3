"""SpectR: by the length of what a LoRA puts out."""

from torch import Tensor, nn

from lamella.adapters.keys.registry import Score, retrieval_key


@retrieval_key("spectrum", reads="directions")
def spectrum(directions: Tensor) -> Score:
    """``|S_i V_i^T x| / |x|``: all directions of a LoRA count, each by its singular value.

    Source: SpectR (arXiv 2504.03454), where each token has a score; here a prompt's mean has.

    Args:
        directions: ``S_i V_i^T`` of n LoRAs, ``(n, r, in)``.
    """
    flat = directions.flatten(0, 1)  # (n * r, in)

    def score(x: Tensor) -> Tensor:
        # Few inputs meet many directions: this way round a CPU reads those in half the time of x @ flat.t().
        answers = nn.functional.linear(flat, x).unflatten(0, directions.shape[:2])  # (n, r, S)
        return answers.square().sum(dim=1).sqrt().t() / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    return score
