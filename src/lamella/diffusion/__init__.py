"""MOLE inside a diffusers pipeline: routers in its denoiser and text encoders, and their training."""

from lamella.diffusion.composing import compose_pipeline, load_pipeline
from lamella.diffusion.composition import PipelineComposition
from lamella.diffusion.denoising import denoising_loss
from lamella.diffusion.guidance import ClipGuidance
from lamella.diffusion.training import ImageBatch, ImageStep, train_routers

__all__ = [
    "ClipGuidance",
    "ImageBatch",
    "ImageStep",
    "PipelineComposition",
    "compose_pipeline",
    "denoising_loss",
    "load_pipeline",
    "train_routers",
]
