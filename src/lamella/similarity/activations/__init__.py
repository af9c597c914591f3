"""Capture: one pass over text that keeps a uniform sample of every expert's inputs and counts the routers' choices."""

from lamella.similarity.activations.manifest import Manifest, model_fingerprint, tokenizer_fingerprint
from lamella.similarity.activations.reading import Capture
from lamella.similarity.activations.streaming import capture
from lamella.texts import TextBatches, text_batches

__all__ = [
    "Capture",
    "Manifest",
    "TextBatches",
    "capture",
    "model_fingerprint",
    "text_batches",
    "tokenizer_fingerprint",
]
