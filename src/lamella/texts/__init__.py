"""Texts for a model: rows read from files, checked, encoded and batched, without the laboratory's named tasks."""

from lamella.texts.batches import TextBatches, text_batches

__all__ = ["TextBatches", "text_batches"]
