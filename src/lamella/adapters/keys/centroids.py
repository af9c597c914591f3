"""ARIADNE: by the inputs that a LoRA was trained on."""

from torch import Tensor, nn

from lamella.adapters.keys.registry import Score, retrieval_key


@retrieval_key("centroids", reads="centroids")
def centroids(centroids: Tensor) -> Score:
    """The cosine with the nearest of a LoRA's centroids, shifted to lie between 0 and 2; 0 for a LoRA that has none.

    Source: ARIADNE (arXiv 2606.19079).

    Args:
        centroids: means of the base's inputs over groups of a LoRA's training rows, of n LoRAs, ``(n, c, in)``; rows of
            zeros where a LoRA has fewer.
    """
    return nearest(centroids)


def nearest(centroids: Tensor) -> Score:
    """1 and the cosine with the nearest of each LoRA's ``(n, c, in)``; 0 where those are zeros."""
    unit = nn.functional.normalize(centroids, dim=-1)  # (n, c, in)
    missing = ~centroids.any(dim=-1)  # (n, c)

    def score(x: Tensor) -> Tensor:
        cosines = nn.functional.normalize(x, dim=-1) @ unit.flatten(0, 1).t()  # (S, n * c)
        return (1 + cosines.unflatten(-1, unit.shape[:2])).masked_fill(missing, 0).amax(dim=-1)

    return score
