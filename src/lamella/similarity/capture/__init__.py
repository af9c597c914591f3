"""Capture: one pass over text that keeps a uniform sample of every expert's inputs and counts the routers' choices."""

from lamella.similarity.capture.fingerprint import model_fingerprint, tokenizer_fingerprint
from lamella.similarity.capture.manifest import Manifest
from lamella.similarity.capture.reading import Capture
from lamella.similarity.capture.streaming import Progress, capture
from lamella.similarity.capture.texts import TextBatches, text_batches

__all__ = [
    "Capture",
    "Manifest",
    "Progress",
    "TextBatches",
    "capture",
    "model_fingerprint",
    "text_batches",
    "tokenizer_fingerprint",
]
