"""Noise at test time: on input embeddings, on tokens, and the worst one that an attack finds.

The published noise protocol of MoLEx is unknown; this one is lamella's own. Noise changes real, non-special tokens
alone. What a row is given follows from the seed and the row's number, never from its batch, the padding or the model,
so that every method is scored on the same noise; and a stronger noise is the weaker one made larger.
"""

from lamella.lab.robustness.attack import pgd
from lamella.lab.robustness.embeddings import changed_embeddings, embedding_rms, input_embeddings
from lamella.lab.robustness.noise import gaussian_noise, replaced_tokens, touched_tokens

__all__ = [
    "changed_embeddings",
    "embedding_rms",
    "gaussian_noise",
    "input_embeddings",
    "pgd",
    "replaced_tokens",
    "touched_tokens",
]
