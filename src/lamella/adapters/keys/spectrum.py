"""SpectR: by the length of what a LoRA puts out."""

from torch import Tensor

from lamella.adapters.keys.registry import retrieval_key


@retrieval_key("spectrum", reads="directions")
def spectrum(x: Tensor, directions: Tensor) -> Tensor:
    """``|S_i V_i^T x| / |x|``: all directions of a LoRA count, each by its singular value.

    Source: SpectR (arXiv 2504.03454), where each token has a score; here a prompt's mean has.

    Args:
        x: ``(S, in)``.
        directions: ``S_i V_i^T`` of n LoRAs, ``(n, r, in)``.

    Returns:
        ``(S, n)``.
    """
    answers = x @ directions.flatten(0, 1).t()  # (S, n * r)
    lengths: Tensor = answers.unflatten(-1, directions.shape[:2]).norm(dim=-1)  # (S, n)
    return lengths / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
