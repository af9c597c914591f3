"""Training the routers of a composition inside a diffusers pipeline: its losses and its loop."""

from lamella.training.images.denoising import denoising_loss
from lamella.training.images.guidance import ClipGuidance
from lamella.training.images.loop import ImageBatch, ImageStep, train_routers

__all__ = ["ClipGuidance", "ImageBatch", "ImageStep", "denoising_loss", "train_routers"]
