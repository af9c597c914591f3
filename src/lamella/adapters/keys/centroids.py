"""ARIADNE: by the inputs that a LoRA was trained on."""

from torch import Tensor, nn

from lamella.adapters.keys.registry import retrieval_key


@retrieval_key("centroids", reads="centroids")
def centroids(x: Tensor, centroids: Tensor) -> Tensor:
    """The cosine with the nearest of a LoRA's centroids, shifted to lie between 0 and 2; 0 for a LoRA that has none.

    Source: ARIADNE (arXiv 2606.19079).

    Args:
        x: ``(S, in)``.
        centroids: means of the base's inputs over groups of a LoRA's training rows, of n LoRAs, ``(n, c, in)``; rows of
            zeros where a LoRA has fewer.

    Returns:
        ``(S, n)``.
    """
    unit = nn.functional.normalize(centroids, dim=-1)  # (n, c, in)
    cosines = (nn.functional.normalize(x, dim=-1) @ unit.flatten(0, 1).t()).unflatten(-1, unit.shape[:2])  # (S, n, c)
    missing = ~centroids.any(dim=-1)  # (n, c)
    return (1 + cosines).masked_fill(missing, 0).amax(dim=-1)
