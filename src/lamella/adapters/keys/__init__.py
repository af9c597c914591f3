"""Retrieval keys: how well a LoRA suits an input, from what the library's index holds of each."""

from lamella.adapters.keys import arrow, centroids, spectrum, text
from lamella.adapters.keys.registry import RetrievalKey, key_named, retrieval_keys

__all__ = ["RetrievalKey", "arrow", "centroids", "key_named", "retrieval_keys", "spectrum", "text"]
